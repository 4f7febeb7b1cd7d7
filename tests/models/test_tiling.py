"""Tiles: where they lie and how they are weighted in closed form, then beside the untiled autoencoder."""

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.testing import assert_close

from ldm.metrics import psnr
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, DiagonalGaussian, make_autoencoder
from ldm.models.tiling import Tiles, decode_tiled, encode_tiled
from ldm.weights.reading import open_checkpoint
from sample.model import find_model

SMALL = {"base_channels": 8, "norm_groups": 4, "channel_mult": (1, 2), "num_res_blocks": 1}


class Doubling(Autoencoder):
    """Local and linear, so that tiles change nothing; the posterior's deviation is 1."""

    def __init__(self) -> None:
        super().__init__(AutoencoderConfig(**SMALL, scale_factor=1.0))
        self.seen: list[tuple[int, ...]] = []

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> DiagonalGaussian:
        self.seen.append(tuple(images.shape[-2:]))
        mean = F.avg_pool2d(torch.cat([images, images[:, :1]], dim=1), 2)
        return DiagonalGaussian(torch.cat([mean, torch.zeros_like(mean)], dim=1))

    def decode_latents(self, latents: Float[Tensor, "B 4 h w"]) -> Tensor:
        self.seen.append(tuple(latents.shape[-2:]))
        return F.interpolate(latents[:, :3], scale_factor=2)


@pytest.fixture
def small() -> Autoencoder:
    return make_autoencoder(AutoencoderConfig(**SMALL)).eval().requires_grad_(False)


# --- closed form --------------------------------------------------------------------------------------------


