"""What networks read beside their latents: order and range in closed form, then as diffusers and the original
make it; and latents for a second pass. (Image-to-image and inpainting: `sample/test_img2img.py`.)"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from problems import draw
from torch.testing import assert_close

from ldm.diffusion.editing import (
    concatenated,
    depth_channels,
    inpainting_channels,
    instruct_channels,
    instructions,
    masked_picture,
    superresolution_channels,
    upscale_latents,
)
from ldm.diffusion.guidance import instructed

# --- inpainting ---------------------------------------------------------------------------------------------


def test_order_and_range_of_inpainting_channels() -> None:
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[..., :3] = True
    latents = draw(2, 4, 2, 3, dtype=torch.float32)
    made = inpainting_channels(mask, latents, "inpainting")
    assert made.shape == (2, 5, 2, 3)
    assert torch.equal(made[:, 1:], latents)
    assert made[1, 0].tolist() == [[1, 1, 0]] * 2  # the nearest pixel of each cell: the upper left one
    made = inpainting_channels(mask, latents[:, :3], "ldm_inpainting")
    assert made.shape == (2, 4, 2, 3)
    assert torch.equal(made[:, :3], latents[:, :3])
    assert made[1, 3].tolist() == [[1, 1, -1]] * 2


def test_a_mask_of_cells_stays() -> None:
    mask = torch.rand(2, 1, 5, 7) > 0.5
    made = inpainting_channels(mask, torch.zeros(2, 3, 5, 7), "inpainting")
    assert torch.equal(made[:, :1], mask.float())


def test_what_is_under_the_mask_before_encoding() -> None:
    """Grey for Stable Diffusion, which masks in [-1, 1]; black for the paper's model, which masks in [0, 1]."""
    images, mask = torch.rand(2, 3, 4, 4) * 2 - 1, torch.rand(1, 1, 4, 4) > 0.5
    unit = ~mask * (images + 1) / 2  # scripts/inpaint.py: (1 - mask) image, then 2 x - 1
    assert_close(masked_picture(images, mask, "ldm_inpainting"), 2 * unit - 1)
    assert_close(masked_picture(images, mask, "inpainting"), images * ~mask)


def test_other_inpainting_models_are_refused() -> None:
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    for function in (inpainting_channels, masked_picture):
        with pytest.raises(ValueError, match="kind of inpainting model must be one of inpainting, ldm_inp"):
            function(mask=mask, **{"kind": "depth", _second(function): torch.zeros(1, 3, 2, 2)})


def _second(function: object) -> str:
    return "images" if function is masked_picture else "masked_latents"


# --- depth --------------------------------------------------------------------------------------------------


def test_depth_of_a_ramp() -> None:
    """At the latents' own size nothing is interpolated: 2 (d - min) / (max - min + 0.001) - 1."""
    depth = torch.tensor([[0.0, 10.0], [20.0, 40.0]])[None, None]
    expected = torch.tensor([[-1.0, -0.5], [0.0, 1.0]])[None, None]
    made = depth_channels(torch.cat([depth, 3 * depth + 7]), (2, 2))
    assert_close(made, expected.expand(2, -1, -1, -1), rtol=0, atol=1e-4)  # of each picture by itself
    assert float(made[0].max()) == pytest.approx(2 * 40 / 40.001 - 1, abs=1e-7)


def test_depth_as_diffusers() -> None:
    """diffusers leaves out the original's 0.001, which the equation below puts back."""
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionDepth2ImgPipeline as Theirs

    depth, image = draw(2, 96, 64, seed=1, dtype=torch.float32), torch.zeros(2, 3, 96, 64)
    expected = Theirs.prepare_depth_map(
        SimpleNamespace(vae_scale_factor=8), image, depth, 2, False, torch.float32, torch.device("cpu")
    )
    scaled = F.interpolate(depth[:, None], (12, 8), mode="bicubic")
    range_ = scaled.amax((1, 2, 3), keepdim=True) - scaled.amin((1, 2, 3), keepdim=True)
    made = depth_channels(depth[:, None], (12, 8))
    assert made.shape == (2, 1, 12, 8)
    assert_close((made + 1) * (range_ + 0.001) / range_ - 1, expected, rtol=0, atol=1e-6)
    assert_close(depth_channels(1000 * depth[:, None], (12, 8)), expected, rtol=0, atol=1e-5)


