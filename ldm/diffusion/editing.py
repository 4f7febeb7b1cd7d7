"""Sampling that starts from a picture: where to start, what to keep, what to tell the network.

Image-to-image is SDEdit (Meng et al. 2022, arXiv:2108.01073): noise a picture to a level between, then
sample from there. Inpainting by a plain model keeps the known latents at every evaluation; inpainting by a
model that was trained for it concatenates mask and masked picture to its input (Rombach et al. 2022, section
4.5). Everything here wraps what `samplers.py` and `denoiser.py` have, so each works with every sampler.
Masks are 1 (True) where the picture is painted anew, 0 where it is kept. Called by `sample/pipeline.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.step import Noise, Step, drawn, levels, require_choice


def cut(steps: int, strength: float | int, exact: bool = False) -> tuple[int, int]:
    """(steps of the whole grid, steps taken at its end) for a strength in [0, 1].

    Without `exact` the grid has `steps` steps and round-half-up(strength steps) of them are taken, at least
    one unless strength is 0. With `exact` all `steps` are taken, at the end of a grid of
    round-half-up(steps / strength). Raises ValueError for a strength outside 0..1, NaN included.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength must be between 0 (the picture as it is) and 1 (all anew), got {strength}"
        )
    if strength == 0:
        return steps, 0
    if exact:
        return half_up(steps / strength), steps
    return steps, max(1, half_up(strength * steps))


def half_up(value: float | int) -> int:
    """Rounded, halves up; 0.29 * 50 = 14.499999999999998 counts as the half it stands for."""
    return math.floor(value + 0.5 + 1e-9)


def slerp(a: Float[Tensor, "B ..."], b: Float[Tensor, "B ..."], share: float | int) -> Float[Tensor, "B ..."]:
    """Spherical interpolation of two noises, picture by picture (Shoemake 1985); a at share 0, b at share 1.

    a sin((1 - share) omega) / sin(omega) + b sin(share omega) / sin(omega),     cos(omega) = a.b / (|a| |b|)
    A mean of two noises has too little variance; this one has that of the two. Raises ValueError for a share
    outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"variation strength must be between 0 and 1, got {share}")
    if share in (0, 1):
        return b if share else a
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b).clamp(-1, 1)  # (B,)
    omega = torch.arccos(cosine)
    near = omega.sin() < 1e-6  # parallel: the formula is 0/0, its limit is linear
    safe = torch.where(near, 1.0, omega.sin())
    of_a = torch.where(near, 1 - share, ((1 - share) * omega).sin() / safe)[:, None]
    of_b = torch.where(near, share, (share * omega).sin() / safe)[:, None]
    return (of_a * flat_a + of_b * flat_b).to(a.dtype).reshape(a.shape)


def keep_known(
    denoise: Denoise,
    known: Float[Tensor, "B C h w"],
    eps: Float[Tensor, "B C h w"],
    mask: Bool[Tensor, "B 1 h w"],
) -> Denoise:
    """A denoiser for which everything outside the mask is known: x0 = known, x = known + sigma eps.

    At each evaluation the kept part of x is set to the known latents at that noise level (with one noise for
    the whole run, so that it lies on one path), and the answer there is `known`. A sampler therefore leaves
    it alone, whatever it remembers or adds between the evaluations.
    """

    def kept(x: Float[Tensor, "B C h w"], sigma: Tensor | float | int) -> Float[Tensor, "B C h w"]:
        level = sigma.reshape(-1, 1, 1, 1).to(x) if isinstance(sigma, Tensor) else sigma
        x0 = denoise(torch.where(mask, x, known + level * eps), sigma)
        return torch.where(mask, x0, known)

    return kept


def concatenated(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A network that takes `channels` as one more keyword and reads [x, channels] as its input."""

    def with_channels(
        x: Float[Tensor, "B C h w"],
        t: Num[Tensor, " B"],
        *,
        channels: Float[Tensor, "B D h w"],
        **more: Any,
    ) -> Float[Tensor, "rows C h w"]:
        return network(torch.cat([x, channels.to(x.dtype)], dim=1), t, **more)  # (B, C + D, h, w)

    return with_channels


def resampled(
    sampler: Callable[..., Iterator[Step]],
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    times: int,
    noise: Noise | None = None,
    **options: Any,
) -> Iterator[Step]:
    """RePaint (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1): each step but the last `times` times.

    Between the repetitions x is noised back up, x <- x + sqrt(sigma^2 - sigma_next^2) noise, so that what is
    painted can fit itself to what is kept. The sampler sees one step at a time and remembers none: a
    multistep method is of first order here. times = 1 is the sampler itself, where that has no memory.
    """
    count = len(sigmas) - 1
    for i, (sigma, sigma_next) in levels(sigmas):
        turns = times if i < count - 1 else 1
        for turn in range(turns):
            number = i + 2 * turn * count  # of its own for each draw, and the sampler's own in the first turn

            def own(_: int, *part: int, number: int = number) -> Tensor:
                return drawn(noise, number, *part)

            *_, step = sampler(denoise, x, sigmas[i : i + 2], noise=own, **options)
            x = step.x
            if turn < turns - 1:
                x = x + (sigma**2 - sigma_next**2) ** 0.5 * drawn(noise, number + count)
        yield replace(step, index=i)


# --- what a network reads beside its latents ----------------------------------------------------------------


def masked_picture(
    images: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "#B 1 H W"], kind: str
) -> Float[Tensor, "B 3 H W"]:
    """The picture that is encoded for a model trained for inpainting, in [-1, 1]: nothing under the mask.

    Under the mask it is grey (0) for Stable Diffusion ("inpainting") and black (-1) for the inpainting model
    of the latent diffusion paper ("ldm_inpainting"). Raises ValueError for another kind.
    """
    return images.masked_fill(mask, 0.0 if _is_stable_diffusion(kind) else -1.0)


