"""Sigma grids: the noise levels that a sampling run visits, whatever the sampler.

A grid is a function (schedule, steps) -> falling float64 levels (steps + 1,), from the model's highest level
(or just below it) to 0, for any number of steps from 1 to T. `GRIDS` is the table, `make_grid` the way in.
The first four rows count timesteps (`schedule.timesteps`); the others are those of k-diffusion (Crowson), web
interfaces and papers. Called by `sample/pipeline.py` with the sampler's usual grid or the user's.
"""

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import SPACINGS, Schedule, flow_sigma, sigma_grid

Grid = Callable[..., Tensor]

# Sabour et al. 2024 (arXiv:2404.14507), the ten-step schedule found for Stable Diffusion 1.5.
ALIGNED_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
LCM_STEPS = 50  # timesteps that latent consistency models are distilled on


def to_zero(levels: Tensor) -> Tensor:
    """Levels and a last 0."""
    return torch.cat([levels, levels.new_zeros(1)])


def at_timesteps(schedule: Schedule, steps: int, *, spacing: str) -> Float[Tensor, "levels"]:
    """The levels of `schedule.timesteps`."""
    return sigma_grid(schedule, spacing, steps)


def uniform(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """linspace(T - 1, 0, steps) timesteps, unrounded: k-diffusion's `get_sigmas`, ComfyUI's "normal"."""
    return to_zero(schedule.sigma(torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64)))


