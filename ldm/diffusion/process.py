"""The forward processes and their algebra: adding noise, converting predictions, the DDPM posterior.

Notation of Ho et al. 2020 (DDPM, arXiv:2006.11239) and, for the velocity, Salimans & Ho 2022
(arXiv:2202.00512):

    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps          x0 clean, eps standard normal noise

`alpha_bar` is a number, a 0-d tensor or one value per sample (B,), best in float64: coefficients are computed
in its precision and only then cast to that of the pictures. `loss.py` uses the first half, `samplers.py` the
second."""

import torch
from jaxtyping import Float
from torch import Tensor

Coefficient = Float[Tensor, "*batch"] | float | int


def per_sample(value: Coefficient, x: Float[Tensor, "B ..."]) -> Tensor:
    """A number or (B,) values, ready to multiply x: its dtype and device, shape () or (B, 1, ..., 1)."""
    value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    value = value.to(x.dtype).to(x.device)  # dtype first: some devices have no float64
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


def at_least_float32(x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """x in float32, or unchanged where it is float64: the precision of everything around the network."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _roots(alpha_bar: Coefficient, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), ready to multiply x."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=None if isinstance(alpha_bar, Tensor) else torch.float64)
    return per_sample(alpha_bar.sqrt(), x), per_sample((1 - alpha_bar).sqrt(), x)


def add_noise(
    x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps   (DDPM eq. 4)."""
    signal, noise = _roots(alpha_bar, x0)
    return signal * x0 + noise * eps


def velocity(
    x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0   (Salimans & Ho, section 4 and appendix D)."""
    signal, noise = _roots(alpha_bar, x0)
    return signal * eps - noise * x0


def x0_from_eps(
    x_t: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """x0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar); alpha_bar > 0."""
    signal, noise = _roots(alpha_bar, x_t)
    return (x_t - noise * eps) / signal


def x0_from_v(
    x_t: Float[Tensor, "B ..."], v: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    signal, noise = _roots(alpha_bar, x_t)
    return signal * x_t - noise * v


def eps_from_x0(
    x_t: Float[Tensor, "B ..."], x0: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """eps = (x_t - sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar); alpha_bar < 1."""
    signal, noise = _roots(alpha_bar, x_t)
    return (x_t - signal * x0) / noise


def eps_from_v(
    x_t: Float[Tensor, "B ..."], v: Float[Tensor, "B ..."], alpha_bar: Coefficient
) -> Float[Tensor, "B ..."]:
    """eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
    signal, noise = _roots(alpha_bar, x_t)
    return signal * v + noise * x_t


def mix(x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], time: Coefficient) -> Float[Tensor, "B ..."]:
    """x_t = (1 - t) x0 + t eps of a rectified flow, t in [0, 1]   (Liu et al. 2022, arXiv:2209.03003)."""
    time = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float64)
    return per_sample(1 - time, x0) * x0 + per_sample(time, x0) * eps


def flow_velocity(x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """d x_t / d t = eps - x0 of a rectified flow, the same at every t."""
    return eps - x0


def edm_target(
    x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], alpha_bar: Coefficient, sigma_data: float | int
) -> Float[Tensor, "B ..."]:
    """(x0 - c_skip x) / c_out of `denoiser.edm_row` (Karras et al. 2022, arXiv:2206.00364, eq. 8), that is

    (sqrt(1 - alpha_bar) x0 - sigma_data^2 sqrt(alpha_bar) eps)
        / (sigma_data sqrt(1 - alpha_bar + sigma_data^2 alpha_bar)):

    finite at alpha_bar = 0, where sigma is not; -v where sigma_data is 1.
    """
    signal, noise = _roots(alpha_bar, x0)
    spread = sigma_data * (noise**2 + (sigma_data * signal) ** 2).sqrt()
    return (noise * x0 - sigma_data**2 * signal * eps) / spread


def edm_input(
    x_t: Float[Tensor, "B ..."], alpha_bar: Coefficient, sigma_data: float | int
) -> Float[Tensor, "B ..."]:
    """c_in x of `denoiser.edm_row`: x_t / sqrt(1 - alpha_bar + sigma_data^2 alpha_bar)."""
    signal, noise = _roots(alpha_bar, x_t)
    return x_t / (noise**2 + (sigma_data * signal) ** 2).sqrt()


def snr(alpha_bar: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Signal-to-noise ratio SNR = alpha_bar / (1 - alpha_bar) = 1 / sigma^2   (Kingma et al. 2021)."""
    return alpha_bar / (1 - alpha_bar)


def posterior(
    x_t: Float[Tensor, "B ..."],
    x0: Float[Tensor, "B ..."],
    alpha_bar: float | int,
    alpha_bar_prev: float | int,
) -> tuple[Float[Tensor, "B ..."], float]:
    """Mean (B, ...) and variance (a number) of q(x_prev | x_t, x0) for any less noisy level (DDPM eqs. 6, 7).

    alpha = alpha_bar / alpha_bar_prev;  beta = 1 - alpha
    mean = sqrt(alpha_bar_prev) beta / (1 - alpha_bar) x0
         + sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar) x_t
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) beta
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    of_x0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
    of_x_t = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_x0 * x0 + of_x_t * x_t, (1 - alpha_bar_prev) / (1 - alpha_bar) * beta


def alpha_bar_of(sigma: float | int) -> float:
    """alpha_bar = 1 / (1 + sigma^2), the inverse of sigma = sqrt((1 - alpha_bar) / alpha_bar)."""
    return 1 / (1 + sigma * sigma)


def to_alpha_bar_scale(x: Float[Tensor, "B ..."], sigma: float | int) -> Float[Tensor, "B ..."]:
    """x_t = sqrt(alpha_bar) x, from x = x0 + sigma eps: the scale of networks and of DDPM and DDIM."""
    return alpha_bar_of(sigma) ** 0.5 * x


def to_sigma_scale(x_t: Float[Tensor, "B ..."], sigma: float | int) -> Float[Tensor, "B ..."]:
    """x = x_t / sqrt(alpha_bar) = x0 + sigma eps: the scale samplers and denoisers use.

    Of standard normal noise it makes the start of a sampling run, since x_T is taken to be pure noise.
    """
    return x_t / alpha_bar_of(sigma) ** 0.5
