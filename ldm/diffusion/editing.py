"""Sampling that starts from a picture: where to start, what to keep, what to tell the network.

Image-to-image is SDEdit (Meng et al. 2022, arXiv:2108.01073): noise a picture to a level between, then
sample from there. Inpainting by a plain model keeps the known latents at every evaluation; inpainting by a
model that was trained for it concatenates mask and masked picture to its input (Rombach et al. 2022, section
4.5). Everything here wraps what `samplers.py` and `denoiser.py` have, so each works with every sampler.
Masks are 1 (True) where the picture is painted anew, 0 where it is kept. Called by `sample/pipeline.py`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.step import Noise, Step, drawn, levels


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
        t: Float[Tensor, " B"],
        *,
        channels: Float[Tensor, "B D h w"],
        **more: Any,
    ) -> Float[Tensor, "B C h w"]:
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
