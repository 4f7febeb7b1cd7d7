"""What sampling starts from besides noise: pictures, masks, and channels that a UNet reads besides latents.

`start` prepares it for a batch, `stream.py` uses it. A UNet trained for inpainting reads mask and masked
picture; with any other the latents outside the mask are kept at each step (`ldm/diffusion/editing.py`).
What other models read, depth or a picture, is made here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.diffusion.editing import (
    cut,
    depth_channels,
    inpainting_channels,
    instruct_channels,
    masked_picture,
    superresolution_channels,
)
from ldm.diffusion.process import add_noise
from sample.extra_channels import EXTRAS, extra_of
from sample.parts import Parts
from sample.settings import Sampling, Variation

MAX_NOISE_LEVEL = 350  # of the small picture, in training Stable Diffusion's upscaler


@dataclass(frozen=True)
class Start:
    """What a batch starts from and keeps, from `Pipeline.start`: one picture a prompt.

    latents: of the pictures; None is noise alone. strength, exact_steps: how much of the way is taken, see
    `editing.cut`. mask: for a plain model, where it paints anew; elsewhere the latents are kept. channels:
    what the UNet reads besides, see `extra_channels.py`. noise_level: of the small picture among them, which
    an upscaler is told. resample: see `editing.resampled`.
    """

    latents: Float[Tensor, "B C h w"] | None = None
    strength: float | int = 1.0
    exact_steps: bool = False
    mask: Bool[Tensor, "B 1 h w"] | None = None
    channels: Float[Tensor, "B D h w"] | None = None
    noise_level: int | None = None
    resample: int = 1

    def told(self, pictures: int) -> dict[str, Tensor]:
        """What the network is told of `pictures` rows besides prompts: keywords of a denoiser."""
        level = None if self.noise_level is None else torch.full((pictures,), self.noise_level)
        return {
            name: value for name, value in (("channels", self.channels), ("y", level)) if value is not None
        }

    def steps(self, steps: int) -> int:
        """How many steps will be taken where `steps` are asked for."""
        return cut(steps, self.strength, self.exact_steps)[1]

    def grid(self, steps: int, timesteps: int) -> tuple[int, int]:
        """(steps of the whole grid, steps taken). Raises ValueError where the model has too few timesteps."""
        whole, taken = cut(steps, self.strength, self.exact_steps)
        if self.exact_steps and whole > timesteps >= steps:
            raise ValueError(
                f"{steps} exact steps at strength {self.strength:g} are the end of {whole} steps, and the "
                f"model has {timesteps} timesteps; take fewer steps, more strength or no exact steps"
            )
        return whole, taken

    def rows(self, rows: Sequence[int]) -> "Start":
        """The same for some of the pictures."""
        chosen = list(rows)
        parts = {name: getattr(self, name) for name in ("latents", "mask", "channels")}
        return replace(self, **{name: part[chosen] for name, part in parts.items() if part is not None})


def reads(parts: Parts) -> str | None:
    """What the UNet reads besides its latents, a key of `EXTRAS`; None where that is nothing."""
    return extra_of(parts.unet.config, parts.autoencoder.config)


def require_reads(parts: Parts, kind: str) -> None:
    """Raises ValueError where the UNet does not read what `EXTRAS[kind]` says."""
    if (has := reads(parts)) != kind:
        raise ValueError(
            f"this model does not read {EXTRAS[kind].what} besides its latents: it reads "
            f"{EXTRAS[has].what if has else 'nothing'}"
        )


def paints(kind: str | None) -> bool:
    """Whether a model reads a mask and what is around it."""
    return kind in ("inpainting", "ldm_inpainting")


def start(
    parts: Parts,
    images: Float[Tensor, "M 3 H W"],
    numbers: Sequence[int],
    *,
    mask: Bool[Tensor, "1 Hm Wm"] | None = None,
    strength: float | int = 1.0,
    exact_steps: bool = False,
    resample: int = 1,
    seed: int = 0,
    variation: Variation | None = None,
) -> Start:
    """What `stream` starts the pictures `numbers` from: images in [-1, 1], one a number or one for all.

    mask: True where to paint anew. Raises ValueError for a mask of another size than the images, a
    strength outside 0..1, resample below 1, and as `encode`.
    """
    cut(1, strength)  # before the work
    if resample < 1:
        raise ValueError(f"resample must be at least 1 (each step once), got {resample}")
    latents = parts.encode(images, seed, numbers, variation=variation)
    given = Start(latents, strength, exact_steps, resample=resample)
    if mask is None:
        return given
    if mask.shape[-2:] != images.shape[-2:]:
        sizes = [f"{each.shape[-1]}x{each.shape[-2]}" for each in (mask, images)]
        raise ValueError(f"the mask is {sizes[0]}, the picture {sizes[1]}; they must be of one size")
    if paints(reads(parts)):
        return replace(given, channels=mask_channels(parts, images, mask, seed, numbers, variation))
    # A cell is painted anew where any of its pixels is to be: what is white must be able to change.
    cells = F.max_pool2d(mask[None].float(), parts.autoencoder.factor) > 0  # (1, 1, h, w)
    return replace(given, mask=cells.expand(len(numbers), -1, -1, -1).to(parts.device))


def mask_channels(
    parts: Parts,
    images: Float[Tensor, "M 3 H W"],
    mask: Bool[Tensor, "1 H W"],
    seed: int,
    numbers: Sequence[int],
    variation: Variation | None = None,
) -> Float[Tensor, "B D h w"]:
    """Mask and latents of the pictures without what is under it, as a model for inpainting reads them."""
    kind = reads(parts)
    assert kind is not None, "a model for inpainting"
    masked = parts.encode(masked_picture(images, mask[None], kind), seed, numbers, "masked", variation)
    return inpainting_channels(mask[None].to(masked.device), masked, kind)  # (B, 1 + C, h, w)


def require_upscaler(parts: Parts, level: int) -> None:
    """Raises ValueError where the UNet reads no small picture, or none with so much noise."""
    if reads(parts) != "upscaler":
        require_reads(parts, "superresolution")
    elif not 0 <= level <= MAX_NOISE_LEVEL:
        raise ValueError(f"--noise-level must be between 0 and {MAX_NOISE_LEVEL}, got {level}")


def upscaling(
    parts: Parts, low: Float[Tensor, "1 3 h w"], level: int, seed: int, numbers: Sequence[int]
) -> Start:
    """From a small picture in [-1, 1] of the latents' size; the caller has called `require_upscaler`.

    level: how much noise an upscaler sees the picture through and is told of, in timesteps 0..350 (it was
    trained on no more); without effect on a model that is told nothing. Noise conditioning augmentation, Ho
    et al. 2021, arXiv:2106.15282, section 4.2; Stable Diffusion's has one schedule for both noises.
    """
    if reads(parts) != "upscaler":
        return Start(channels=picture_channels(parts, low, numbers))
    x0 = superresolution_channels(low).to(parts.device).expand(len(numbers), -1, -1, -1)
    noise = parts.draw("low", tuple(x0.shape[1:]), seed, numbers)
    return Start(channels=add_noise(x0, noise, parts.schedule.alpha_bar[level]), noise_level=level)


def picture_channels(
    parts: Parts, images: Float[Tensor, "1 3 H W"], numbers: Sequence[int]
) -> Float[Tensor, "B D h w"]:
    """A picture in [-1, 1] as InstructPix2Pix reads it, or at the latents' size the super-resolution model;
    the caller has seen to it that the model is one of these (`require_reads`)."""
    if reads(parts) == "superresolution":
        channels = superresolution_channels(images)
    else:
        weight = parts.autoencoder.post_quant_conv.weight
        channels = instruct_channels(parts.autoencoder.encode(images.to(weight)).mode().float())
    return channels.to(parts.device).expand(len(numbers), -1, -1, -1)


def depth_start(
    parts: Parts,
    depth: Float[Tensor, "1 H W"],
    size: tuple[int, int] | None,
    start: Start,
    numbers: Sequence[int],
) -> Start:
    """`start` of pictures of `size` (W, H) with depth, white near. Raises ValueError where none is read."""
    require_reads(parts, "depth")
    channels = depth_channels(depth[None], parts.latent_shape(size)[1:])
    return replace(start, channels=channels.to(parts.device).expand(len(numbers), -1, -1, -1))


def with_channels(
    parts: Parts, start: Start, shape: tuple[int, ...], sampling: Sampling, numbers: Sequence[int]
) -> Start:
    """`start` with the channels that the UNet reads besides: where there is no picture, all is to be painted.

    Raises ValueError where it reads what only a command can give it.
    """
    kind = reads(parts)
    if kind is None or start.channels is not None:
        return start
    if not paints(kind):
        extra = EXTRAS[kind]
        raise ValueError(
            f"this UNet reads {extra.what} besides the latents, which a prompt alone does not give: use "
            f"ldm-sample {extra.command}"
        )
    height, width = (side * parts.autoencoder.factor for side in shape[1:])
    grey, everywhere = torch.zeros(1, 3, height, width), torch.ones(1, height, width, dtype=torch.bool)
    channels = mask_channels(parts, grey, everywhere, sampling.seed, numbers, sampling.variation)
    return replace(start, channels=channels)