def sgm_uniform(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """linspace(T - 1, 0, steps + 1) timesteps without the last: even steps in t, the last one to level 0."""
    t = torch.linspace(schedule.num_timesteps - 1, 0, steps + 1, dtype=torch.float64)
    return to_zero(schedule.sigma(t[:-1]))


def ddim_uniform(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """The levels of "compvis", but to 0: ComfyUI's grid of this name where steps divides T.

    So also what diffusers' Euler visits with Stable Diffusion's settings ("leading", offset 1).
    """
    return to_zero(sigma_grid(schedule, "compvis", steps)[:steps])


def flow(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """Equal steps of a rectified flow's time from 1 to 0, before its shift (Liu et al. 2022, section 2.1)."""
    time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return to_zero(flow_sigma(time, schedule.config.shift))


def simple(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """Every (T / steps)-th of the schedule's levels, counted from the highest, rounded down (ComfyUI)."""
    T = schedule.num_timesteps
    return to_zero(schedule.sigmas[T - 1 - torch.tensor([int(i * (T / steps)) for i in range(steps)])])


def ends(schedule: Schedule) -> tuple[float, float]:
    """The lowest and the highest level of a schedule."""
    return float(schedule.sigmas[0]), float(schedule.sigmas[-1])


def ramp(steps: int) -> Tensor:
    """0 to 1 in `steps` values; one step is 0."""
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def karras(schedule: Schedule, steps: int, *, rho: float | int = 7.0) -> Float[Tensor, "levels"]:
    """Equal steps of sigma^(1/rho) between the model's ends (Karras et al. 2022, eq. 5), then 0."""
    low, high = (end ** (1 / rho) for end in ends(schedule))
    return to_zero((high + ramp(steps) * (low - high)) ** rho)


def exponential(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """Equal steps of ln sigma between the model's ends, then 0."""
    return polyexponential(schedule, steps, rho=1.0)


def polyexponential(schedule: Schedule, steps: int, *, rho: float | int = 1.0) -> Float[Tensor, "levels"]:
    """ln sigma falling as ramp^rho between the model's ends, then 0: finer where rho > 1 below, < 1 above."""
    low, high = (math.log(end) for end in ends(schedule))
    return to_zero(((1 - ramp(steps)) ** rho * (high - low) + low).exp())


def kl_optimal(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """Equal steps of arctan(sigma) between the model's ends, then 0.

    Sabour et al. 2024 (arXiv:2404.14507): least in their bound on the KL divergence where data are Gaussian.
    """
    low, high = (math.atan(end) for end in ends(schedule))
    levels = (high + ramp(steps) * (low - high)).tan()
    levels[0] = schedule.sigmas[-1]  # which tan(arctan) of a flow's highest level misses by rounding
    return to_zero(levels)


def beta_quantile(p: Float[Tensor, "steps"], a: float | int) -> Float[Tensor, "steps"]:
    """Inverse of the symmetric beta distribution's cumulative function, alpha = beta = a, float64.

    The cumulative function up to 1/2 is x^a sum_n (1 - a)_n x^n / (n! (a + n)), halved by its value at 1/2;
    above, it is mirrored. Inverted by bisection.
    """
    n = torch.arange(64, dtype=torch.float64)
    terms = torch.cat([torch.ones(1, dtype=torch.float64), ((n - a + 1) / (n + 1)).cumprod(0)[:-1]]) / (a + n)

    def below_half(x: Tensor) -> Tensor:
        return x**a * (terms * x[:, None] ** n).sum(1)

    share = torch.minimum(p, 1 - p) * 2 * below_half(torch.full((1,), 0.5, dtype=torch.float64))
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        under = below_half(middle) < share
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return torch.where(p < 0.5, low, 1 - low)


def beta(schedule: Schedule, steps: int, *, rho: float | int = 0.6) -> Float[Tensor, "levels"]:
    """Quantiles of a beta distribution between the model's ends (Lee et al. 2024, arXiv:2407.12173), then 0.

    sigma_min + (sigma_max - sigma_min) quantile(1 - ramp), alpha = beta = rho: dense at both ends. Quantiles
    of sigma, as A1111 and diffusers do; the paper and ComfyUI take those of the timestep.
    """
    low, high = ends(schedule)
    return to_zero(low + beta_quantile(1 - ramp(steps), rho) * (high - low))


def align_your_steps(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """Levels found for Stable Diffusion 1.5 (Sabour et al. 2024), between them linear in ln sigma, then 0.

    Raises ValueError for a model of other noise levels.
    """
    low, high = ends(schedule)
    if abs(high / ALIGNED_SD15[0] - 1) > 0.01 or abs(low / ALIGNED_SD15[-1] - 1) > 0.01:
        raise ValueError(
            "schedule align_your_steps is made for noise levels 0.029 to 14.615 (Stable Diffusion 1.5); "
            f"this model's are {low:.3f} to {high:.3f}"
        )
    anchors = np.linspace(0, 1, len(ALIGNED_SD15))
    return to_zero(torch.from_numpy(np.exp(np.interp(ramp(steps).numpy(), anchors, np.log(ALIGNED_SD15)))))


def lcm(schedule: Schedule, steps: int) -> Float[Tensor, "levels"]:
    """For latent consistency models: evenly among the 50 timesteps they were distilled on, from the highest.

    Four steps of a thousand visit 999, 759, 499, 259. Beyond 50 steps it is "trailing".
    """
    T = schedule.num_timesteps
    if steps > LCM_STEPS or T % LCM_STEPS:
        return sigma_grid(schedule, "trailing", steps)
    index = torch.tensor([LCM_STEPS - i * LCM_STEPS // steps for i in range(steps)])
    return to_zero(schedule.sigmas[index * (T // LCM_STEPS) - 1])


GRIDS: dict[str, Grid] = {
    **{spacing: partial(at_timesteps, spacing=spacing) for spacing in SPACINGS},
    "uniform": uniform,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
    "simple": simple,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "align_your_steps": align_your_steps,
    "lcm": lcm,
    "flow": flow,
}
# Grids that may start below the model's highest level: not for a model trained down to pure noise.
STARTS_BELOW = ("compvis", "leading", "ddim_uniform", "align_your_steps")
# Grids that divide the way from the highest level: a flow's stands for infinity, which is not divided.
FROM_A_FINITE_TOP = ("karras", "exponential", "polyexponential", "beta")


def usual_grid(schedule: Schedule, spacing: str) -> str:
    """The grid of a sampler whose usual one is `spacing`, on this model.

    A flow has its own, and a zero-terminal-SNR model must be started from pure noise (Lin et al. 2023,
    section 3.3).
    """
    return "flow" if schedule.flow else "trailing" if schedule.pure else spacing


def make_grid(schedule: Schedule, name: str, steps: int) -> Float[Tensor, "levels"]:
    """Falling float64 levels (steps + 1,) of the grid NAME, or NAME:RHO where it has a rho.

    Raises ValueError for an unknown name (with the nearest ones), a rho that is not a positive number or not
    the grid's to have, steps outside 1..T, and for a grid that does not fit the model: one that starts below
    the pure noise of a zero-terminal-SNR model or a flow, that cannot start there, or that is for others.
    """
    plain, _, rho = name.partition(":")
    if plain not in GRIDS:
        near = difflib.get_close_matches(plain, GRIDS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GRIDS)}"
        raise ValueError(f"unknown schedule {plain!r}: {hint}")
    if not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(f"steps must be between 1 and {schedule.num_timesteps}, got {steps}")
    if schedule.pure and plain in STARTS_BELOW:
        kind = "flow" if schedule.flow else "zero-terminal-SNR"
        raise ValueError(
            f"schedule {plain} starts below pure noise, where this {kind} model must be started; "
            f"take {usual_grid(schedule, plain)}"
        )
    if schedule.flow and plain in FROM_A_FINITE_TOP:
        raise ValueError(
            f"schedule {plain} needs a highest noise level, which this flow model does not have; take flow"
        )
    if plain == "flow" and not schedule.flow:
        raise ValueError("schedule flow is for flow models, which this is not; take sgm_uniform or trailing")
    return GRIDS[plain](schedule, steps, **rho_option(plain, rho))


def rho_option(name: str, rho: str) -> dict[str, float]:
    """The option rho of a grid from its text, none where that is empty. Raises ValueError as `make_grid`."""
    if not rho:
        return {}
    if "rho" not in inspect.signature(GRIDS[name]).parameters:
        raise ValueError(f"schedule {name} has no rho, got {rho!r}")
    try:
        value = float(rho)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"rho of schedule {name} must be a positive number, got {rho!r}")
    return {"rho": value}
