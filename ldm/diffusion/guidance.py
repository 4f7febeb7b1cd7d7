"""Classifier-free guidance: move the denoised picture away from the unconditional one.

Ho & Salimans 2022 (arXiv:2207.12598, eq. 6). A wrapper around `denoiser.Denoiser` that is itself
`denoise(x, sigma) -> x0`, so that samplers do not know of it.
Guiding x0, eps or v is the same thing, since each is linear in the others at a fixed x and sigma.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise

Conditioning = Mapping[
    str, Tensor
]  # keyword arguments of the network (context, y, ...), each with a batch axis first


def classifier_free(
    denoise: Callable[..., Tensor], cond: Conditioning, uncond: Conditioning, scale: float | int
) -> Denoise:
    """uncond + scale (cond - uncond), from one batch [uncond, cond] per step.

    denoise: (x, sigma, **conditioning) -> x0. cond, uncond: the same names and shapes, batch B as x.
    scale: 1 is conditional and 0 unconditional, each with one evaluation of B; above 1 exaggerates the
        prompt, below 0 avoids it.
    Raises ValueError for a scale that is not finite or conditionings that do not match.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")
    if scale in (0, 1):
        only = cond if scale == 1 else uncond
        return lambda x, sigma: denoise(x, sigma, **only)
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"conditional and unconditional inputs differ: {shapes[0]} and {shapes[1]}")
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}  # (2B, ...)

    def guided(x: Float[Tensor, "B C h w"], sigma: Tensor | float | int) -> Float[Tensor, "B C h w"]:
        levels = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
        x0_uncond, x0_cond = denoise(torch.cat([x, x]), levels, **both).chunk(2)
        return x0_uncond + scale * (x0_cond - x0_uncond)

    return guided
