"""Geometry of outpainting: sizes, where the picture lies, what is white, and the soft way back."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sample.canvas import FILLS, extend, feathered


@pytest.fixture
def picture() -> Image.Image:
    """50 x 40 pixels, each different from its neighbours."""
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


def white(mask: Image.Image) -> np.ndarray:
    values = np.asarray(mask)
    assert set(np.unique(values)) <= {0, 255}
    return values == 255


@pytest.mark.parametrize("fill", FILLS)
def test_all_sides(picture: Image.Image, fill: str) -> None:
    canvas, mask = extend(picture, left=10, top=4, right=20, bottom=8, overlap=3, fill=fill)
    assert (canvas.mode, mask.mode) == ("RGB", "L")
    assert canvas.size == mask.size == (80, 52)
    assert np.array_equal(np.asarray(canvas)[4:44, 10:60], np.asarray(picture))
    expected = np.ones((52, 80), dtype=bool)
    expected[7:41, 13:57] = False
    assert np.array_equal(white(mask), expected)


@pytest.mark.parametrize(
    ("sides", "size", "kept"),
    [
        ({"right": 1}, (64, 64), (0, 0, 48, 38)),  # 14 to the right; 24 at the bottom, for the multiple alone
        ({"left": 1}, (64, 64), (16, 0, 64, 38)),  # all 14 to the left
        ({"top": 3}, (64, 64), (0, 26, 48, 64)),
        ({"left": 1, "right": 1}, (64, 64), (3, 0, 49, 38)),
        ({"left": 14, "top": 24}, (64, 64), (16, 26, 64, 64)),
        ({"left": 15, "top": 24}, (96, 64), (48, 26, 96, 64)),
    ],
)
def test_rounded_to_the_unit(
    picture: Image.Image, sides: dict[str, int], size: tuple[int, int], kept: tuple[int, int, int, int]
) -> None:
    canvas, mask = extend(picture, **sides, unit=32, overlap=2)
    assert canvas.size == size
    black = ~white(mask)
    expected = np.zeros_like(black)
    expected[kept[1] : kept[3], kept[0] : kept[2]] = True
    assert np.array_equal(black, expected)


def test_sides_that_do_not_move_keep_their_edge(picture: Image.Image) -> None:
    _, mask = extend(picture, right=14, overlap=5)
    black = ~white(mask)
    assert black[:, :45].all()
    assert not black[:, 45:].any()


def test_fills() -> None:
    half = Image.new("RGB", (32, 16), (200, 30, 40))
    half.paste((10, 20, 250), (16, 0, 32, 16))
    edge, grey, noise = (
        np.asarray(extend(half, left=8, right=8, overlap=0, fill=fill).canvas).astype(int)
        for fill in ("edge", "grey", "noise")
    )
    assert (edge[:, :4] == (200, 30, 40)).all()
    assert (edge[:, -4:] == (10, 20, 250)).all()
    assert (grey[:, :8] == 128).all()
    assert 50 < noise[:, :8].std() < 100
    assert len(np.unique(noise[:, :8])) > 100


def test_noise_is_of_its_seed(picture: Image.Image) -> None:
    def canvas(seed: int) -> bytes:
        return extend(picture, top=8, fill="noise", seed=seed).canvas.tobytes()

    assert canvas(1) == canvas(1) != canvas(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "on one side at least; got left 0, top 0, right 0, bottom 0"),
        ({"left": -8, "right": 16}, "extended by 0 pixels or more.*got left -8"),
        ({"left": 8, "fill": "mirror"}, "fill must be one of edge, noise, grey, got mirror"),
        ({"left": 8, "unit": 0}, "unit must be at least 1 and overlap at least 0, got 0 and 16"),
        ({"left": 8, "overlap": -1}, "got 1 and -1"),
        ({"left": 8, "right": 8, "overlap": 25}, "an overlap of 25 pixels leaves nothing .* of 50x40"),
        ({"left": 10**7}, "a canvas of 10000050x40 has more pixels than a picture may have"),
    ],
)
def test_extensions_that_cannot_be(picture: Image.Image, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend(picture, **options)


def test_feather_is_a_ramp_inside_of_the_mask() -> None:
    mask = torch.ones(1, 1, 10, dtype=torch.bool)
    mask[..., 4] = False
    quarters = feathered(mask, 3)[0, 0] * 4
    assert quarters.tolist() == [4, 3, 2, 1, 0, 1, 2, 3, 4, 4]
    assert torch.equal(feathered(mask, 0), mask.float())


def test_feather_never_touches_what_is_kept_nor_fades_at_the_border() -> None:
    mask = torch.ones(1, 20, 30, dtype=torch.bool)
    mask[:, 8:12, 10:15] = False
    weight = feathered(mask, 4)
    assert (weight[~mask] == 0).all()
    assert (weight[mask] > 0).all()
    assert (weight[:, 0] == 1).all()
    assert float(weight[0, 7, 9]) == pytest.approx(0.2)  # a corner is at a distance of 1
    assert (feathered(torch.ones(1, 4, 4, dtype=torch.bool), 2) == 1).all()
    with pytest.raises(ValueError, match="feather must be at least 0 pixels, got -1"):
        feathered(mask, -1)
