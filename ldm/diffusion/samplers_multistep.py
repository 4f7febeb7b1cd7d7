"""Samplers that remember earlier evaluations, and so gain order at one evaluation a step.

PLMS and PNDM (Liu et al. 2022, arXiv:2202.09778), linear multistep in sigma (LMS, Crowson) and in ln sigma
(DEIS, Zhang & Chen 2023, arXiv:2204.13902), DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) and UniPC
(Zhao et al. 2023, arXiv:2302.04867). The signature and the table are `samplers.py`'s. All are deterministic.
`eps` below is the slope (x - x0) / sigma of the path; lambda = -ln sigma. A step from pure
noise is Euler's.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.diffusion.step import FAR, Noise, Step, levels, require_choice, toward

# Adams-Bashforth for equal steps, newest first: PNDM eq. 12 and its lower orders.
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(16)  # of Gauss-Legendre quadrature on [-1, 1]


def pseudo_adams(history: Sequence[Tensor]) -> Tensor:
    """The slope for the next step from those of the last up to four steps, oldest first."""
    recent = history[: -len(ADAMS) - 1 : -1]
    weights = ADAMS[len(recent) - 1]
    return sum((w * eps for w, eps in zip(weights[1:], recent[1:], strict=True)), weights[0] * recent[0])


def plms(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """PNDM without its Runge-Kutta start: the original Stable Diffusion's first sampler.

    The first step averages two slopes (two evaluations), later ones weigh up to four by `ADAMS`. The weights
    are those of equal steps whatever the grid, which is what makes the method a pseudo one: order 2.
    """
    history: list[Tensor] = []
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        history = [*history[-3:], (x - x0) / sigma]
        eps = pseudo_adams(history)
        if i == 0 and sigma_next > 0 and sigma < FAR:
            predicted = x + (sigma_next - sigma) * eps
            eps = (eps + (predicted - denoise(predicted, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * eps if sigma < FAR else toward(x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def pndm(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    schedule: Schedule | None = None,
) -> Iterator[Step]:
    """PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps of four evaluations, then `plms`.

    schedule: whose timesteps the middle of a Runge-Kutta step is counted in; None is Stable Diffusion's.
    """
    schedule = schedule or Schedule(DiffusionConfig())
    history: list[Tensor] = []
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        history = [*history[-3:], (x - x0) / sigma]
        eps = history[-1]
        if i < 3 and sigma_next > 0 and sigma < FAR:
            middle = float(schedule.sigma((schedule.t(sigma) + schedule.t(sigma_next)) / 2))
            slopes = [eps]
            for level in (middle, middle, sigma_next):
                there = x + (level - sigma) * slopes[-1]
                slopes.append((there - denoise(there, level)) / level)
            eps = (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3]) / 6
        elif i >= 3:
            eps = pseudo_adams(history)
        x = x + (sigma_next - sigma) * eps if sigma < FAR else toward(x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def lagrange_weights(
    nodes: Sequence[float], start: float, end: float, scale: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """Integral over sigma, from start to end, of the polynomial in u = scale(sigma) that is 1 at its node.

    For each of the levels in `nodes`; it is 0 at the others. Gauss-Legendre quadrature in u, exact for
    u = sigma and to rounding for u = ln sigma.
    """
    low, high = scale(np.array([start, end]))
    u = (high + low) / 2 + (high - low) / 2 * POINTS
    of_sigma = np.exp(u) if scale is np.log else np.ones_like(u)  # d sigma / d u
    at = scale(np.array(nodes))
    result = []
    for j, node in enumerate(at):
        others = np.delete(at, j)
        value = np.prod((u[:, None] - others) / (node - others), axis=1)
        result.append(float((high - low) / 2 * (WEIGHTS * of_sigma * value).sum()))
    return result


def lms(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    order: int = 4,
) -> Iterator[Step]:
    """Adams-Bashforth in sigma for unequal steps (Crowson's LMS): the slopes' polynomial, integrated."""
    require_choice("order", order, (1, 2, 3, 4))
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        history = [*history, (sigma, (x - x0) / sigma)][-order:]
        if len(history) > 1:
            weights = lagrange_weights([level for level, _ in history], sigma, sigma_next, np.asarray)
            x = x + sum(w * eps for w, (_, eps) in zip(weights, history, strict=True))
        else:
            x = toward(x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def deis(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    order: int = 3,
) -> Iterator[Step]:
    """DEIS (Zhang & Chen 2023, tAB-DEIS) with the slopes' polynomial in ln sigma.

    As in diffusers the order falls to 2 and 1 over the last two of fewer than 15 steps, and is 1 to level 0.
    """
    require_choice("order", order, (1, 2, 3))
    steps = len(sigmas) - 1
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        history = [*history, (sigma, (x - x0) / sigma)][-order:]
        falling = steps - i if steps < 15 else order
        used = history[-min(order, falling) :] if sigma_next > 0 else history[-1:]
        if len(used) > 1:
            weights = lagrange_weights([level for level, _ in used], sigma, sigma_next, np.log)
            x = x + sum(w * eps for w, (_, eps) in zip(weights, used, strict=True))
        else:
            x = toward(x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def dpmpp_2m(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), as in k-diffusion.

    D = (1 + 1/(2r)) x0 - 1/(2r) x0_before, r = h_before / h;  x = sigma_next/sigma x + (1 - e^-h) D
    The first step and the one to level 0 are of first order: D = x0.
    """
    before: tuple[float, Tensor] | None = None
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        best = x0
        if before is not None and sigma_next > 0:
            r = math.log(before[0] / sigma) / math.log(sigma / sigma_next)
            best = x0 + (x0 - before[1]) / (2 * r)
        x = toward(x, best, sigma, sigma_next)
        before = sigma, x0
        yield Step(i, sigma_next, x, x0)


def unipc_update(
    x: Float[Tensor, "B ..."],
    history: Sequence[tuple[float, Tensor]],
    sigma_next: float,
    variant: str,
    x0_next: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    """UniP from the newest level in `history` to sigma_next, or UniC where x0 at sigma_next is known.

    x_next = sigma_next/sigma x + (1 - e^-h) x0 - B(h) sum_m a_m (x0_m - x0) / r_m
    over the older levels m and, in UniC, the next one, with r_m = (lambda_m - lambda) / h. The a_m solve
    sum_m r_m^(k-1) a_m = b_k, k = 1, 2, ...; one alone is 1/2 (Zhao et al. 2023, algorithms 5 to 8, with
    -h for h since x0 is predicted: B(h) = -h, bh1, or e^-h - 1, bh2).
    """
    (sigma, x0), older = history[-1], history[:-1]
    first_order = toward(x, x0, sigma, sigma_next)
    if not older and x0_next is None:
        return first_order
    h = math.log(sigma / sigma_next)
    ratios = [math.log(sigma / level) / h for level, _ in older]
    differences = [(value - x0) / r for (_, value), r in zip(older, ratios, strict=True)]
    if x0_next is not None:
        ratios, differences = [*ratios, 1.0], [*differences, x0_next - x0]
    scale = math.expm1(-h) if variant == "bh2" else -h  # B(h)
    a = np.array([0.5])
    if len(ratios) > 1:
        phi, b = math.expm1(-h) / -h, []  # phi_k, from phi_k+1 = (phi_k - 1/k!) / -h, times -h
        for k in range(1, len(ratios) + 1):
            rest = phi - 1 / math.factorial(k)
            b.append(rest * math.factorial(k) / scale)
            phi = rest / -h
        a = np.linalg.solve(np.vander(ratios, increasing=True).T, np.array(b))
    return first_order - scale * sum(float(w) * each for w, each in zip(a, differences, strict=True))


def unipc(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    order: int = 2,
    variant: str = "bh2",
) -> Iterator[Step]:
    """UniPC of order 1 to 3 predicting x0: each evaluation first corrects the step that led to it (UniC).

    The corrector reuses the evaluation that the next predictor needs, so a step costs one. The order rises
    over the first steps and falls over the last, as in diffusers. variant: B(h), "bh1" or "bh2".
    """
    require_choice("order", order, (1, 2, 3))
    require_choice("variant", variant, ("bh1", "bh2"))
    history: list[tuple[float, Tensor]] = []
    before, used, steps = x, 0, len(sigmas) - 1  # x and the order of the last prediction
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        if i > 0:
            x = unipc_update(before, history[-used:], sigma, variant, x0)
        history = [*history, (sigma, x0)][-order:]
        used = min(order, i + 1, steps - i)
        before = x
        x = unipc_update(before, history[-used:], sigma_next, variant)
        yield Step(i, sigma_next, x, x0)
