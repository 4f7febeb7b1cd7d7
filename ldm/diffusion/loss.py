"""The one training loss of every diffusion model here: squared error of the prediction, weighted by level.

Ho et al. 2020 (DDPM, arXiv:2006.11239, eq. 14) for "simple"; Hang et al. 2023 (arXiv:2303.09556) for
"min_snr"; Esser et al. 2024 (arXiv:2403.03206, section 3.1) for the logit-normal density of timesteps.
Pretraining and every kind of fine-tuning draw their own `t` and `noise` and call `diffusion_loss`.
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
    flow_velocity,
    mix,
    per_sample,
    snr,
    velocity,
)
from ldm.diffusion.schedule import Schedule

WEIGHTINGS = ("simple", "min_snr")
DENSITIES = ("uniform", "logit_normal")


@dataclass(frozen=True)
class LossConfig:
    """Which noise levels matter how much.

    weighting: "simple" (all ones) or "min_snr". min_snr_gamma: the clip gamma > 0 of min_snr.
    density: how often each timestep is trained: "uniform", or "logit_normal", where ln(t / (1 - t)) of the
        share t of the way to the last is normal with logit_mean and logit_std > 0: the middle more often.
    Raises ValueError for anything else.
    """

    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {self.weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")
        if self.density not in DENSITIES:
            raise ValueError(f"density is {self.density!r}, expected one of {', '.join(DENSITIES)}")
        if not 0 < self.logit_std < math.inf or not math.isfinite(self.logit_mean):
            raise ValueError(
                f"logit_mean must be finite and logit_std above 0, got {self.logit_mean} and {self.logit_std}"
            )


def by_density(t: Int[Tensor, "B"], T: int, config: LossConfig) -> Int[Tensor, "B"]:
    """Timesteps of the config's density from t drawn uniformly from 0..T-1, as its quantiles.

    logit_normal: floor(T sigmoid(logit_mean + logit_std quantile_of_the_normal((t + 1/2) / T))). So whoever
    draws t need not know of densities.
    """
    if config.density == "uniform":
        return t
    normal = torch.special.ndtri((t.double() + 0.5) / T)
    return (T * (config.logit_mean + config.logit_std * normal).sigmoid()).long().clamp(max=T - 1)


def loss_weight(alpha_bar: Float[Tensor, "B"], prediction: str, config: LossConfig) -> Float[Tensor, "B"]:
    """Weight of each sample's squared error, in alpha_bar's dtype.

    min_snr, so that all four predictions minimise min(SNR, gamma) |x0 - estimate|^2:
        x0   min(SNR, gamma)
        eps  min(SNR, gamma) / SNR = min(1, gamma / SNR)
        v    min(SNR, gamma) / (SNR + 1)
        flow min(SNR, gamma) / (sqrt(SNR) + 1)^2
    Under zero terminal SNR the last timestep has SNR = 0 and so weight 0: "simple" is what trains it.
    """
    if config.weighting == "simple":
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    clipped = ratio.clamp(max=config.min_snr_gamma)
    of_flow = (ratio.sqrt() + 1).square()
    shares = {"x0": torch.ones_like(ratio), "eps": ratio, "v": ratio + 1, "flow": of_flow}
    return clipped / shares[prediction]


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Float[Tensor, "B C h w"],
    t: Int[Tensor, "B"],
    noise: Float[Tensor, "B C h w"],
    schedule: Schedule,
    config: LossConfig,
) -> Float[Tensor, "B"]:
    """Weighted mean squared error of each sample, (B,) in float32 (float64 for float64 latents).

    predict: (x_t, t) -> network output like x_t; what conditions it is already bound.
    x0: clean latents. t: timesteps drawn uniformly from 0..T-1, best on the CPU (the table is there); the
        density of `config` is made of them here. noise: standard normal.
    The target is what `schedule.config.prediction` names: noise, velocity, x0 or a flow's velocity. A flow's
    network is told T times the noise share in place of t. The mean is over C, h, w.
    """
    t = by_density(t.cpu(), schedule.num_timesteps, config)
    alpha_bar = schedule.alpha_bar[t]  # (B,) float64
    if schedule.flow:
        time = schedule.time(schedule.sigmas[t])
        x_t, target = mix(x0, noise, time), flow_velocity(x0, noise)
        told = (schedule.num_timesteps * time).float()
    else:
        x_t, told = add_noise(x0, noise, alpha_bar), t
        target = {"eps": noise, "v": velocity(x0, noise, alpha_bar), "x0": x0}[schedule.config.prediction]
    output = predict(x_t, told.to(x0.device))
    weight = loss_weight(alpha_bar, schedule.config.prediction, config)
    error = reduce((at_least_float32(output) - at_least_float32(target)).square(), "B C h w -> B", "mean")
    return per_sample(weight, error) * error