def inpainting_channels(
    mask: Bool[Tensor, "#B 1 H W"], masked_latents: Float[Tensor, "B C h w"], kind: str
) -> Float[Tensor, "B D h w"]:
    """What a model trained for inpainting reads beside its latents: D = C + 1 channels.

    "inpainting" (Stable Diffusion): [mask in {0, 1}, masked latents]. "ldm_inpainting" (the model of the
    latent diffusion paper): [masked latents, mask in {-1, 1}]. mask: of pixels, or of cells already; taken at
    the nearest pixel of each cell, as in their training. masked_latents: of `masked_picture`, scaled as the
    latents are. Raises ValueError for another kind.
    """
    size = masked_latents.shape[-2:]
    cells = F.interpolate(mask.to(masked_latents), size).expand(len(masked_latents), -1, -1, -1)
    if _is_stable_diffusion(kind):
        return torch.cat([cells, masked_latents], dim=1)  # (B, 1 + C, h, w)
    return torch.cat([masked_latents, 2 * cells - 1], dim=1)  # (B, C + 1, h, w)


def _is_stable_diffusion(kind: str) -> bool:
    require_choice("kind of inpainting model", kind, ("inpainting", "ldm_inpainting"))
    return kind == "inpainting"


def depth_channels(depth: Float[Tensor, "B 1 H W"], size: tuple[int, int]) -> Float[Tensor, "B 1 h w"]:
    """What Stable Diffusion 2's depth model reads beside its latents: depth in about [-1, 1], at size (h, w).

    2 (d - min) / (max - min + 0.001) - 1 of each picture, after scaling by bicubic interpolation. White is
    near: inverse depth, as MiDaS gives it, in any unit much larger than 0.001. Raises ValueError where a
    value is not finite.
    """
    if not bool(torch.isfinite(depth).all()):
        raise ValueError("depth must be finite, but holds NaN or infinite values")
    scaled = F.interpolate(depth, size, mode="bicubic")  # (B, 1, h, w)
    low, high = scaled.amin((1, 2, 3), keepdim=True), scaled.amax((1, 2, 3), keepdim=True)
    return 2 * (scaled - low) / (high - low + 0.001) - 1


def superresolution_channels(
    low: Float[Tensor, "B 3 H W"], size: tuple[int, int] | None = None
) -> Float[Tensor, "B 3 h w"]:
    """What the latent diffusion paper's super-resolution model reads beside: a small picture in [-1, 1].

    Its pixels are the cells of the latents, of which each becomes `factor` pixels a side. size: (h, w) of the
    latents, where it is not that of the picture; what the picture lacks on the right and at the bottom is
    filled with its edge. Raises ValueError for a picture larger than that, or with values outside [-1, 1].
    """
    height, width = size or low.shape[-2:]
    if height < low.shape[-2] or width < low.shape[-1]:
        raise ValueError(
            f"a picture of {low.shape[-1]}x{low.shape[-2]} does not fit latents of {width}x{height}"
        )
    if not bool((low.abs() <= 1).all()):
        raise ValueError(
            f"the small picture must be in [-1, 1], got {float(low.min()):g} to {float(low.max()):g}"
        )
    return F.pad(low, (0, width - low.shape[-1], 0, height - low.shape[-2]), mode="replicate")


def instruct_channels(
    latents: Float[Tensor, "B C h w"], scale: float | int = 1.0, shift: float | int = 0.0
) -> Float[Tensor, "B C h w"]:
    """What InstructPix2Pix (Brooks et al. 2022, arXiv:2211.09800) reads beside: the picture's own latents.

    Unscaled, the mode of the posterior. latents: unscaled as well, or (z - shift) scale, as `encode_latents`
    gives them without noise, with its autoencoder's `scale_factor` and `shift_factor`. Without the picture,
    for its second guidance, it reads zeros.
    """
    return latents / scale + shift


def instructions(
    text: Mapping[str, Tensor], empty: Mapping[str, Tensor], channels: Float[Tensor, "B C h w"]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The three conditionings of `guidance.instructed`, in its order: text and image, image alone, nothing.

    text, empty: conditioning on the instruction, and on the empty (or negative) prompt.
    """
    nothing = torch.zeros_like(channels)
    return {**text, "channels": channels}, {**empty, "channels": channels}, {**empty, "channels": nothing}


# --- a second pass in high resolution -----------------------------------------------------------------------


def upscale_latents(
    latents: Float[Tensor, "B C h w"],
    size: tuple[int, int],
    mode: str = "bicubic",
    antialias: bool = False,
) -> Float[Tensor, "B C h2 w2"]:
    """Latents brought to size (h2, w2): from these the second pass of two starts, by image-to-image.

    mode: "nearest", "bilinear" or "bicubic"; antialias, for the last two, is Pillow's form of the filter (it
    matters to the bicubic one, and where a side gets smaller). The result is smoother than latents are, as
    a mean of neighbours has less variance: what the second pass is for, at a strength of about 0.5 and more.
    Raises ValueError for another mode, for antialias with "nearest", and for a side below 1.
    """
    require_choice("mode of upscaling", mode, ("nearest", "bilinear", "bicubic"))
    if min(size) < 1:
        raise ValueError(f"the size of latents must be at least 1x1, got {size[1]}x{size[0]}")
    if mode == "nearest":
        if antialias:
            raise ValueError("nearest neighbours have no antialias: take bilinear or bicubic, or none")
        return F.interpolate(latents, size, mode="nearest-exact")
    return F.interpolate(latents, size, mode=mode, antialias=antialias)
