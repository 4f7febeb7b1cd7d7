"""From a network to `denoise(x, sigma) -> x0`, the one contract of sampling.

    x = x0 + sigma eps,     denoise(x, sigma) = c_skip x + c_out network(c_in x, c_noise)

(Karras et al. 2022, arXiv:2206.00364, eq. 7). What a network predicts (eps, v, x0, the velocity of a flow,
the paper's own mixture of x0 and eps) is one row of the four coefficients. Stands between `guidance.py`,
which calls it with two kinds of conditioning, and the network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import at_least_float32, per_sample
from ldm.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor | float | int], Tensor]  # (x, sigma) -> x0; sigma a number, 0-d or (B,)


class Preconditioning(NamedTuple):
    """The four coefficients of eq. 7 at one noise level per sample, each float64 in sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor  # what the network is told of the level: here the timestep


def eps_row(sigma: Tensor, schedule: Schedule) -> Preconditioning:
    """Network predicts noise: x0 = x - sigma eps, eps = network(x / sqrt(sigma^2 + 1), t)."""
    one = torch.ones_like(sigma)
    return Preconditioning(one, -sigma, (sigma**2 + 1).rsqrt(), schedule.t(sigma))


def v_row(sigma: Tensor, schedule: Schedule) -> Preconditioning:
    """Network predicts velocity: x0 = x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) v."""
    c_in = (sigma**2 + 1).rsqrt()
    return Preconditioning(c_in**2, -sigma * c_in, c_in, schedule.t(sigma))


def x0_row(sigma: Tensor, schedule: Schedule) -> Preconditioning:
    """Network predicts the clean latents: x0 = network(x / sqrt(sigma^2 + 1), t)."""
    zero = torch.zeros_like(sigma)
    return Preconditioning(zero, zero + 1, (sigma**2 + 1).rsqrt(), schedule.t(sigma))


def flow_row(sigma: Tensor, schedule: Schedule) -> Preconditioning:
    """Network predicts a flow's velocity eps - x0: x0 = x_t - t velocity, x_t = x / (1 + sigma).

    t = sigma / (1 + sigma), of which the network is told T t, as those of Esser et al. 2024 are.
    """
    c_in = 1 / (1 + sigma)
    return Preconditioning(c_in, -sigma * c_in, c_in, schedule.num_timesteps * schedule.time(sigma))


def edm_row(sigma: Tensor, schedule: Schedule) -> Preconditioning:
    """Network predicts what leaves its input and target of unit variance at every level (table 1 of eq. 7's).

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)    c_out = sigma sigma_data c_in
    c_in = 1 / sqrt(sigma^2 + sigma_data^2)             c_noise = t, as in the other rows

    The paper's c_noise, ln(sigma) / 4, is for an embedding of its own: our networks embed timesteps 0..T-1,
    and -1..1 would all look alike to them.
    """
    c_in = (sigma**2 + schedule.config.sigma_data**2).rsqrt()
    c_skip = (schedule.config.sigma_data * c_in) ** 2
    return Preconditioning(c_skip, sigma * schedule.config.sigma_data * c_in, c_in, schedule.t(sigma))


ROWS = {"eps": eps_row, "v": v_row, "x0": x0_row, "flow": flow_row, "edm": edm_row}


class Denoiser:
    """A network of `schedule.config.prediction` kind as denoise(x, sigma, **conditioning) -> x0.

    network: (x_t, t, **conditioning) -> output like x_t, with x_t = x / sqrt(sigma^2 + 1) in the scale it was
        trained on and t float32 (B,) in 0..T-1: whole on the schedule's own sigmas, interpolated between
        them. Of a flow x_t is x / (1 + sigma) and t is T times the noise share, in 0..T;
        of "edm" x_t is x / sqrt(sigma^2 + sigma_data^2).
    dtype: what x_t is cast to for the network (its own precision); None leaves float32, or float64 for
    float64."""

    def __init__(
        self, network: Callable[..., Tensor], schedule: Schedule, dtype: torch.dtype | None = None
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.dtype = dtype

    def __call__(
        self, x: Float[Tensor, "B C h w"], sigma: Tensor | float | int, **conditioning: Any
    ) -> Float[Tensor, "RB C h w"]:
        """Estimate of x0 from x = x0 + sigma eps, in float32 (float64 for float64 x).

        sigma > 0: a number, a 0-d tensor or one level per sample (B,). conditioning: passed to the network;
        R contexts for each sample (see `UNet.forward`) give R B estimates, those of torch.cat([x] * R).
        Raises ValueError for a level that is infinite or no number: pure noise is the schedule's last one.
        """
        x = at_least_float32(x)
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")  # as the tables and sampling grids
        if not bool(sigma.isfinite().all()):
            top = float(self.schedule.sigmas[-1])
            raise ValueError(f"noise level {sigma.tolist()} is not finite; this model's highest is {top:g}")
        c_skip, c_out, c_in, c_noise = ROWS[self.schedule.config.prediction](sigma, self.schedule)
        t = c_noise.float().to(x.device).expand(x.shape[0])  # () or (B,) -> (B,)
        output = self.network((per_sample(c_in, x) * x).to(self.dtype or x.dtype), t, **conditioning)
        output = output.to(x.dtype).unflatten(0, (-1, len(x)))  # (R, B, C, h, w)
        return (per_sample(c_skip, x) * x + per_sample(c_out, x) * output).flatten(0, 1)
