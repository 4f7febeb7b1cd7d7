"""Samplers that evaluate twice a step and remember nothing: Heun, DPM2, DPM++ 2S, and EDM's with churn.

Second-order Runge-Kutta methods on dx/dsigma = (x - x0) / sigma, in sigma (Heun) or in lambda = -ln sigma
(DPM-Solver, Lu et al. 2022, arXiv:2206.00927 and 2211.01095); the ancestral ones step below the next level
and add noise, as in k-diffusion (Crowson), whose results they equal. The signature and the table are
`samplers.py`'s. A step to level 0 is Euler's: nothing can be evaluated there. So is one from pure noise.
"""

import math
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.step import (
    FAR,
    Noise,
    Step,
    ancestral_levels,
    drawn,
    levels,
    require_at_least_0,
    toward,
)


def heun_step(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    x0: Float[Tensor, "B ..."],
    sigma: float,
    sigma_next: float,
) -> Float[Tensor, "B ..."]:
    """Trapezoid rule with Euler's step as predictor (Karras et al. 2022, algorithm 2, lines 7 to 11)."""
    predicted = toward(x, x0, sigma, sigma_next)
    if sigma_next == 0 or sigma > FAR:
        return predicted
    slope_next = (predicted - denoise(predicted, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * ((x - x0) / sigma + slope_next) / 2


def midpoint_step(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    x0: Float[Tensor, "B ..."],
    sigma: float,
    sigma_next: float,
) -> Float[Tensor, "B ..."]:
    """DPM-Solver-2: the slope at the middle of the step in ln sigma, reached by Euler's step."""
    if sigma_next == 0 or sigma > FAR:
        return toward(x, x0, sigma, sigma_next)
    middle = math.sqrt(sigma * sigma_next)
    at_middle = toward(x, x0, sigma, middle)
    return x + (sigma_next - sigma) * (at_middle - denoise(at_middle, middle)) / middle


def heun(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Heun's method in sigma: EDM's deterministic sampler (Karras et al. 2022, algorithm 1)."""
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        x = heun_step(denoise, x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def dpm2(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1) in k-diffusion's form: the midpoint method."""
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        x = midpoint_step(denoise, x, x0, sigma, sigma_next)
        yield Step(i, sigma_next, x, x0)


def dpm2_ancestral(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
) -> Iterator[Step]:
    """`dpm2` down to sigma_down of `ancestral_levels`, then noise up to sigma_next."""
    require_at_least_0(eta=eta)
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next, eta)
        x = midpoint_step(denoise, x, x0, sigma, sigma_down)
        if sigma_up > 0:
            x = x + sigma_up * drawn(noise, i)
        yield Step(i, sigma_next, x, x0)


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    eta: float | int = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1, r = 1/2), ancestral.

    Where `dpm2` holds the slope of the middle, this one holds x0 of the middle: exact in the linear part.
    """
    require_at_least_0(eta=eta)
    for i, (sigma, sigma_next) in levels(sigmas):
        x0 = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next, eta)
        best = x0
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            best = denoise(toward(x, x0, sigma, middle), middle)
        x = toward(x, best, sigma, sigma_down)
        if sigma_up > 0:
            x = x + sigma_up * drawn(noise, i)
        yield Step(i, sigma_next, x, x0)


MOST_CHURN = math.sqrt(2) - 1  # EDM, algorithm 2: never more new noise than the picture has already


def churned(
    x: Float[Tensor, "B ..."],
    sigma: float,
    gamma: float,
    noise_scale: float | int,
    noise: Noise | None,
    index: int,
) -> tuple[Float[Tensor, "B ..."], float]:
    """x raised to sigma_hat = (1 + gamma) sigma by fresh noise, and sigma_hat (algorithm 2, lines 5, 6)."""
    if gamma == 0:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    spread = noise_scale * (sigma_hat**2 - sigma**2) ** 0.5
    return x + spread * drawn(noise, index), sigma_hat


def edm_heun(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    churn: float | int = 40.0,
    churn_min: float | int = 0.05,
    churn_max: float | int = 50.0,
    noise_scale: float | int = 1.003,
) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 2: each step first raises the level by fresh noise, then is Heun's.

    gamma = min(churn / steps, sqrt(2) - 1) for sigma in [churn_min, churn_max], else 0. The defaults are the
    paper's for ImageNet 64; churn = 0 is `heun`. On the first step the level exceeds the schedule's top,
    where the network is told its last timestep.
    """
    require_at_least_0(churn=churn, churn_min=churn_min, churn_max=churn_max, noise_scale=noise_scale)
    most = min(churn / (len(sigmas) - 1), MOST_CHURN)
    for i, (sigma, sigma_next) in levels(sigmas):
        gamma = most if churn_min <= sigma <= churn_max else 0.0
        x, sigma_hat = churned(x, sigma, gamma, noise_scale, noise, i)
        x0 = denoise(x, sigma_hat)
        x = heun_step(denoise, x, x0, sigma_hat, sigma_next)
        yield Step(i, sigma_next, x, x0)


def edm_euler(
    denoise: Denoise,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "levels"],
    *,
    noise: Noise | None = None,
    churn: float | int = 40.0,
    churn_min: float | int = 0.05,
    churn_max: float | int = 50.0,
    noise_scale: float | int = 1.003,
) -> Iterator[Step]:
    """`edm_heun` without its correction: one evaluation a step; churn = 0 is `euler`."""
    require_at_least_0(churn=churn, churn_min=churn_min, churn_max=churn_max, noise_scale=noise_scale)
    most = min(churn / (len(sigmas) - 1), MOST_CHURN)
    for i, (sigma, sigma_next) in levels(sigmas):
        gamma = most if churn_min <= sigma <= churn_max else 0.0
        x, sigma_hat = churned(x, sigma, gamma, noise_scale, noise, i)
        x0 = denoise(x, sigma_hat)
        x = toward(x, x0, sigma_hat, sigma_next)
        yield Step(i, sigma_next, x, x0)
