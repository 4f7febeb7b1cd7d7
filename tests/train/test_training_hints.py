"""Hints in training: kept by what made them, drawn and varied as a function of the step."""

import numpy as np
import pytest
import torch

from train.bucketed import Ragged
from train.hints import HintConfig, annotated, cached_hints, drawn, random_boxes

pytest.importorskip("cv2")
TWO = ("canny:low=50,high=100", "canny:low=400,high=800")


def discs(count=3, size=32):
    """White discs on black, each larger than the one before."""
    at = torch.arange(size) - size / 2 + 0.5
    radius = (at[:, None] ** 2 + at**2).sqrt()
    return (
        torch.stack([(radius < 5 + 2 * n).expand(3, size, size) for n in range(count)]).to(torch.uint8) * 255
    )


def test_hints_are_kept_by_what_made_them(tmp_path):
    pixels = discs()
    made = cached_hints(tmp_path, "train", pixels, TWO)
    assert made.shape == (3, 2, 3, 32, 32) and made.dtype == torch.uint8
    for number, annotator in enumerate(TWO):
        assert torch.equal(made[:, number], annotated(pixels, annotator))
    [file] = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert torch.equal(cached_hints(tmp_path, "train", pixels, TWO), made)
    assert file.stat().st_mtime_ns == before  # read, not made again
    cached_hints(tmp_path, "train", pixels, TWO[:1])
    changed = pixels.clone()
    changed[0, 0, 0, 0] = 1
    cached_hints(tmp_path, "train", changed, TWO)
    assert len(list(tmp_path.iterdir())) == 3


def test_pictures_of_several_shapes(tmp_path):
    wide = discs(2)[:, :, 4:28]
    made = cached_hints(tmp_path, "train", Ragged([discs(1), wide], torch.tensor([1, 0, 1])), TWO[:1])
    assert isinstance(made, Ragged) and [part.shape for part in made.parts] == [
        (1, 1, 3, 32, 32),
        (2, 1, 3, 24, 32),
    ]
    assert torch.equal(made[torch.tensor([0, 2])][:, 0], annotated(wide, TWO[0]))
    assert annotated(discs(1)[:0], TWO[0]).shape == (0, 3, 32, 32)


def test_the_hint_of_a_disc_is_its_circle():
    hint = annotated(discs(1), "canny")[0]
    assert torch.equal(hint[0], hint[1]) and set(hint.unique().tolist()) == {0, 255}
    y, x = (hint[0] > 0).nonzero(as_tuple=True)
    radius = np.hypot(x - 15.5, y - 15.5)
    assert len(radius) >= 24 and radius.min() >= 4 and radius.max() <= 6.1


def test_draws_are_of_the_step():
    hints = torch.randint(0, 2, (16, 3, 3, 32, 32), dtype=torch.uint8) * 255
    config = HintConfig(TWO, dropout=0.3, thick=0.3, erased=0.3)
    made = drawn(hints, config, 0, "train", 5, 1)
    assert torch.equal(made, drawn(hints, config, 0, "train", 5, 1))
    for other in ((1, "train", 5, 1), (0, "train", 6, 1), (0, "train", 5, 2)):
        assert not torch.equal(made, drawn(hints, config, *other))
    assert made.min() == 0 and made.max() == 1 and made.shape == (16, 3, 32, 32)


def test_without_options_one_of_the_hints_as_it_is():
    hints = torch.randint(0, 2, (64, 3, 3, 8, 8), dtype=torch.uint8) * 255
    made = drawn(hints, HintConfig(TWO), 0, "train", 0, 0)
    same = (made[:, None] * 255 == hints).flatten(2).all(dim=2)  # (B, V)
    assert same.any(dim=1).all() and same.any(dim=0).all()  # of each row one, and each annotator somewhere


def test_what_the_options_do():
    hints = torch.zeros(256, 1, 3, 32, 32, dtype=torch.uint8)
    hints[..., 16, :] = 255
    thick = drawn(hints, HintConfig(thick=1.0), 0, "train", 0, 0)
    assert torch.equal(thick, (hints[:, 0] * 0 + 255).float().div(255) * rows_of([15, 16, 17]))
    assert drawn(hints, HintConfig(dropout=1.0), 0, "train", 0, 0).max() == 0
    share = (drawn(hints, HintConfig(dropout=0.25), 0, "train", 0, 0).amax(dim=(1, 2, 3)) == 0).float().mean()
    assert 0.15 < share < 0.35
    full = torch.full_like(hints, 255)
    left = drawn(full, HintConfig(erased=1.0), 0, "train", 0, 0)[:, 0]
    gone = (1 - left).sum(dim=(1, 2)) / 32**2
    assert gone.min() > 0.04 and gone.max() < 0.6 and 0.2 < gone.mean() < 0.3  # (1/2)^2 in the mean
    rows, columns = (1 - left).amax(dim=2), (1 - left).amax(dim=1)
    assert torch.equal(1 - left, rows[:, :, None] * columns[:, None])  # a box


def rows_of(rows):
    mask = torch.zeros(32, 1)
    mask[rows] = 1
    return mask


def test_boxes_lie_inside():
    boxes = random_boxes(200, 16, 40, torch.Generator().manual_seed(0))
    assert boxes.shape == (200, 1, 16, 40)
    heights, widths = boxes.any(dim=3).sum(dim=2)[:, 0], boxes.any(dim=2).sum(dim=2)[:, 0]
    assert heights.min() >= 3 and heights.max() <= 13 and widths.min() >= 9 and widths.max() <= 31


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"annotators": ()}, "hints.annotators is empty"),
        ({"dropout": 1.5}, "hints.dropout must be in 0..1, got 1.5"),
        ({"erased": float("nan")}, "hints.erased must be in 0..1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        HintConfig(**values)