def test_flat_depth_is_finite_and_broken_depth_refused() -> None:
    assert torch.equal(depth_channels(torch.full((1, 1, 8, 8), 5.0), (2, 2)), -torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="depth must be finite"):
        depth_channels(torch.full((1, 1, 8, 8), torch.nan), (2, 2))


# --- super-resolution and instructions ----------------------------------------------------------------------


def test_superresolution_channels() -> None:
    low = torch.rand(2, 3, 3, 5) * 2 - 1
    assert torch.equal(superresolution_channels(low), low)
    made = superresolution_channels(low, (4, 8))
    assert torch.equal(made[..., :3, :5], low)
    assert torch.equal(made[..., 3, :5], low[..., 2, :])
    assert torch.equal(made[..., 5:], made[..., 4:5].expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match="a picture of 5x3 does not fit latents of 4x8"):
        superresolution_channels(low, (8, 4))
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got 0 to 255"):
        superresolution_channels(torch.tensor([0.0, 255.0]).expand(1, 3, 2, 2))


def test_instruct_channels_are_unscaled() -> None:
    z = draw(2, 4, 3, 3)
    assert torch.equal(instruct_channels(z), z)
    assert_close(instruct_channels((z - 0.3) * 0.18215, 0.18215, 0.3), z)


def test_instructions_as_diffusers() -> None:
    """One evaluation of [text and image, image, nothing] and the two scales, as its pipeline has them."""

    def network(x, t, context):
        return torch.tanh(x[:, :4] + 0.5 * x[:, 4:] + context.mean(dim=(1, 2))[:, None, None, None])

    def denoise(x, sigma, **conditioning):
        return x - sigma * concatenated(network)(x, torch.zeros(len(x)), **conditioning)

    x, z, text, empty = (
        draw(2, 4, 3, 3),
        draw(2, 4, 3, 3, seed=1),
        draw(2, 5, 6, seed=2),
        draw(2, 5, 6, seed=3),
    )
    three = instructions({"context": text}, {"context": empty}, z)
    made = instructed(denoise, *three, 7.5, 1.5)(x, 2.0)
    inputs = torch.cat([torch.cat([x] * 3), torch.cat([z, z, torch.zeros_like(z)])], dim=1)
    eps_text, eps_image, eps_none = network(inputs, None, torch.cat([text, empty, empty])).chunk(3)
    eps = eps_none + 7.5 * (eps_text - eps_image) + 1.5 * (eps_image - eps_none)
    assert_close(made, x - 2 * eps)


# --- a second pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_upscaled_latents(mode: str) -> None:
    latents = draw(2, 4, 32, 24, dtype=torch.float32)
    made = upscale_latents(latents, (64, 60), mode)
    assert made.shape == (2, 4, 64, 60)
    assert_close(upscale_latents(torch.full((1, 4, 3, 3), 2.5), (7, 5), mode), torch.full((1, 4, 7, 5), 2.5))
    low = {"nearest": 0.97, "bilinear": 0.2, "bicubic": 0.6}[mode]
    assert low < float(made.var()) < 1.03  # of white noise: means of neighbours vary less
    assert torch.equal(upscale_latents(latents, (32, 24), mode), latents)


def test_nearest_is_repetition() -> None:
    latents = draw(1, 4, 3, 2)
    expected = latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(upscale_latents(latents, (6, 4), "nearest"), expected)


def test_antialias_is_of_the_bicubic_filter_and_of_smaller_sides() -> None:
    latents = draw(1, 4, 16, 16, dtype=torch.float32)
    plain, smooth = (upscale_latents(latents, (32, 32), antialias=on) for on in (False, True))
    assert float((plain - smooth).abs().max()) > 0.01
    plain, smooth = (upscale_latents(latents, (32, 32), "bilinear", on) for on in (False, True))
    assert_close(plain, smooth, rtol=0, atol=1e-5)
    plain, smooth = (upscale_latents(latents, (8, 8), "bilinear", on) for on in (False, True))
    assert float(smooth.var()) < float(plain.var())


def test_upscaling_that_cannot_be() -> None:
    latents = draw(1, 4, 4, 4)
    with pytest.raises(ValueError, match="mode of upscaling must be one of nearest, bilinear, bicubic"):
        upscale_latents(latents, (8, 8), "area")
    with pytest.raises(ValueError, match="nearest neighbours have no antialias"):
        upscale_latents(latents, (8, 8), "nearest", True)
    with pytest.raises(ValueError, match="at least 1x1, got 8x0"):
        upscale_latents(latents, (0, 8))
