"""What all samplers share: the step they yield, the noise they are given, and noise levels as numbers.

The samplers themselves are in `samplers.py` (with their table), `samplers_singlestep.py`,
`samplers_multistep.py` and `samplers_sde.py`. All integrate, in sigma-space, dx/dsigma = (x - x0) / sigma
with x = x0 + sigma eps (Karras et al. 2022, arXiv:2206.00364, eq. 3 with sigma(t) = t).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import to_alpha_bar_scale

# noise(index) is the noise of a step, noise(index, part) with part >= 1 what a step draws besides: standard
# normal, like x, another for each index and part. Only samplers with two draws a step pass a part.
Noise = Callable[..., Tensor]

# From so high a level down, methods that average slopes take Euler's step: the last level was pure noise, a
# stand-in for infinity (`schedule.FLOW_TOP`), and the average over an endless interval says nothing.
FAR = 2.0**20


@dataclass(frozen=True)
class Step:
    """After step `index`: x at level `sigma` (= sigmas[index + 1]) and the x0 estimate that led to it."""

    index: int
    sigma: float
    x: Float[Tensor, "B ..."]
    denoised: Float[Tensor, "B ..."]

    @property
    def sample(self) -> Float[Tensor, "B ..."]:
        """x in the scale of DDPM's networks and the decoder, sqrt(alpha_bar) x; x itself where sigma is 0."""
        return to_alpha_bar_scale(self.x, self.sigma)


def levels(sigmas: Float[Tensor, "levels"]) -> Iterator[tuple[int, tuple[float, float]]]:
    """(index, (sigma, sigma_next)) of each step, as Python numbers: double precision on every device."""
    return enumerate(pairwise(sigmas.tolist()))


def drawn(noise: Noise | None, index: int, part: int = 0) -> Tensor:
    """Noise of a step. Raises ValueError where the sampler needs noise and the caller gave none."""
    if noise is None:
        raise ValueError(
            "this sampler draws noise: pass noise=, a function from the step index to noise like x"
        )
    return noise(index, part) if part else noise(index)


def toward(
    x: Float[Tensor, "B ..."], x0: Float[Tensor, "B ..."], sigma: float | int, target: float | int
) -> Float[Tensor, "B ..."]:
    """x moved from level sigma to target along x0: the exact path where x0 is constant.

    target / sigma x + (1 - target / sigma) x0, which is Euler's step in sigma, DDIM's, and the first-order
    exponential integrator in lambda = -ln sigma, where the factors are e^-h and 1 - e^-h with
    h = ln(sigma / target). Written so that a level of millions leaves float32 its precision.
    """
    return x0 + (target / sigma) * (x - x0)


def ancestral_levels(sigma: float, sigma_next: float, eta: float | int) -> tuple[float, float]:
    """(sigma_down, sigma_up): go down to sigma_down, then add sigma_up noise to be at sigma_next (Crowson).

    sigma_up = min(sigma_next, eta sigma_next sqrt(sigma^2 - sigma_next^2) / sigma)
    sigma_down = sqrt(sigma_next^2 - sigma_up^2)
    """
    sigma_up = min(sigma_next, eta * sigma_next * (sigma**2 - sigma_next**2) ** 0.5 / sigma)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


def require_at_least_0(**options: float | int) -> None:
    """Raises ValueError for the first option that is negative or NaN."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError where an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value}")
