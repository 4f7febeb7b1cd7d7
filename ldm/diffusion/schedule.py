"""Noise schedules: how much signal is left at each timestep, and which timesteps a sampler visits.

`alpha_bar[t]` is the share of signal variance in `x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps` (Ho et
al. 2020, DDPM, arXiv:2006.11239, eq. 4). Samplers work with `sigma = sqrt((1 - alpha_bar) / alpha_bar)`, the
noise level of the rescaled `x = x0 + sigma eps` (Karras et al. 2022, arXiv:2206.00364). Tables are float64 on
the CPU: they are a thousand numbers, and what is looked up in them is cast once, by its user.

A rectified flow (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747) mixes linearly,
`x_t = (1 - t) x0 + t eps`, t in (0, 1]. Divided by its signal share it is the same `x0 + sigma eps`, with
`sigma = t / (1 - t)`: from there on samplers need not know which of the two a model is.

Training (`loss.py`) reads `alpha_bar`; sampling (`denoiser.py`, `samplers.py`) reads sigmas and timesteps.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCHEDULES = ("scaled_linear", "linear", "cosine", "flow")
PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
SPACINGS = ("compvis", "leading", "trailing", "linspace")

COSINE_OFFSET = 8e-3  # s of Nichol & Dhariwal 2021: keeps the first betas from vanishing
COSINE_MAX_BETA = 0.999  # their clip: keeps the last step from erasing everything
# Stands for alpha_bar = 0 in the sigma table, and only there: its sigma is infinite. It leaves sigma 4096,
# harmless in float32, and a signal share sqrt(alpha_bar) = 2^-12, below half precision's rounding of x_t.
# diffusers' Euler uses the same number.
TINY_ALPHA_BAR = 2.0**-24
# Stands for the infinite sigma of a flow at t = 1: t is 1 - 6e-8 there, 1 to float32. So large a level would
# drown float32 where a sampler subtracts levels, which none of ours does from one above FAR (`step.py`).
FLOW_TOP = 2.0**24
SNAP = 1e-4  # a float32 sigma is off by up to about 2e-5 timesteps; anything nearer than this is on the table


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts.

    schedule: "scaled_linear" (linear in sqrt(beta); the original latent diffusion code calls it "linear"),
        "linear" (linear in beta, DDPM), "cosine" (Nichol & Dhariwal 2021; ignores the betas) or "flow"
        (rectified flow; ignores them too).
    beta_start, beta_end: noise variance of the first and the last of `num_timesteps` steps, in (0, 1).
    zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2023); not with "eps".
    prediction: what the network's output estimates: the noise "eps", the velocity "v" or the clean "x0"; of a
        flow, and of nothing else, "flow", the velocity eps - x0. "edm" is the output that Karras et al. 2022
        precondition (table 1), of unit variance at every level (see `denoiser.edm_row`).
    shift: of a flow, s > 0 in t <- s t / (1 + (s - 1) t) (Esser et al. 2024, arXiv:2403.03206): above
        1 more of the timesteps are noisy ones, as big pictures need. It multiplies every sigma by s.
    sigma_data: deviation of the clean latents, for the prediction and the loss weighting "edm"; 1 is what the
        scale of our autoencoders makes it.
    Raises ValueError for a value that is not one of these and for values that do not go together.
    """

    schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: str = "eps"
    shift: float = 1.0
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}, expected one of {', '.join(PREDICTIONS)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "betas must satisfy 0 < beta_start <= beta_end < 1, "
                f"got {self.beta_start} and {self.beta_end}"
            )
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {self.num_timesteps}")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a positive number, got {self.sigma_data}")
        self._check_flow()
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                'zero_terminal_snr needs prediction "v" or "x0", got "eps": at the last timestep x_t is the '
                "noise itself, so predicting it says nothing about the picture"
            )
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr needs num_timesteps of at least 2, got 1")

    def _check_flow(self) -> None:
        if (self.schedule == "flow") != (self.prediction == "flow"):
            raise ValueError(
                'schedule "flow" and prediction "flow" go together, '
                f'got schedule "{self.schedule}" and prediction "{self.prediction}"'
            )
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a positive number, got {self.shift}")
        if self.schedule != "flow" and self.shift != 1:
            raise ValueError(f'shift {self.shift} is of schedule "flow" only, got schedule "{self.schedule}"')
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ValueError(
                'schedule "flow" ends in pure noise by itself: leave zero_terminal_snr out, which is for '
                "schedules of betas"
            )


