"""The one training loss of every diffusion model here: squared error of the prediction, weighted by level.

Ho et al. 2020 (DDPM, arXiv:2006.11239, eq. 14) for "simple"; Hang et al. 2023 (arXiv:2303.09556) for
"min_snr". Pretraining and every kind of fine-tuning draw their own `t` and `noise` and call `diffusion_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.process import add_noise, at_least_float32, per_sample, snr, velocity
from ldm.diffusion.schedule import Schedule

WEIGHTINGS = ("simple", "min_snr")


@dataclass(frozen=True)
class LossConfig:
    """Which noise levels matter how much.

    weighting: "simple" (all ones) or "min_snr". min_snr_gamma: the clip gamma > 0 of min_snr.
    Raises ValueError for anything else.
    """

    weighting: str = "simple"
    min_snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {self.weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")


def loss_weight(alpha_bar: Float[Tensor, "B"], prediction: str, config: LossConfig) -> Float[Tensor, "B"]:
    """Weight of each sample's squared error, in alpha_bar's dtype.

    min_snr, so that all three predictions minimise min(SNR, gamma) |x0 - estimate|^2:
        x0   min(SNR, gamma)
        eps  min(SNR, gamma) / SNR = min(1, gamma / SNR)
        v    min(SNR, gamma) / (SNR + 1)
    Under zero terminal SNR the last timestep has SNR = 0 and so weight 0: "simple" is what trains it.
    """
    if config.weighting == "simple":
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    clipped = ratio.clamp(max=config.min_snr_gamma)
    return {"x0": clipped, "eps": clipped / ratio, "v": clipped / (ratio + 1)}[prediction]


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
    x0: clean latents. t: timesteps in 0..T-1, best on the CPU (the table is there). noise: standard normal.
    The target is what `schedule.config.prediction` names: noise, velocity or x0. The mean is over C, h, w.
    """
    alpha_bar = schedule.alpha_bar[t.cpu()]  # (B,) float64
    x_t = add_noise(x0, noise, alpha_bar)
    target = {"eps": noise, "v": velocity(x0, noise, alpha_bar), "x0": x0}[schedule.config.prediction]
    output = predict(x_t, t.to(x0.device))
    weight = loss_weight(alpha_bar, schedule.config.prediction, config)
    error = reduce((at_least_float32(output) - at_least_float32(target)).square(), "B C h w -> B", "mean")
    return per_sample(weight, error) * error
