"""Measures of pictures: SSIM against its formula written out with numpy, closed forms, and others' code."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm.metrics import distances, line_distances, nearest_others, precision_recall, psnr, ssim


def by_the_formula(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004, equations 13 and 14 to 16, window by window, of a picture (C, H, W)."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for a, b in zip(x, y, strict=True):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                cov = (window * (p - mu_p) * (q - mu_q)).sum()
                luminance = (2 * mu_p * mu_q + c1) / (mu_p**2 + mu_q**2 + c1)
                values.append(luminance * (2 * cov + c2) / (var_p + var_q + c2))
    return float(np.mean(values))


def pairs(height: int, width: int, data_range: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    images = (torch.rand(3, 3, height, width) - 0.5) * data_range
    noise = torch.tensor([0.05, 0.2, 1.0]).view(3, 1, 1, 1) * torch.randn_like(images)
    return images, images + 0.5 * data_range * noise


@pytest.mark.parametrize(("height", "width"), [(11, 11), (14, 12), (11, 17)])
@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_ssim_equals_its_formula(height: int, width: int, data_range: float) -> None:
    images, others = pairs(height, width, data_range)
    expected = [by_the_formula(x, y, data_range) for x, y in zip(images.numpy(), others.numpy(), strict=True)]
    assert expected[0] > expected[1] > expected[2]
    ours = ssim(images, others, data_range)
    assert (ours.shape, ours.dtype) == ((3,), torch.float32)
    assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-6)
    assert_close(ssim(others, images, data_range), ours, rtol=0, atol=1e-6)


def test_ssim_closed_forms() -> None:
    """1 for equal pictures; flat ones have no variance: luminance alone counts."""
    images, _ = pairs(16, 20)
    assert_close(ssim(images, images), torch.ones(3), rtol=0, atol=1e-7)
    flat = [torch.full((1, 3, 12, 12), value) for value in (0.5, 0.2)]
    c1 = (0.01 * 2) ** 2
    expected = torch.tensor([(2 * 0.5 * 0.2 + c1) / (0.5**2 + 0.2**2 + c1)])
    assert_close(ssim(*flat), expected, rtol=0, atol=1e-6)
    half = ssim(images.half(), images.half())
    assert half.dtype == torch.float16 and bool((half == 1).all())


def test_ssim_is_of_each_picture_alone() -> None:
    images, others = pairs(13, 13)
    whole = ssim(images, others)
    assert_close(torch.cat([ssim(images[i : i + 1], others[i : i + 1]) for i in range(3)]), whole)


def test_ssim_wants_11_pixels() -> None:
    with pytest.raises(ValueError, match="pictures of 10x40 are too small for SSIM, which needs 11 px"):
        ssim(torch.zeros(1, 3, 40, 10), torch.zeros(1, 3, 40, 10))


def test_ssim_equals_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, others = pairs(24, 31)
    _, maps = structural_similarity_index_measure(
        others, images, sigma=1.5, kernel_size=11, data_range=2.0, reduction="none", return_full_image=True
    )
    expected = maps[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # where the window fits; theirs goes on over mirrors
    assert_close(ssim(images, others), expected, rtol=0, atol=1e-4)


def test_ssim_equals_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    images, others = pairs(24, 31)
    expected = [
        metrics.structural_similarity(
            x,
            y,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2.0,
            channel_axis=0,
        )
        for x, y in zip(images.double().numpy(), others.double().numpy(), strict=True)
    ]
    assert_close(ssim(images, others), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_ssim_with_scipys_filter() -> None:
    """The same from maps filtered by others' code, as scikit-image does it."""
    ndimage = pytest.importorskip("scipy.ndimage")
    images, others = pairs(24, 31)
    x, y = images.double().numpy(), others.double().numpy()

    def smooth(maps: np.ndarray) -> np.ndarray:
        filtered = ndimage.gaussian_filter(maps, (0, 0, 1.5, 1.5), truncate=3.5)
        return filtered[..., 5:-5, 5:-5]

    mu_x, mu_y = smooth(x), smooth(y)
    cov = smooth(x * y) - mu_x * mu_y
    variances = smooth(x * x) - mu_x**2 + smooth(y * y) - mu_y**2
    c1, c2 = 0.02**2, 0.06**2
    values = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (variances + c2))
    expected = torch.from_numpy(values.mean(axis=(1, 2, 3))).float()
    assert_close(ssim(images, others), expected, rtol=0, atol=1e-6)


