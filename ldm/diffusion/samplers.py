"""Samplers: from noise to a picture along falling noise levels. Each is a generator that yields every step.

All work on x = x0 + sigma eps with `denoise(x, sigma) -> x0` and share one signature:

    denoise   the denoiser, guided or not
    x         start, at level sigmas[0]: `to_sigma_scale(noise, sigmas[0])` for a new picture
    sigmas    (steps + 1,) falling levels, the last may be 0: `schedule.sigma_grid`
    noise     step index -> standard normal noise like x. The caller owns the random generators, one per
              picture, so that the batch size changes no picture. Deterministic samplers never call it.

What a sampler remembers between steps is a local variable; progress bars, previews and early stops are up to
the caller's loop. DDPM and DDIM are written with the alpha_bar of their papers; tests show DDIM = Euler and
DDPM = ancestral Euler.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import alpha_bar_of, eps_from_x0, posterior, to_alpha_bar_scale, to_sigma_scale

Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Step:
    """After step `index`: x at level `sigma` (= sigmas[index + 1]) and the x0 estimate that led to it."""

    index: int
    sigma: float
    x: Float[Tensor, "B ..."]
    denoised: Float[Tensor, "B ..."]

    @property
    def sample(self) -> Float[Tensor, "B ..."]:
        """x in the scale of the network and the decoder, sqrt(alpha_bar) x; x itself where sigma is 0."""
        return to_alpha_bar_scale(self.x, self.sigma)


def levels(sigmas: Float[Tensor, "levels"]) -> Iterator[tuple[int, tuple[float, float]]]:
    """(index, (sigma, sigma_next)) of each step, as Python numbers: double precision on every device."""
    return enumerate(pairwise(sigmas.tolist()))


def drawn(noise: Noise | None, index: int) -> Tensor:
    """Noise of a step. Raises ValueError where the sampler needs noise and the caller gave none."""
    if noise is None:
        raise ValueError(
            "this sampler draws noise: pass noise=, a function from the step index to noise like x"
        )
    return noise(index)


def ddpm(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Ho et al. 2020 (DDPM), algorithm 2: x_prev drawn from q(x_prev | x_t, x0), posterior variance."""
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        x_t = to_alpha_bar_scale(x, sigma)
        mean, variance = posterior(x_t, x0, alpha_bar_of(sigma), alpha_bar_of(sigma_next))
        x_prev = mean + variance**0.5 * drawn(noise, i) if variance > 0 else mean
        x = to_sigma_scale(x_prev, sigma_next)
        yield Step(i, sigma_next, x, x0)


def ddim(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 0.0,
) -> Iterator[Step]:
    """Song et al. 2021 (DDIM, arXiv:2010.02502), eq. 12. eta in [0, 1]: 0 is deterministic, 1 is DDPM.

    sigma_t = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev)
    x_prev = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - sigma_t^2) eps + sigma_t noise
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    for i, (sigma, sigma_next) in levels(sigmas):
        alpha_bar, alpha_bar_prev = alpha_bar_of(sigma), alpha_bar_of(sigma_next)
        x0 = denoise(x, sigma)
        eps = eps_from_x0(to_alpha_bar_scale(x, sigma), x0, alpha_bar)
        sigma_t = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
        x_prev = alpha_bar_prev**0.5 * x0 + max(1 - alpha_bar_prev - sigma_t**2, 0.0) ** 0.5 * eps
        if sigma_t > 0:
            x_prev = x_prev + sigma_t * drawn(noise, i)
        x = to_sigma_scale(x_prev, sigma_next)
        yield Step(i, sigma_next, x, x0)


def euler(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, alg. 1 without its correction)."""
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        x = x + (sigma_next - sigma) * (x - x0) / sigma
        yield Step(i, sigma_next, x, x0)


def euler_ancestral(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
) -> Iterator[Step]:
    """Euler down to sigma_down, then noise back up to sigma_next (Crowson, k-diffusion).

    sigma_up = min(sigma_next, eta sigma_next sqrt(sigma^2 - sigma_next^2) / sigma)
    sigma_down = sqrt(sigma_next^2 - sigma_up^2)
    With eta = 1 sigma_down is sigma_next^2 / sigma and the step is DDPM's posterior; eta = 0 is Euler.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        sigma_up = min(sigma_next, eta * sigma_next * (sigma**2 - sigma_next**2) ** 0.5 / sigma)
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        x = x + (sigma_down - sigma) * (x - x0) / sigma
        if sigma_up > 0:
            x = x + sigma_up * drawn(noise, i)
        yield Step(i, sigma_next, x, x0)


class Sampler(NamedTuple):
    """A row of the table: the function, its usual timestep spacing, whether it draws noise by default."""

    function: Callable[..., Iterator[Step]]
    spacing: str
    stochastic: bool


SAMPLERS = {
    "ddpm": Sampler(ddpm, "trailing", True),
    "ddim": Sampler(ddim, "compvis", False),
    "euler": Sampler(euler, "linspace", False),
    "euler_ancestral": Sampler(euler_ancestral, "linspace", True),
}


def find_sampler(name: str) -> Sampler:
    """The row of SAMPLERS with this name. Raises ValueError that suggests the nearest names."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    near = difflib.get_close_matches(name, SAMPLERS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SAMPLERS)}"
    raise ValueError(f"unknown sampler {name!r}: {hint}")
