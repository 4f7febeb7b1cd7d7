"""Samplers: from noise to a picture along falling noise levels. Each is a generator that yields every step.

All work on x = x0 + sigma eps with `denoise(x, sigma) -> x0` and share one signature:

    denoise   the denoiser, guided or not
    x         start, at level sigmas[0]: `to_sigma_scale(noise, sigmas[0])` for a new picture
    sigmas    (steps + 1,) falling levels, the last may be 0: `grids.make_grid`
    noise     step index -> standard normal noise like x. The caller owns the random generators, one per
              picture, so that the batch size changes no picture. Deterministic samplers never call it. A
              sampler that draws twice a step asks for the second as noise(index, 1).

What a sampler remembers between steps is a local variable; progress bars, previews and early stops are up to
the caller's loop. DDPM and DDIM are written with the alpha_bar of their papers; tests show DDIM = Euler and
DDPM = ancestral Euler. Here are these four, the two for distilled models, and the table of all; the others
are in `samplers_singlestep.py`, `samplers_multistep.py` and `samplers_sde.py`.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import alpha_bar_of, eps_from_x0, posterior, to_alpha_bar_scale, to_sigma_scale
from ldm.diffusion.samplers_multistep import deis, dpmpp_2m, lms, plms, pndm, unipc
from ldm.diffusion.samplers_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from ldm.diffusion.samplers_singlestep import (
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    edm_euler,
    edm_heun,
    heun,
)
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.diffusion.step import (
    Noise,
    Step,
    ancestral_levels,
    drawn,
    levels,
    require_at_least_0,
    toward,
)

__all__ = ["SAMPLERS", "Noise", "Sampler", "Step", "check_options", "drawn", "find_sampler", "levels"]


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
        x = toward(x, x0, sigma, sigma_next)
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

    The two levels are those of `ancestral_levels`. With eta = 1 sigma_down is sigma_next^2 / sigma and the
    step is DDPM's posterior; eta = 0 is Euler.
    """
    require_at_least_0(eta=eta)
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next, eta)
        x = toward(x, x0, sigma, sigma_down)
        if sigma_up > 0:
            x = x + sigma_up * drawn(noise, i)
        yield Step(i, sigma_next, x, x0)


def lcm(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1), as LCM does it.

    Each step jumps to x0 and noises it anew to the next level, for models distilled to do so, in 1 to 8
    steps. The boundary factors c_skip and c_out of LCM (Luo et al. 2023, arXiv:2310.04378) are taken as 0
    and 1, from which they differ by (0.05 / t)^2 at timestep t: 4e-8 in 4 steps.
    """
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        x = x0 + sigma_next * drawn(noise, i) if sigma_next > 0 else x0
        yield Step(i, sigma_next, x, x0)


def tcd(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    gamma: float | int = 0.3,
    schedule: Schedule | None = None,
) -> Iterator[Step]:
    """Trajectory consistency (Zheng et al. 2024, arXiv:2402.19159, algorithm 4), for models distilled so.

    Each step goes along x0 to timestep floor((1 - gamma) t_next), then noises back up to t_next. gamma in
    [0, 1]: 0 is DDIM, 1 about `lcm`. schedule: whose timesteps are counted; None is Stable Diffusion's.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
    schedule = schedule or Schedule(DiffusionConfig())
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        t_down = math.floor((1 - gamma) * float(schedule.t(sigma_next))) if sigma_next > 0 else 0
        # a step to level 0 has nowhere further to go; nor has one to timestep 0 or, without gamma, any
        sigma_down = min(sigma_next, float(schedule.sigma(t_down))) if gamma > 0 else sigma_next
        x = toward(x, x0, sigma, sigma_down)
        if sigma_down < sigma_next:
            x = x + (sigma_next**2 - sigma_down**2) ** 0.5 * drawn(noise, i)
        yield Step(i, sigma_next, x, x0)


class Sampler(NamedTuple):
    """A row of the table: the function, its usual grid (`grids.GRIDS`), whether it draws noise by default."""

    function: Callable[..., Iterator[Step]]
    spacing: str
    stochastic: bool


SAMPLERS = {
    "ddpm": Sampler(ddpm, "trailing", True),
    "ddim": Sampler(ddim, "compvis", False),
    "plms": Sampler(plms, "compvis", False),
    "pndm": Sampler(pndm, "compvis", False),
    "euler": Sampler(euler, "linspace", False),
    "euler_ancestral": Sampler(euler_ancestral, "linspace", True),
    "heun": Sampler(heun, "uniform", False),
    "dpm2": Sampler(dpm2, "karras", False),
    "dpm2_ancestral": Sampler(dpm2_ancestral, "karras", True),
    "lms": Sampler(lms, "uniform", False),
    "dpmpp_2s_ancestral": Sampler(dpmpp_2s_ancestral, "karras", True),
    "dpmpp_2m": Sampler(dpmpp_2m, "karras", False),
    "dpmpp_sde": Sampler(dpmpp_sde, "karras", True),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "exponential", True),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, "exponential", True),
    "unipc": Sampler(unipc, "linspace", False),
    "deis": Sampler(deis, "linspace", False),
    "edm_euler": Sampler(edm_euler, "karras", True),
    "edm_heun": Sampler(edm_heun, "karras", True),
    "lcm": Sampler(lcm, "lcm", True),
    "tcd": Sampler(tcd, "lcm", True),
}


def find_sampler(name: str) -> Sampler:
    """The row of SAMPLERS with this name. Raises ValueError that suggests the nearest names."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    near = difflib.get_close_matches(name, SAMPLERS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SAMPLERS)}"
    raise ValueError(f"unknown sampler {name!r}: {hint}")


def own_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a sampler that a user sets, by name: all but `noise` and `schedule`."""
    parameters = inspect.signature(find_sampler(name).function).parameters.values()
    given = ("noise", "schedule")
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises ValueError for the first option that the sampler does not have or that is of another type."""
    own = own_options(name)
    for option, value in options.items():
        if option not in own:
            has = f"it has {', '.join(own)}" if own else "it has no options"
            raise ValueError(f"sampler {name} has no {option}: {has}")
        kinds = {float: (int, float), int: (int,), str: (str,)}[type(own[option].default)]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{option} of sampler {name} must be like {own[option].default}, got {value!r}")
