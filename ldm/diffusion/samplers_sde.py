"""Samplers of the reverse-time SDE: DPM-Solver++ with noise, as in k-diffusion (Crowson).

With lambda = -ln sigma they solve

    dx = -(1 + eta) (x - x0) dlambda + sigma sqrt(2 eta) dW

exactly for constant x0: over h = ln(sigma / sigma_next) the share e^-(1 + eta)h of x stays and noise of
spread sigma_next sqrt(1 - e^-2 eta h) comes in. eta = 1 is the reverse of the forward process, eta = 0 the
deterministic path (Karras et al. 2022, eq. 6; Lu et al. 2022, arXiv:2211.01095). The signature and the table
are `samplers.py`'s.

k-diffusion takes the noise from a Brownian tree, the increments of one path. Here each interval's increment
is drawn on its own, by (step, part): the same law, since increments over disjoint intervals are independent.
What a tree would add is one path for every number of steps.
"""

import math
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.step import (
    Noise,
    Step,
    ancestral_levels,
    drawn,
    levels,
    require_at_least_0,
    require_choice,
    toward,
)


def dpmpp_sde(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++ SDE, single-step of second order with r = 1/2: two evaluations and two draws a step.

    Part 0 of the noise is the path from sigma to the middle, part 1 from there to sigma_next. Both are of one
    Brownian path in sigma: the whole step's noise is their sum, weighted by the roots of their lengths.
    """
    require_at_least_0(eta=eta)
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = x0
        else:
            middle = math.sqrt(sigma * sigma_next)
            down_middle, up_middle = ancestral_levels(sigma, middle, eta)
            down, up = ancestral_levels(sigma, sigma_next, eta)
            at_middle, whole = toward(x, x0, sigma, down_middle), 0.0
            if eta > 0:
                first, second = drawn(noise, i), drawn(noise, i, 1)
                share = (sigma - middle) / (sigma - sigma_next)
                at_middle = at_middle + up_middle * first
                whole = share**0.5 * first + (1 - share) ** 0.5 * second
            best = denoise(at_middle, middle)
            x = toward(x, best, sigma, down) + up * whole
        yield Step(i, sigma_next, x, x0)


def sde_gain(sigma: float, sigma_next: float, eta: float | int) -> tuple[float, float, float]:
    """(h (1 + eta), e^-h(1 + eta), spread of the noise) of an exact SDE step for constant x0."""
    h = math.log(sigma / sigma_next)
    return h * (1 + eta), math.exp(-h * (1 + eta)), sigma_next * math.sqrt(-math.expm1(-2 * eta * h))


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
    variant: str = "midpoint",
) -> Iterator[Step]:
    """DPM-Solver++(2M) SDE: x0 extrapolated linearly in lambda from the last two evaluations.

    variant: how the extrapolation is integrated, "midpoint" at the step's middle or "heun" exactly. With
    eta = 0 and "midpoint" it is `dpmpp_2m`. The step to level 0 ends at x0.
    """
    require_at_least_0(eta=eta)
    require_choice("variant", variant, ("midpoint", "heun"))
    before: tuple[float, Tensor] | None = None
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = x0
        else:
            h, kept, spread = sde_gain(sigma, sigma_next, eta)
            x = kept * x - math.expm1(-h) * x0
            if before is not None:
                change = (x0 - before[1]) * math.log(sigma / sigma_next) / math.log(before[0] / sigma)
                middle = -math.expm1(-h) / 2
                x = x + (middle if variant == "midpoint" else math.expm1(-h) / h + 1) * change
            if eta > 0:
                x = x + spread * drawn(noise, i)
        before = sigma, x0
        yield Step(i, sigma_next, x, x0)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(3M) SDE: x0 extrapolated by a parabola in lambda from the last three evaluations.

    As in k-diffusion and in DPM-Solver's own code the parabola's bend counts half of what its integral is,
    so with eta = 0 the order is 2. The first steps are of order 1 and 2 ("heun" of `dpmpp_2m_sde`). The step
    to level 0 ends at x0.
    """
    require_at_least_0(eta=eta)
    older: list[tuple[float, Tensor]] = []  # newest first
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            x = x0
        else:
            step = math.log(sigma / sigma_next)
            h, kept, spread = sde_gain(sigma, sigma_next, eta)
            x = kept * x - math.expm1(-h) * x0
            phi_2 = math.expm1(-h) / h + 1
            if older:
                r0 = math.log(older[0][0] / sigma) / step
                slope = (x0 - older[0][1]) / r0
                if len(older) > 1:
                    r1 = math.log(older[1][0] / older[0][0]) / step
                    bend = (slope - (older[0][1] - older[1][1]) / r1) / (r0 + r1)
                    slope = slope + r0 * bend
                    x = x - (phi_2 / h - 0.5) * bend
                x = x + phi_2 * slope
            if eta > 0:
                x = x + spread * drawn(noise, i)
        older = [(sigma, x0), *older[:1]]
        yield Step(i, sigma_next, x, x0)