def test_psnr_closed_form() -> None:
    """An error of 0.2 everywhere is 10 log10(4 / 0.04) = 20 dB; what lies outside [-1, 1] is clamped first."""
    images = torch.full((2, 3, 4, 4), 0.9)
    others = torch.stack([torch.full((3, 4, 4), 0.7), torch.full((3, 4, 4), 1.5)])
    assert_close(psnr(images, others), torch.tensor([20.0, 10 * np.log10(4 / 0.01)], dtype=torch.float32))


# --- sets of features ---------------------------------------------------------------------------------------


def test_nearest_others_on_a_line() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]])
    assert nearest_others(points).tolist() == [1, 1, 2, 0, 0]  # the last two are each other's, not their own
    assert nearest_others(points, k=3).tolist() == [7, 6, 4, 6, 6]


def test_precision_and_recall_of_equal_sets_are_1() -> None:
    points = torch.randn(30, 8)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points.flip(0)) == (1.0, 1.0)


def test_precision_and_recall_of_sets_far_apart_are_0() -> None:
    points = torch.randn(30, 8)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_precision_and_recall_of_overlapping_sets() -> None:
    """Two far places 0 and 1, a cluster of 10 at each: which sets hold which is known."""
    here, there = torch.rand(10, 3) * 0.01, torch.rand(10, 3) * 0.01 + 100
    both = torch.cat([here, there])
    assert precision_recall(both, torch.cat([here, here])) == (1.0, 0.5)  # samples all real, half is missing
    assert precision_recall(torch.cat([here, here]), both) == (0.5, 1.0)  # half of the samples is not real


def test_precision_and_recall_on_a_line() -> None:
    """Points 0, 1, ..., 9 with k = 2: balls of radius 1, of 2 at both ends."""
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[-2.0], [-2.5], [10.9], [11.5], [4.5]])
    # In: -2 and 10.9 (distance 2 and 1.9 of an end), 4.5. Radii of the fakes, whose second-nearest other
    # ones are 4.5, 4.5, 4.5, 4.5 (6.5, 7, 6.4 and 7 away) and 10.9 or -2 (6.5 and 6.4 away)
    precision, recall = precision_recall(real, fake, k=2)
    assert precision == pytest.approx(3 / 5)
    assert recall == 1.0


def test_precision_and_recall_follow_their_equations() -> None:
    """Kynkaanniemi et al. 2019, equations 1 to 3, written out."""
    real, fake = torch.randn(25, 4), 1.3 * torch.randn(20, 4) + 0.5

    def covered(points: torch.Tensor, by: torch.Tensor) -> float:
        inside = 0
        for point in points:
            for i, other in enumerate(by):
                others = torch.cat([by[:i], by[i + 1 :]])
                radius = (others - other).norm(dim=1).sort().values[2]
                if (point - other).norm() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    expected = covered(fake, by=real), covered(real, by=fake)
    assert all(0.2 < value < 1 for value in expected)
    assert precision_recall(real, fake) == pytest.approx(expected)


def test_precision_and_recall_want_more_than_k() -> None:
    with pytest.raises(ValueError, match="3 fake pictures are too few for precision and recall with k = 3"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))


def test_distances_are_root_mean_squares() -> None:
    assert_close(distances(torch.zeros(1, 4), torch.full((1, 4), 3.0)), torch.tensor([[3.0]]))


def test_line_distances_of_what_can_be_counted_by_hand() -> None:
    """Parallel lines, a point beside a line, equal and empty drawings."""
    drawings = torch.zeros(5, 8, 10, dtype=torch.bool)
    others = drawings.clone()
    drawings[0, 2], others[0, 5] = True, True  # 3 apart, both ways
    drawings[1, 2, :3], others[1, 2, 0] = True, True  # (0 + 1 + 2) / 3 there, 0 back
    drawings[2, 1:5, 1:5] = others[2, 1:5, 1:5] = True
    others[3, 0, 0] = True
    assert_close(line_distances(drawings, others), torch.tensor([3.0, 0.5, 0.0, 164**0.5, 0.0]))
    assert_close(line_distances(others, drawings), line_distances(drawings, others))
