"""Fréchet distance, KID and memorisation of features whose distribution is known."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sample.metrics import (
    FEWEST,
    compare,
    doubts,
    draw,
    frechet_distance,
    ideal,
    kid,
    memorisation,
    require_torchmetrics,
)

pytest.importorskip("torchmetrics")


def exactly(mean: Tensor, covariance: Tensor, count: int = 64) -> Tensor:
    """Points whose mean and covariance (unbiased) are these to the last digits."""
    points = torch.randn(count, len(mean), dtype=torch.float64)
    points = points - points.mean(dim=0)
    whitener = torch.linalg.inv(torch.linalg.cholesky(points.T @ points / (count - 1)))
    return points @ whitener.T @ torch.linalg.cholesky(covariance).T + mean


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_frechet_distance_of_gaussians_along_the_axes() -> None:
    """|m|^2 + sum (s_r - s_f)^2 where both covariances are diagonal."""
    zero, mean = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    real, fake = exactly(zero, diagonal(1, 4, 9)), exactly(mean, diagonal(4, 4, 1))
    assert frechet_distance(real, fake) == pytest.approx(5.25 + 1 + 0 + 4, rel=1e-6)
    assert frechet_distance(fake, real) == pytest.approx(10.25, rel=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """In two dimensions tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2)."""
    a, b = diagonal(3, 1), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    root = ((a @ b).trace() + 2 * torch.det(a @ b).sqrt()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * root)
    zero = torch.zeros(2).double()
    assert expected > 0.1
    assert frechet_distance(exactly(zero, a), exactly(zero, b)) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_are_at_distance_zero() -> None:
    points = torch.randn(100, 6).double()
    found = compare(points, points.flip(0))
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert (found.counts, found.kid_subset, found.pr_count) == ((100, 100), 50, 100)


def test_kid_of_a_set_and_itself_is_about_0() -> None:
    """The estimate counts each point with itself across the sets alone: 2/m (mean k(x, y) - mean k(x, x))."""
    points = torch.randn(400, 6).double()
    k = (points @ points.T / points.square().sum(dim=1).mean() + 1) ** 3
    itself = k.diagonal().mean()
    others = (k.sum() - k.trace()) / (400 * 399)
    found = kid(points, points, subset_size=400)
    assert found == (pytest.approx(float(2 / 400 * (others - itself))), pytest.approx(0))
    assert abs(found[0]) < 0.05


def test_kid_is_zero_on_average_and_its_deviation_tells_how_far() -> None:
    real, fake = torch.randn(400, 6).double(), torch.randn(400, 6).double()
    mean, deviation = kid(real, fake, subset_size=200)
    assert abs(mean) < 3 * deviation and 0 < deviation < 0.2
    shifted, _ = kid(real, fake + 1, subset_size=200)
    assert shifted > 20 * deviation


def test_kid_of_known_points() -> None:
    """Unbiased: means over pairs of different ones within a set, over all pairs across; k = (x y / |r|^2 + 1)^3."""
    real = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).double()
    fake = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).double()
    mean, deviation = kid(real, fake, subset_size=2)
    assert (mean, deviation) == (pytest.approx(8 + 1 - 2), pytest.approx(0))
    points = torch.randn(40, 3).double()
    assert kid(points, 2 * points, 20) == pytest.approx(kid(50 * points, 100 * points, 20))  # free of scale


def test_kid_is_a_function_of_the_seed_alone() -> None:
    real, fake = torch.randn(50, 4).double(), torch.randn(40, 4).double()
    before = torch.get_rng_state()
    first = kid(real, fake, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert kid(real, fake, 20, seed=1) == first
    assert kid(real, fake, 20, seed=2) != first


def test_the_ideal_is_real_pictures_against_the_rest() -> None:
    real = torch.randn(120, 4).double()
    best = ideal(real, 40)
    assert best is not None
    assert best.counts == (80, 40)
    worse = compare(real, 2 * torch.randn(40, 4).double() + 1)
    assert best.frechet < worse.frechet / 4 and best.kid < worse.kid
    assert ideal(real, 61) is None


def test_few_pictures_are_refused_or_doubted() -> None:
    enough = torch.randn(FEWEST, 3).double()
    with pytest.raises(ValueError, match="9 samples are too few to compare two sets; at least 10"):
        compare(enough, enough[:-1])
    with pytest.raises(ValueError, match="9 real pictures are too few"):
        compare(enough[:-1], enough)
    singular, biased = doubts(512, 5000, 200), doubts(64, 100, 5000)
    assert "200 samples for 512 features: their covariance is singular" in singular[0]
    assert "at least 513, better 5120" in singular[0]
    assert "100 pictures for 64 features" in biased[0]
    assert doubts(64, 640, 640) == []


def test_draws_are_without_replacement() -> None:
    assert draw(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    assert len(set(draw(100, 60, 0).tolist())) == 60
    assert_close(draw(100, 60, 0), draw(100, 60, 0))


# --- memorisation -------------------------------------------------------------------------------------------


def test_repeated_pictures_are_found() -> None:
    train, heldout = torch.randn(200, 16).double(), torch.randn(40, 16).double()
    samples = torch.cat([train[[7, 3]], torch.randn(8, 16).double()])
    found, distance, places = memorisation(samples, train, heldout)
    assert places[:2] == [7, 3]
    assert distance[:2].tolist() == [0, 0]
    assert found.samples.smallest == 0 and found.samples.below == pytest.approx(0.2, abs=0.101)
    assert found.real.below == pytest.approx(0.05, abs=0.03)
    assert found.threshold > 0 and found.against == "held-out pictures"
    expected = (heldout[:, None] - train[None]).square().mean(dim=2).sqrt().amin(dim=1)
    assert found.real.median == pytest.approx(float(expected.median()))
    assert found.threshold == pytest.approx(float(expected.quantile(0.05)))


@pytest.mark.parametrize("heldout", [None, torch.zeros(9, 16).double()])
def test_without_held_out_pictures_the_training_set_is_its_own_measure(heldout: Tensor | None) -> None:
    train = torch.randn(50, 16).double()
    found, _, _ = memorisation(train[:10], train, heldout)
    assert found.against == "training pictures, each against the others"
    assert found.real.count == 50 and found.real.smallest > 0
    assert found.samples.below == 1.0  # the training pictures themselves


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_torchmetrics()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchmetrics"):
        require_torchmetrics()
