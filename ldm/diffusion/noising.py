"""Training noise that is not quite white: offset, pyramid noise, input perturbation.

White noise hardly changes a picture's mean and coarse structure, so that a model trained on it keeps those of
its start (Guttenberg 2023, "Diffusion with offset noise"; Whitaker 2023, "Multi-resolution noise"). Input
perturbation (Ning et al. 2023, arXiv:2301.11706) shows the network in training the errors that it meets in
sampling. Each is a pure function of white noise and a generator; `training_noise` is what
`train/tasks/diffusion.py` gives `loss.diffusion_loss`.
"""

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.seeding import generator


@dataclass(frozen=True)
class NoiseConfig:
    """All 0: plain white noise.

    offset: deviation of the number added to each channel of a sample, see `offset_noise`; 0.1 is usual.
    pyramid: share in [0, 1) in which each coarser octave counts, see `pyramid_noise`.
    perturbation: deviation of what is added to the noise in x_t alone, see `perturbation`; 0.1 in the paper.
    Raises ValueError for a value out of its range.
    """

    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offset", "perturbation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"noise.{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.pyramid < 1:
            raise ValueError(f"noise.pyramid must be in [0, 1), got {self.pyramid}")


def training_noise(
    white: Float[Tensor, "B C h w"], config: NoiseConfig, *key: int | str
) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"] | None]:
    """The noise to be predicted, and what is added to it in x_t alone (None: nothing).

    white: standard normal. key: such as (seed, step); each kind draws from a generator of its own of it, so
    that `white` and the other kinds are the same whichever are switched on.
    """
    noise = white
    if config.pyramid:
        noise = pyramid_noise(noise, config.pyramid, generator("pyramid", *key))
    if config.offset:
        noise = offset_noise(noise, config.offset, generator("offset", *key))
    if not config.perturbation:
        return noise, None
    return noise, perturbation(noise, config.perturbation, generator("perturbation", *key))


def offset_noise(
    noise: Float[Tensor, "B C h w"], offset: float | int, rng: torch.Generator
) -> Float[Tensor, "B C h w"]:
    """noise + offset n, n standard normal (B, C, 1, 1): each channel's mean moves. Variance 1 + offset^2."""
    return noise + offset * torch.randn(*noise.shape[:2], 1, 1, generator=rng)


def pyramid_noise(
    noise: Float[Tensor, "B C h w"], discount: float | int, rng: torch.Generator
) -> Float[Tensor, "B C h w"]:
    """Noise of all scales, of unit variance at every place.

    sum_i discount^i up(n_i) / sqrt(sum_i discount^(2 i) var up(n_i)),  n_0 = noise,  i = 0, 1, ... until one
    of the sides is 1; n_i is white noise of the sides / 2^i, rounded up, and up its linear interpolation to
    h, w. The original draws each octave's size at random and divides by the deviation measured over the
    batch; here the divisor is the exact one, and so no sample depends on another.
    """
    h, w = noise.shape[2:]
    total, variance = noise, torch.ones(h, w)
    for level in range(1, (min(h, w) - 1).bit_length() + 1):
        sides = [-(-side // 2**level) for side in (h, w)]
        coarse = torch.randn(*noise.shape[:2], *sides, generator=rng)
        down, across = _linear(sides[0], h), _linear(sides[1], w)  # (i, h), (j, w)
        total = total + discount**level * einsum(coarse, down, across, "B C i j, i h, j w -> B C h w")
        spread = einsum(down.square(), across.square(), "i h, j w -> h w")  # variance of up(n_i)
        variance = variance + discount ** (2 * level) * spread
    return total / variance.sqrt()


def perturbation(
    noise: Float[Tensor, "B C h w"], gamma: float | int, rng: torch.Generator
) -> Float[Tensor, "B C h w"]:
    """gamma n, n standard normal: x_t is made of noise + gamma n while the target stays the noise."""
    return gamma * torch.randn(noise.shape, generator=rng)


def _linear(small: int, large: int) -> Float[Tensor, "small large"]:
    """Weights of linear interpolation along one side: entry (i, j) is how much of i is in j."""
    return interpolate(torch.eye(small)[None], size=large, mode="linear")[0]
