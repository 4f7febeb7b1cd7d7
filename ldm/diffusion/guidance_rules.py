"""What guidance makes of a better (cond) and a worse (uncond) prediction of x0: one class for each formula.

`guidance.guide` joins a rule to where the two predictions come from. Each rule says at which scale one of the
two is enough (`only`), so that the other is not computed. `Linear` gives the same whether x0, eps or v is
guided, since each is linear in the others at a fixed x and sigma; `Rescaled` and `Projected` do not, and say
what they work on.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import ROWS
from ldm.diffusion.process import per_sample
from ldm.diffusion.schedule import Schedule

Sigma = Tensor | float | int


@runtime_checkable
class Rule(Protocol):
    """(x, sigma, uncond, cond) -> guided x0, all of x's shape. `only` is "cond" or "uncond" where the rule
    needs no more than one of them and returns it as it is."""

    @property
    def only(self) -> str | None: ...

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """Classifier-free guidance, uncond + scale (cond - uncond) (Ho & Salimans 2022, arXiv:2207.12598, eq. 6).

    scale: 1 is conditional and 0 unconditional, each with one evaluation; above 1 exaggerates the prompt,
    below 0 avoids it.
    """

    scale: float | int

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale must be a finite number, got {self.scale}")

    @property
    def only(self) -> str | None:
        return "cond" if self.scale == 1 else "uncond" if self.scale == 0 else None

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor:
        return uncond + self.scale * (cond - uncond)


@dataclass(frozen=True)
class Rescaled:
    """`rule`, its network output scaled back to the deviation of the conditional one
    (Lin et al. 2023, arXiv:2305.08891, eqs. 14-16).

    The paper rescales what the network predicts. In x0 = c_skip x + c_out F that is, with both stds over all
    axes but the batch,

        F -> k F,   k = phi std(F_cond) / std(F_guided) + 1 - phi
        x0 -> c_skip x + k (x0 - c_skip x)

    c_out cancels in k, so the row's c_skip is all that is needed: 1 for eps, 1 / (sigma^2 + 1) for v, 0 for
    x0. The same as diffusers' `rescale_noise_cfg` on the network's eps or v; rescaling x0 itself is another
    thing unless the network predicts x0.
    phi in [0, 1]: 0 is `rule` alone, 0.7 the paper's choice. schedule: knows what the network predicts.
    """

    rule: Rule
    phi: float | int
    schedule: Schedule

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise ValueError(f"guidance rescale must be between 0 and 1, got {self.phi}")

    @property
    def only(self) -> str | None:
        # The conditional prediction has its own deviation already; the unconditional one would be scaled.
        return self.rule.only if self.phi == 0 or self.rule.only == "cond" else None

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor:
        x0 = self.rule(x, sigma, uncond, cond)
        level = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        c_skip = ROWS[self.schedule.config.prediction](level, self.schedule).c_skip
        kept = per_sample(c_skip, x) * x
        std_cond, std_guided = deviation(cond - kept), deviation(x0 - kept)
        # A constant output has no deviation to scale
        ratio = torch.where(std_guided > 0, std_cond / std_guided, torch.ones_like(std_guided))
        return kept + (self.phi * ratio + 1 - self.phi) * (x0 - kept)


def deviation(x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """Standard deviation of each sample, (B, 1, 1, 1)."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


@dataclass
class Projected:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416), on x0.

        delta <- cond - uncond + momentum delta_before,   delta <- delta min(1, norm / |delta|)
        cond + (scale - 1) (delta_orthogonal + eta delta_parallel)

    parallel and orthogonal to cond, each sample by itself: the part along cond mostly saturates colours.
    eta = 1 without norm and momentum is `Linear`. scale: 1 is conditional with one evaluation; 0 is
    unconditional only in that case. norm: largest length of delta, None for no limit. momentum in (-1, 1):
    the paper's is -0.5 and pushes away from where delta pointed before. With it the rule remembers the
    evaluations of a trajectory in their order: make one for each trajectory.
    """

    scale: float | int
    eta: float | int = 0.0
    norm: float | int | None = None
    momentum: float | int = 0.0
    running: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        Linear(self.scale)  # raises where it is not finite
        if not math.isfinite(self.eta):
            raise ValueError(f"eta of projected guidance must be a finite number, got {self.eta}")
        if self.norm is not None and not self.norm > 0:
            raise ValueError(f"norm of projected guidance must be above 0, got {self.norm}")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum of projected guidance must be between -1 and 1, got {self.momentum}")

    @property
    def only(self) -> str | None:
        return "cond" if self.scale == 1 else None

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor:
        delta = cond - uncond
        if self.momentum:
            if self.running is not None:
                if self.running.shape != delta.shape:
                    raise ValueError(
                        f"projected guidance with momentum follows one trajectory: made for "
                        f"{tuple(self.running.shape)}, got {tuple(delta.shape)}"
                    )
                delta = delta + self.momentum * self.running
            self.running = delta
        axes = tuple(range(1, delta.ndim))
        if self.norm is not None:
            length = torch.linalg.vector_norm(delta, dim=axes, keepdim=True)
            delta = delta * (self.norm / length).clamp(max=1)
        length2 = (cond * cond).sum(dim=axes, keepdim=True)
        along = (delta * cond).sum(dim=axes, keepdim=True) / length2.clamp(min=torch.finfo(cond.dtype).tiny)
        parallel = along * cond
        return cond + (self.scale - 1) * (delta - parallel + self.eta * parallel)


@dataclass(frozen=True)
class PlusPlus:
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2) for DDIM without noise and Euler, which are
    the same: guide x0, but renoise with the unconditional noise,

        x_next = x0_guided + sigma_next (x - uncond) / sigma,   x0_guided = uncond + strength (cond - uncond).

    Euler's step from some x0 is x0 + r (x - x0) with r = sigma_next / sigma. Equating the two,
    x0 = uncond + strength / (1 - r) (cond - uncond): linear guidance whose scale falls to `strength` at the
    last step. So it fits the contract where the grid is known, and only for these two samplers; the x0 that
    the sampler reports on the way is this one, and at the end x0_guided.

    strength: 0..1 in the paper. sigmas: the sampler's grid, (steps + 1,) falling.
    Raises ValueError at a level that does not begin a step of the grid.
    """

    strength: float | int
    sigmas: Float[Tensor, "levels"]

    def __post_init__(self) -> None:
        Linear(self.strength)

    @property
    def only(self) -> str | None:
        return "uncond" if self.strength == 0 else None

    def scale(self, sigma: Sigma) -> float:
        """The scale of linear guidance that the step from `sigma` amounts to."""
        levels = self.sigmas.tolist()
        if float(sigma) not in levels[:-1]:
            raise ValueError(
                f"CFG++ follows its own grid of levels (DDIM, Euler); {float(sigma)} is not on it"
            )
        return self.strength / (1 - levels[levels.index(float(sigma)) + 1] / float(sigma))

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor:
        return uncond + self.scale(sigma) * (cond - uncond)