def test_places_of_tiles() -> None:
    assert Tiles(64, 64, 16).starts == [0]
    assert Tiles(40, 64, 16).starts == [0]
    assert Tiles(65, 64, 16).starts == [0, 1]
    assert Tiles(112, 64, 16).starts == [0, 48]
    assert Tiles(113, 64, 16).starts == [0, 24, 49]  # evenly spaced, so more than 16 are shared
    assert Tiles(6, 2, 0).starts == [0, 2, 4]


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("tile", [1, 2, 5, 8])
def test_weights_sum_to_one_everywhere(tile: int, unit: int) -> None:
    for overlap in range(tile // 2 + 1):
        for length in range(1, 40):
            tiles, total = Tiles(length, tile, overlap), torch.zeros(length * unit)
            assert tiles.starts[-1] + tiles.side == length
            for before, start in zip(tiles.starts, tiles.starts[1:], strict=False):
                assert overlap <= before + tiles.side - start < tile
            for start, weights in zip(tiles.starts, tiles.weights(unit), strict=True):
                assert len(weights) == tiles.side * unit
                assert weights.min() >= 0
                total[start * unit : (start + tiles.side) * unit] += weights
            assert_close(total, torch.ones(length * unit), rtol=0, atol=1e-6)


def test_weights_are_linear_ramps_in_the_overlap() -> None:
    first, second = Tiles(12, 8, 4).weights()
    ramp = torch.tensor([0.125, 0.375, 0.625, 0.875])  # at the middles of four cells
    assert torch.equal(first, torch.cat([torch.ones(4), 1 - ramp]))
    assert torch.equal(second, torch.cat([ramp, torch.ones(4)]))


@pytest.mark.parametrize("size", [(9, 30), (30, 5), (17, 23)])
def test_of_a_local_linear_autoencoder_nothing_changes(size: tuple[int, int]) -> None:
    autoencoder, latents = Doubling(), torch.randn(2, 4, *size)
    assert_close(
        decode_tiled(autoencoder, latents, 8, 3), F.interpolate(latents[:, :3], scale_factor=2),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    images, noise = torch.randn(2, 3, 2 * size[0], 2 * size[1]), torch.randn(2, 4, *size)
    whole = autoencoder.encode_latents(images, noise)
    assert_close(encode_tiled(autoencoder, images, noise, 8, 3), whole, rtol=0, atol=1e-6)
    assert_close(encode_tiled(autoencoder, images, None, 8, 3), whole - noise, rtol=0, atol=1e-6)


def test_never_more_than_a_tile_at_once() -> None:
    autoencoder = Doubling()
    decode_tiled(autoencoder, torch.randn(1, 4, 5, 50), 8, 2)
    assert set(autoencoder.seen) == {(5, 8)}
    assert len(autoencoder.seen) == 8  # 1 + 42 / 6
    autoencoder.seen.clear()
    encode_tiled(autoencoder, torch.randn(1, 3, 40, 40), None, 8, 2)
    assert set(autoencoder.seen) == {(16, 16)}


# --- beside the untiled -------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_fits_in_one_tile_is_bit_equal(small: Autoencoder) -> None:
    latents, images = torch.randn(2, 4, 7, 8), torch.randn(2, 3, 14, 16)
    noise = torch.randn(2, 4, 7, 8)
    assert torch.equal(decode_tiled(small, latents, 8, 2), small.decode_latents(latents))
    assert torch.equal(encode_tiled(small, images, noise, 8, 2), small.encode_latents(images, noise))
    assert torch.equal(encode_tiled(small, images, None, 8, 2), small.encode_latents(images))
    made = encode_tiled(small, images[:1], noise, 4, 2)  # one image, two noises
    assert_close(made, encode_tiled(small, images[:1].expand(2, -1, -1, -1), noise, 4, 2))


@torch.no_grad()
def test_every_cell_of_a_tile_is_used_where_it_lies(small: Autoencoder) -> None:
    """Far from the seams a tile's pixels are those of that tile decoded alone."""
    latents = torch.randn(1, 4, 8, 20)
    made = decode_tiled(small, latents, 8, 2)
    assert made.shape == (1, 3, 16, 40)
    assert_close(made[..., :12], small.decode_latents(latents[..., :8])[..., :12], rtol=0, atol=1e-6)
    assert_close(made[..., -12:], small.decode_latents(latents[..., 12:])[..., 4:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_half_precision_stays(small: Autoencoder) -> None:
    made = decode_tiled(small.to(torch.bfloat16), torch.randn(1, 4, 8, 12).bfloat16(), 8, 2)
    assert made.dtype == torch.bfloat16


@torch.no_grad()
def test_of_the_shipped_autoencoder_tiles_are_close_and_closer_with_overlap() -> None:
    autoencoder = open_checkpoint(find_model("emoji")).require("autoencoder").load()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc = ((x**2 + y**2) < 0.6).float()
    image = torch.stack([disc * 1.6 - 0.8, disc * x, (6 * y).sin() * (1 - disc)])[None]  # (1, 3, 128, 128)
    latents = autoencoder.encode_latents(image)
    whole = autoencoder.decode_latents(latents)
    found = {
        overlap: float(psnr(whole, decode_tiled(autoencoder, latents, 16, overlap))) for overlap in (0, 8)
    }
    print(f"\ntiles of 16 of 32 latent cells, shipped autoencoder: PSNR {found} dB against untiled")
    assert found[8] > found[0]
    assert found[8] > 30
    own = float(psnr(image, whole)), float(psnr(image, decode_tiled(autoencoder, latents, 16, 8)))
    assert own[1] > own[0] - 0.5


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (0, 0, "tile must be at least 1 latent cell, got 0"),
        (8, 5, r"overlap of tiles must be between 0 and half a tile \(4\), got 5"),
        (8, -1, "got -1"),
    ],
)
def test_tiles_that_cannot_be(small: Autoencoder, tile: int, overlap: int, message: str) -> None:
    """Also where the picture would fit in one."""
    with pytest.raises(ValueError, match=message):
        decode_tiled(small, torch.randn(1, 4, 4, 4), tile, overlap)
    with pytest.raises(ValueError, match=message):
        encode_tiled(small, torch.randn(1, 3, 8, 8), None, tile, overlap)


def test_images_that_the_factor_does_not_divide(small: Autoencoder) -> None:
    with pytest.raises(ValueError, match="image size 9x8 is not a multiple of the autoencoder's factor 2"):
        encode_tiled(small, torch.randn(1, 3, 8, 9), None, 2, 0)
