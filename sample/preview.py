"""Previews while sampling: the current x0 estimate as a small picture, without the first stage's decoder.

A previewer turns latents into images. `linear_previewer` is one 1x1 convolution, fitted to the first stage at
hand, and needs no further weights; `tiny_previewer` is the decoder of a tiny autoencoder
(`ldm/models/tiny_autoencoder.py`) trained for the model's latents. `txt2img --preview` calls it between the
steps that `pipeline.stream` yields, with `step.denoised`; nothing here draws noise or changes a picture.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.seeding import generator
from ldm.weights.tiny import load_tiny_decoder
from sample.images import save_grid

# Latents (B, C, h, w), as the diffusion model has them, to images (B, 3, H, W) in [-1, 1], float32 on the CPU
Previewer = Callable[[Tensor], Tensor]

PREVIEW = "preview.png"  # in the folder of the pictures
SIDE = 192  # pixels of the longer side of a picture in the file
PICTURES, PATCHES, CELLS = 4, 3, 8  # of the fit: pictures of 3 x 3 patches, whose latents are 8 x 8


def make_previewer(choice: str, autoencoder: Autoencoder, device: str | torch.device) -> Previewer:
    """The previewer that `--preview` names for a model with this first stage: "linear", or a file.

    Raises FileNotFoundError or ValueError, in one line, as `tiny_previewer` does.
    """
    if choice == "linear":
        return linear_previewer(autoencoder)
    return tiny_previewer(Path(choice).expanduser(), device, autoencoder)


@torch.no_grad()
def linear_previewer(autoencoder: Autoencoder) -> Previewer:
    """A linear map of each latent cell to the mean colour of the pixels under it: images as small as latents.

    Fitted by least squares to what the first stage, of any kind and scale, itself makes of a few seeded
    pictures of coloured patches: RGB of the decoded pixels, averaged over a cell, on the latents and 1.
    """
    weight = next(autoencoder.parameters())
    patches = torch.rand((PICTURES, 3, PATCHES, PATCHES), generator=generator("linear preview")) * 4 - 2
    # Beyond [-1, 1] and clamped, so that pure colours, black and white, which bound what follows, are common.
    pictures = F.interpolate(patches.clamp(-1, 1), size=CELLS * autoencoder.factor, mode="nearest")
    latents = autoencoder.encode_latents(pictures.to(weight))  # (n, C, 8, 8)
    colours = F.avg_pool2d(autoencoder.decode_latents(latents).float().clamp(-1, 1), autoencoder.factor)
    given = F.pad(rearrange(latents, "n c h w -> (n h w) c"), (0, 1), value=1.0)  # (cells, C + 1)
    wanted = rearrange(colours, "n c h w -> (n h w) c")
    # On the CPU and in float64: the solver for ranks that are not full, and one answer for all devices
    found = torch.linalg.lstsq(given.cpu().double(), wanted.cpu().double()).solution.float()  # (C + 1, 3)

    def preview(latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 h w"]:
        colours = torch.einsum("bchw,cd->bdhw", latents.float().cpu(), found[:-1])
        return (colours + found[-1].reshape(3, 1, 1)).clamp(-1, 1)

    return preview


def tiny_previewer(
    path: str | Path, device: str | torch.device = "cpu", autoencoder: Autoencoder | None = None
) -> Previewer:
    """The decoder in the file of a tiny autoencoder; images as large as the first stage's.

    autoencoder: the first stage of the model to preview, which the file must fit. Raises FileNotFoundError,
    or ValueError where the file is damaged, foreign, or for latents of another kind, each in one line.
    """
    decoder = load_tiny_decoder(path).eval().requires_grad_(False).to(device)
    has = (decoder.config.latent_channels, decoder.config.factor)
    if decoder.config.in_channels != 3:
        raise ValueError(f"{path} gives pictures of {decoder.config.in_channels} channels, not of 3")
    if autoencoder is not None and has != (
        wanted := (autoencoder.config.latent_channels, autoencoder.factor)
    ):
        raise ValueError(
            f"{path} is for latents of {has[0]} channels at 1/{has[1]} of the size, this model's have "
            f"{wanted[0]} at 1/{wanted[1]}; --preview linear fits any model"
        )

    @torch.no_grad()
    def preview(latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        return decoder(latents.to(device, torch.float32)).cpu().clamp(-1, 1)

    return preview


def due(index: int, steps: int, every: int) -> bool:
    """Whether step `index` of `steps` is shown: the first, each `every`-th after it, and the last."""
    return index % every == 0 or index == steps - 1


def enlarged(images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
    """Images scaled to a longer side of 192 pixels."""
    height, width = images.shape[-2:]
    scale = SIDE / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def save_preview(images: Float[Tensor, "B 3 H W"], path: Path) -> None:
    """A batch as one grid, enlarged; atomic, over the one before."""
    save_grid(enlarged(images), path)