def make_betas(config: DiffusionConfig) -> Float[Tensor, "steps"]:
    """beta_t, float64 (num_timesteps,), before any zero-terminal-SNR rescale.

    linear         beta_t = linspace(beta_start, beta_end)                  (Ho et al. 2020, section 4)
    scaled_linear  beta_t = linspace(sqrt(beta_start), sqrt(beta_end))^2    (Rombach et al. 2022, their code)
    cosine         beta_t = min(1 - f(t + 1) / f(t), 0.999)                 (Nichol & Dhariwal 2021, eq. 17)
                   f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), s = 0.008

    A flow has no betas: Schedule makes its table from `flow_sigma`.
    """
    assert config.schedule != "flow"
    T = config.num_timesteps
    if config.schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)
    if config.schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64).square()
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos(math.pi / 2 * (t + COSINE_OFFSET) / (1 + COSINE_OFFSET)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=COSINE_MAX_BETA)


def rescale_zero_terminal_snr(alpha_bar: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
    """Shift and scale sqrt(alpha_bar) so that its last value is exactly 0 and its first is unchanged.

    s_t = sqrt(alpha_bar_t);  s_t <- (s_t - s_T) s_0 / (s_0 - s_T)
    (Lin et al. 2023, arXiv:2305.08891, algorithm 1)
    """
    s = alpha_bar.sqrt()
    return ((s - s[-1]) * s[0] / (s[0] - s[-1])).square()


def flow_sigma(time: Float[Tensor, "*batch"], shift: float | int) -> Float[Tensor, "*batch"]:
    """sigma = s t / (1 - t) of a flow at time t in [0, 1] before the shift s; at most FLOW_TOP."""
    return (shift * time / (1 - time)).clamp(max=FLOW_TOP)


class Schedule:
    """The tables of one DiffusionConfig.

    config: the DiffusionConfig. A flow's timestep n of 0..T-1 is at time (n + 1) / T, before the shift.
    alpha_bar: float64 (T,), falling; exactly 0 at the end under zero terminal SNR. Training uses this one.
    sigmas: float64 (T,), rising and finite: sqrt((1 - alpha_bar) / alpha_bar). Sampling uses this one.
    Raises ValueError where the betas are so large that alpha_bar underflows.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.flow = config.schedule == "flow"
        if self.flow:
            self._make_flow(config)
            return
        alpha_bar = torch.cumprod(1 - make_betas(config), dim=0)
        if config.zero_terminal_snr:
            alpha_bar = rescale_zero_terminal_snr(alpha_bar)
        self.alpha_bar = alpha_bar
        finite = alpha_bar
        if (
            config.zero_terminal_snr
        ):  # sigma_T = 1/0: stop at a finite level that is still above its neighbour's
            finite = alpha_bar.clone()
            finite[-1] = min(TINY_ALPHA_BAR, float(alpha_bar[-2]) / 2)
        self.sigmas = ((1 - finite) / finite).sqrt()
        if not self.sigmas.isfinite().all():
            raise ValueError(
                f"alpha_bar underflows to 0 within {config.num_timesteps} timesteps: "
                f"lower beta_end ({config.beta_end})"
            )
        self._log_sigmas = self.sigmas.log()

    def _make_flow(self, config: DiffusionConfig) -> None:
        T = config.num_timesteps
        self.sigmas = flow_sigma(torch.arange(1, T + 1, dtype=torch.float64) / T, config.shift)
        if not (self.sigmas.diff() > 0).all():
            raise ValueError(
                f"a flow of shift {config.shift} and {T} timesteps exceeds noise level {FLOW_TOP:.0f} before "
                "its end: lower shift"
            )
        self.alpha_bar = 1 / (1 + self.sigmas.square())
        self.alpha_bar[-1] = 0
        self._log_sigmas = self.sigmas.log()

    @property
    def num_timesteps(self) -> int:
        return self.config.num_timesteps

    @property
    def pure(self) -> bool:
        """Whether the last timestep is pure noise, its sigma a finite one in place of infinity."""
        return self.flow or self.config.zero_terminal_snr

    def time(self, sigma: Tensor | float | int) -> Float[Tensor, "*batch"]:
        """Noise share t = sigma / (1 + sigma) of a flow's x_t, float64; exactly 1 at the highest level."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        return torch.where(sigma >= self.sigmas[-1], 1.0, sigma / (1 + sigma))

    def sigma(self, t: Tensor | float | int) -> Float[Tensor, "*batch"]:
        """Noise level at timestep t in [0, T - 1], float64 in t's shape.

        The table's value at whole t; between, log-sigma is linear, or a flow's own formula holds. Raises
        ValueError for t outside the table.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not ((t >= 0) & (t <= self.num_timesteps - 1)).all():
            raise ValueError(f"timestep {t.tolist()} is outside 0..{self.num_timesteps - 1}")
        if self.flow:
            return flow_sigma((t + 1) / self.num_timesteps, self.config.shift)
        low = t.floor().long()
        high = t.ceil().long()
        between = torch.lerp(self._log_sigmas[low], self._log_sigmas[high], t - low).exp()
        return torch.where(low == high, self.sigmas[low], between)

    def t(self, sigma: Tensor | float | int) -> Float[Tensor, "*batch"]:
        """Timestep of a noise level, float64 in sigma's shape; the inverse of `sigma`.

        A whole number exactly where sigma is a table entry (also after rounding to float32), in between as
        `sigma`, the nearest end outside the table.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        if self.flow:
            t = (self.num_timesteps * self.time(sigma / self.config.shift) - 1).clamp(min=0)
            t = torch.where(sigma >= self.sigmas[-1], self.num_timesteps - 1.0, t)
            return torch.where((t - t.round()).abs() < SNAP, t.round(), t)
        log_sigma = sigma.log()
        high = torch.searchsorted(self._log_sigmas, log_sigma).clamp(max=self.num_timesteps - 1)
        low = (high - 1).clamp(min=0)
        rise = self._log_sigmas[high] - self._log_sigmas[low]  # 0 only when both are entry 0
        share = torch.where(rise > 0, (log_sigma - self._log_sigmas[low]) / rise, 0.0).clamp(0, 1)
        t = low + share
        return torch.where((t - t.round()).abs() < SNAP, t.round(), t)


def timesteps(spacing: str, steps: int, T: int) -> Int[Tensor, "steps"]:
    """The timesteps a sampler visits, descending int64 (steps,), all different and within 0..T-1.

    compvis   floor(i T/steps) + 1: what the original's DDIM visits wherever it works and takes the steps it
              was asked for, that is where steps divides T. Elsewhere the original rounds the stride down,
              takes more steps and can run off the table (at 3, 9, 27, 300 of 1000); here the stride stays
              exact. At steps = T, where the original runs off too, all of 0..T-1.
    leading   i floor(T/steps)
    trailing  round(T - i T/steps) - 1: always starts at T - 1; the one for zero-terminal-SNR models
    linspace  round(i (T - 1)/(steps - 1)): both ends; one step visits T - 1
    i runs over 0..steps-1; halves round to even. The last three are table 2 of Lin et al., counted from 0.

    Raises ValueError for an unknown spacing or steps outside 1..T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, got {steps}")
    i = torch.arange(steps)
    if spacing == "compvis":
        return (i * T // steps + (1 if steps < T else 0)).flip(0)
    if spacing == "leading":
        return (i * (T // steps)).flip(0)
    if spacing == "trailing":
        return (T - i.double() * T / steps).round().long() - 1
    if spacing == "linspace":
        stride = (T - 1) / max(steps - 1, 1)  # one rounded stride, as numpy and so diffusers do: same halves
        return (i.double() * stride).round().long().flip(0) if steps > 1 else torch.tensor([T - 1])
    raise ValueError(f"unknown spacing {spacing!r}, expected one of {', '.join(SPACINGS)}")


def sigma_grid(schedule: Schedule, spacing: str, steps: int) -> Float[Tensor, "levels"]:
    """Noise levels of a sampling run, strictly descending float64 (steps + 1,) on the CPU.

    Entry i is the level step i starts from, entry i + 1 the level it ends at. The last is 0, except for
    "compvis": the original's DDIM ends at timestep 0 (its `alphas_prev[0]` is alpha_bar_0, not 1), so there
    it is sigmas[0], unless timestep 0 was itself visited (steps = T).
    Raises ValueError as `timesteps`.
    """
    t = timesteps(spacing, steps, schedule.num_timesteps)
    stops_at_timestep_0 = spacing == "compvis" and t[-1] > 0
    last = schedule.sigmas[:1] if stops_at_timestep_0 else torch.zeros(1, dtype=torch.float64)
    return torch.cat([schedule.sigmas[t], last])
