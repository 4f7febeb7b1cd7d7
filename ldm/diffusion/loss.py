"""The one training loss of every diffusion model here: distance of the prediction, weighted by level.

Ho et al. 2020 (DDPM, arXiv:2006.11239, eq. 14) for "simple"; Hang et al. 2023 (arXiv:2303.09556) for
"min_snr"; Choi et al. 2022 (arXiv:2204.00227) for "p2"; Karras et al. 2022 (arXiv:2206.00364) for the
weighting "edm" and the lognormal density; Esser et al. 2024 (arXiv:2403.03206, section 3.1) for the
logit-normal one. Pretraining and every kind of fine-tuning draw their own `t` and `noise` (see `noising.py`)
and call `diffusion_loss`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.process import (
    add_noise,
    at_least_float32,
    edm_input,
    edm_target,
    flow_velocity,
    mix,
    per_sample,
    snr,
    velocity,
)
from ldm.diffusion.schedule import DiffusionConfig, Schedule

WEIGHTINGS = ("simple", "min_snr", "soft_min_snr", "p2", "edm")
DENSITIES = ("uniform", "logit_normal", "lognormal")
DISTANCES = ("l2", "l1", "huber")


@dataclass(frozen=True)
class LossConfig:
    """Which noise levels matter how much, and how the distance is taken.

    weighting: "simple" (all ones), or a function of the signal-to-noise ratio, see `x0_weight`.
        min_snr_gamma: gamma > 0 of min_snr and soft_min_snr. p2_k > 0 and p2_gamma >= 0: of p2.
    density: how often each timestep is trained: "uniform"; "logit_normal", where ln(t / (1 - t)) of the
        share t of the way to the last is normal with logit_mean and logit_std > 0: the middle more often; or
        "lognormal", where ln sigma is normal with lognormal_mean and lognormal_std > 0.
    distance: "l2" (squared error), "l1" or "huber", see `distance`. huber_c > 0: from which size of an error
        on huber grows as l1 does.
    Raises ValueError for anything else.
    """

    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    lognormal_mean: float = -1.2
    lognormal_std: float = 1.2
    distance: str = "l2"
    huber_c: float = 0.1

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {self.weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
        if self.density not in DENSITIES:
            raise ValueError(f"density is {self.density!r}, expected one of {', '.join(DENSITIES)}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is {self.distance!r}, expected one of {', '.join(DISTANCES)}")
        for name in ("min_snr_gamma", "p2_k", "huber_c"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.p2_gamma < math.inf:
            raise ValueError(f"p2_gamma must be a number of at least 0, got {self.p2_gamma}")
        for name in ("logit", "lognormal"):
            mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
            if not 0 < std < math.inf or not math.isfinite(mean):
                raise ValueError(f"{name}_mean must be finite and {name}_std above 0, got {mean} and {std}")


def trained_timesteps(t: Int[Tensor, "B"], schedule: Schedule, config: LossConfig) -> Int[Tensor, "B"]:
    """Timesteps of the config's density from t drawn uniformly from 0..T-1, as its quantiles.

    So whoever draws t need not know of densities. lognormal: the timestep nearest (in ln sigma; of a flow in
    its time) to sigma = exp(lognormal_mean + lognormal_std quantile_of_the_normal((t + 1/2) / T)); what lies
    outside the schedule's levels falls on its ends.
    """
    if config.density != "lognormal":
        return by_density(t, schedule.num_timesteps, config)
    normal = torch.special.ndtri((t.double() + 0.5) / schedule.num_timesteps)
    sigma = (config.lognormal_mean + config.lognormal_std * normal).exp()
    return schedule.t(sigma).round().long()


def by_density(t: Int[Tensor, "B"], T: int, config: LossConfig) -> Int[Tensor, "B"]:
    """`trained_timesteps` of the densities that need only the number of timesteps T.

    logit_normal: floor(T sigmoid(logit_mean + logit_std quantile_of_the_normal((t + 1/2) / T))).
    """
    assert config.density != "lognormal"
    if config.density == "uniform":
        return t
    normal = torch.special.ndtri((t.double() + 0.5) / T)
    return (T * (config.logit_mean + config.logit_std * normal).sigmoid()).long().clamp(max=T - 1)


def x0_weight(
    ratio: Float[Tensor, "B"], config: LossConfig, sigma_data: float | int = 1.0
) -> Float[Tensor, "B"]:
    """Weight of |x0 - estimate|^2 at signal-to-noise ratios SNR, whatever is predicted; not for "simple".

    min_snr       min(SNR, gamma)
    soft_min_snr  SNR gamma / (SNR + gamma); k-diffusion's has gamma = 1 / sigma_data^2
    p2            SNR / (k + SNR)^gamma, that is 1 / (k + SNR)^gamma of the error in eps
    edm           (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1 / sigma_data^2
    """
    match config.weighting:
        case "min_snr":
            return ratio.clamp(max=config.min_snr_gamma)
        case "soft_min_snr":
            return ratio / (1 + ratio / config.min_snr_gamma)
        case "p2":
            return ratio / (config.p2_k + ratio) ** config.p2_gamma
        case "edm":
            return ratio + sigma_data**-2
    raise AssertionError(config.weighting)


def loss_weight(
    alpha_bar: Float[Tensor, "B"], prediction: str, config: LossConfig, sigma_data: float | int = 1.0
) -> Float[Tensor, "B"]:
    """Weight of each sample's squared error of the prediction, in alpha_bar's dtype.

    That of x0 divided by how much larger the prediction's squared error is than that of x0, so that all
    predictions minimise the same x0_weight |x0 - estimate|^2:
        x0 1      eps SNR      v SNR + 1      flow (sqrt(SNR) + 1)^2      edm SNR + 1 / sigma_data^2
    For example min(SNR, gamma) / SNR for eps and min_snr, and 1 for "edm" of both kinds. "simple" is 1
    whatever is predicted, and so means different things. Under zero terminal SNR the last timestep has
    SNR = 0 and with min_snr, soft_min_snr and p2 weight 0: "simple" and "edm" train it.
    """
    if config.weighting == "simple":
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    larger = {
        "x0": torch.ones_like(ratio),
        "eps": ratio,
        "v": ratio + 1,
        "flow": (ratio.sqrt() + 1).square(),
        "edm": ratio + sigma_data**-2,
    }
    return x0_weight(ratio, config, sigma_data) / larger[prediction]


def distance(error: Float[Tensor, "B ..."], config: LossConfig) -> Float[Tensor, "B ..."]:
    """Of each element: l2 error^2; l1 |error|; huber 2 c (sqrt(error^2 + c^2) - c).

    huber is the pseudo-Huber form, error^2 far below c and 2 c |error| far above: of each element, as in the
    fine-tuning scripts of kohya and diffusers, where Song & Dhariwal 2023 (arXiv:2310.14189) take the root of
    a whole picture's sum.
    """
    if config.distance == "l1":
        return error.abs()
    if config.distance == "l2":
        return error.square()
    c = config.huber_c
    return 2 * c * error.square() / ((error.square() + c * c).sqrt() + c)  # the difference, uncancelled


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Float[Tensor, "B C h w"],
    t: Int[Tensor, "B"],
    noise: Float[Tensor, "B C h w"],
    schedule: Schedule,
    config: LossConfig,
    *,
    perturbation: Float[Tensor, "B C h w"] | None = None,
    mask: Float[Tensor, "B 1 h w"] | None = None,
) -> Float[Tensor, "B"]:
    """Weighted mean distance of each sample, (B,) in float32 (float64 for float64 latents).

    predict: (x_t, t) -> network output like x_t; what conditions it is already bound.
    x0: clean latents. t: timesteps drawn uniformly from 0..T-1, best on the CPU (the table is there); the
        density of `config` is made of them here. noise: standard normal.
    perturbation: what is added to the noise in x_t but not in the target (Ning et al. 2023).
    mask: the weight of every place, of which the mean is not taken out: a part counts by its size.
    The target is what `schedule.config.prediction` names: noise, velocity, x0, a flow's velocity, or
    `edm_target`. A flow's network is told T times the noise share in place of t. The mean is over C, h, w.
    """
    t = trained_timesteps(t.cpu(), schedule, config)
    alpha_bar = schedule.alpha_bar[t]  # (B,) float64
    put_in = noise if perturbation is None else noise + perturbation
    if schedule.flow:
        time = schedule.time(schedule.sigmas[t])
        x_t, target = mix(x0, put_in, time), flow_velocity(x0, noise)
        told = (schedule.num_timesteps * time).float()
    else:
        x_t, target, told = (
            add_noise(x0, put_in, alpha_bar),
            _target(x0, noise, alpha_bar, schedule.config),
            t,
        )
    sigma_data = schedule.config.sigma_data
    if schedule.config.prediction == "edm":
        x_t = edm_input(x_t, alpha_bar, sigma_data)
    output = predict(x_t, told.to(x0.device))
    error = distance(at_least_float32(output) - at_least_float32(target), config)
    if mask is not None:
        error = mask.to(error) * error
    mean = reduce(error, "B C h w -> B", "mean")
    weight = loss_weight(alpha_bar, schedule.config.prediction, config, sigma_data)
    return per_sample(weight, mean) * mean


def _target(x0: Tensor, noise: Tensor, alpha_bar: Tensor, config: DiffusionConfig) -> Tensor:
    """What the network should say, of every prediction but a flow's."""
    match config.prediction:
        case "eps":
            return noise
        case "v":
            return velocity(x0, noise, alpha_bar)
        case "edm":
            return edm_target(x0, noise, alpha_bar, config.sigma_data)
    assert config.prediction == "x0"
    return x0
