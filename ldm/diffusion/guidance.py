"""Guidance: move the denoised picture away from a worse prediction of it, whichever that is.

A guided denoiser is made of two parts, and is itself `denoise(x, sigma) -> x0`, so that samplers know nothing
of it:

    Predictions   where the better (cond) and the worse (uncond) x0 come from: `paired` prompts, several
                  prompts `composed`, a weaker model (`autoguided`)
    Rule          what is made of the two: `Linear` (classifier-free), `Rescaled`, `Projected` (APG),
                  `PlusPlus` (CFG++)

    guide(paired(denoise, cond, uncond), Rescaled(Linear(7.5), 0.7, schedule))

`interval`, `dynamic_threshold` and `by_step` wrap any denoiser, guided or not, so that all of it stacks.
Guiding x0, eps or v is the same thing in `Linear`, since each is linear in the others at a fixed x and sigma;
it is not in `Rescaled` and `Projected`, which say what they work on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import ROWS, Denoise
from ldm.diffusion.process import per_sample
from ldm.diffusion.schedule import Schedule

Conditioning = Mapping[
    str, Tensor
]  # keyword arguments of the network (context, y, ...), each with a batch axis first
Sigma = Tensor | float | int


def batched(
    denoise: Callable[..., Tensor], conditionings: Sequence[Conditioning], together: bool = True
) -> Callable[[Tensor, Sigma], list[Tensor]]:
    """(x, sigma) -> the x0 of each conditioning, in their order, from one batch.

    Conditionings of other lengths (prompts of one and of two chunks) go in a batch of their own, so that no
    prompt needs padding. together: False takes each by itself, for less memory.
    Raises ValueError for conditionings that differ in their names or batch sizes.
    """
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in conditionings]
    for other in shapes[1:]:
        sizes = [{name: shape[:1] for name, shape in each.items()} for each in (shapes[0], other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"conditional and unconditional inputs differ: {other} and {shapes[0]}")
    groups: list[list[int]] = []
    for i, shape in enumerate(shapes):
        same = next((group for group in groups if together and shapes[group[0]] == shape), None)
        groups.append([i]) if same is None else same.append(i)
    inputs = [
        {name: torch.cat([conditionings[i][name] for i in group]) for name in conditionings[group[0]]}
        for group in groups
    ]  # each value (len(group) B, ...)

    def evaluate(x: Tensor, sigma: Sigma) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group, conditioning in zip(groups, inputs, strict=True):
            count = len(group)
            levels = torch.cat([sigma] * count) if isinstance(sigma, Tensor) and sigma.ndim else sigma
            x0 = denoise(torch.cat([x] * count), levels, **conditioning)  # (count B, C, h, w)
            found.update(zip(group, x0.chunk(count), strict=True))
        return [found[i] for i in range(len(conditionings))]

    return evaluate


@dataclass(frozen=True)
class Predictions:
    """Two ways to denoise: towards the better `cond`, or the worse `uncond`, or (uncond, cond) at once."""

    cond: Denoise
    uncond: Denoise
    both: Callable[[Tensor, Sigma], Sequence[Tensor]]


def paired(
    denoise: Callable[..., Tensor], cond: Conditioning, uncond: Conditioning, together: bool = True
) -> Predictions:
    """One denoiser with two conditionings, in one batch [uncond, cond]; `uncond` may be a negative prompt.

    denoise: (x, sigma, **conditioning) -> x0. cond, uncond: the same names, batch B as x.
    Raises ValueError for conditionings that do not match.
    """
    return Predictions(
        partial(denoise, **cond), partial(denoise, **uncond), batched(denoise, [uncond, cond], together)
    )


def composed(
    denoise: Callable[..., Tensor],
    prompts: Sequence[tuple[float | int, Conditioning]],
    uncond: Conditioning,
    together: bool = True,
) -> Predictions:
    """Several prompts with weights (Liu et al. 2022, arXiv:2206.01714, eq. 11; the web UI's AND).

    The prediction of the prompts together is cond = uncond + sum_i w_i (D_i - uncond), so that `Linear(s)`
    gives uncond + sum_i w_i s (D_i - uncond). Weights that sum to 1 average the prompts; a negative one
    avoids its prompt; prompts of weight 0 are not evaluated.
    Raises ValueError for a weight that is not finite, or where no prompt is left.
    """
    for weight, _ in prompts:
        if not math.isfinite(weight):
            raise ValueError(f"weight of a prompt must be a finite number, got {weight}")
    kept = [(weight, each) for weight, each in prompts if weight != 0]
    if not kept:
        raise ValueError(f"at least one of the {len(prompts)} prompts needs a weight other than 0")
    weights, conditionings = [weight for weight, _ in kept], [each for _, each in kept]
    every = batched(denoise, [uncond, *conditionings], together)
    prompts_alone = batched(denoise, conditionings, together)
    averages = math.isclose(sum(weights), 1)  # then uncond cancels out of cond

    def both(x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        x0_uncond, *x0s = every(x, sigma)
        if weights == [1]:
            return x0_uncond, x0s[0]
        moves = [weight * (x0 - x0_uncond) for weight, x0 in zip(weights, x0s, strict=True)]
        return x0_uncond, x0_uncond + torch.stack(moves).sum(dim=0)

    def cond(x: Tensor, sigma: Sigma) -> Tensor:
        if not averages:
            return both(x, sigma)[1]
        if len(weights) == 1:
            return prompts_alone(x, sigma)[0]
        x0s = prompts_alone(x, sigma)
        return torch.stack([weight * x0 for weight, x0 in zip(weights, x0s, strict=True)]).sum(dim=0)

    return Predictions(cond, partial(denoise, **uncond), both)


def autoguided(
    denoise: Callable[..., Tensor], weak: Callable[..., Tensor], cond: Conditioning
) -> Predictions:
    """A weaker version of the model in the place of the unconditional one (Karras et al. 2024,
    arXiv:2406.02507, eq. 4), both with the prompt: one evaluation of each.

    weak: a smaller or less trained network's denoiser, or the same one with its attention perturbed.
    """
    strong_alone, weak_alone = partial(denoise, **cond), partial(weak, **cond)
    return Predictions(
        strong_alone, weak_alone, lambda x, sigma: (weak_alone(x, sigma), strong_alone(x, sigma))
    )


@runtime_checkable
class Rule(Protocol):
    """(x, sigma, uncond, cond) -> guided x0, all of x's shape. `only` is "cond" or "uncond" where the rule
    needs no more than one of them and returns it as it is."""

    @property
    def only(self) -> str | None: ...

    def __call__(self, x: Tensor, sigma: Sigma, uncond: Tensor, cond: Tensor) -> Tensor: ...


def guide(predictions: Predictions, rule: Rule) -> Denoise:
    """The guided denoiser. One evaluation of B where the rule needs no more."""
    if rule.only is not None:
        return predictions.cond if rule.only == "cond" else predictions.uncond

    def guided(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        return rule(x, sigma, *predictions.both(x, sigma))

    return guided


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
        return {1: "cond", 0: "uncond"}.get(self.scale)

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
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, algorithm 1), on x0.

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


def classifier_free(
    denoise: Callable[..., Tensor], cond: Conditioning, uncond: Conditioning, scale: float | int
) -> Denoise:
    """`Linear(scale)` on a pair of prompts: uncond + scale (cond - uncond), from one batch per step.

    denoise: (x, sigma, **conditioning) -> x0. cond, uncond: the same names, batch B as x.
    Raises ValueError for a scale that is not finite or conditionings that do not match.
    """
    rule = Linear(scale)
    if rule.only is not None:  # the other conditioning need not fit, nor be copied
        return partial(denoise, **(cond if rule.only == "cond" else uncond))
    return guide(paired(denoise, cond, uncond), rule)


def instructed(
    denoise: Callable[..., Tensor],
    text_and_image: Conditioning,
    image: Conditioning,
    nothing: Conditioning,
    text_scale: float | int,
    image_scale: float | int,
) -> Denoise:
    """Two scales, as InstructPix2Pix has them (Brooks et al. 2022, arXiv:2211.09800, eq. 3):

    D(nothing) + image_scale (D(image) - D(nothing)) + text_scale (D(text_and_image) - D(image)).
    """
    Linear(text_scale), Linear(image_scale)  # raise where not finite
    every = batched(denoise, [nothing, image, text_and_image])

    def guided(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        x0_nothing, x0_image, x0_full = every(x, sigma)
        return x0_nothing + image_scale * (x0_image - x0_nothing) + text_scale * (x0_full - x0_image)

    return guided


def interval(guided: Denoise, plain: Denoise, low: float | int, high: float | int) -> Denoise:
    """`guided` at levels low < sigma <= high, elsewhere `plain`, which is one evaluation: the conditional
    prediction, `Predictions.cond` (Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 5).

    Raises ValueError unless 0 <= low < high; high may be infinite.
    """
    if not 0 <= low < high:
        raise ValueError(f"guidance interval needs 0 <= low < high, got {low} and {high}")

    def limited(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        level = torch.as_tensor(sigma)
        inside = (level > low) & (level <= high)
        if bool(inside.all()):
            return guided(x, sigma)
        if not bool(inside.any()):
            return plain(x, sigma)
        return torch.where(per_sample(inside, x).bool(), guided(x, sigma), plain(x, sigma))

    return limited


def dynamic_threshold(denoise: Denoise, percentile: float | int = 0.995, limit: float | int = 1.0) -> Denoise:
    """Pull x0 back into its range (Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3).

    s is the `percentile` of |x0| in each sample, at least `limit`; x0 is clipped to [-s, s] and divided by
    s / limit. Imagen's data are pixels with limit 1; latents need the largest value that theirs take.
    Raises ValueError for a percentile outside 0..1 or a limit that is not above 0.
    """
    if not 0 <= percentile <= 1:
        raise ValueError(f"percentile of dynamic thresholding must be between 0 and 1, got {percentile}")
    if not 0 < limit < math.inf:
        raise ValueError(f"limit of dynamic thresholding must be above 0, got {limit}")

    def thresholded(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        x0 = denoise(x, sigma)
        s = torch.quantile(x0.abs().flatten(1), percentile, dim=1).clamp(min=limit)  # (B,)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, 1)
        return x0.clamp(-s, s) * (limit / s)

    return thresholded


def by_step(sigmas: Float[Tensor, "levels"], denoise_of: Callable[[int], Denoise]) -> Denoise:
    """The denoiser of the step that a level belongs to, for prompts that change on the way.

    sigmas: the sampler's grid, (steps + 1,) falling. denoise_of: step index 0..steps-1 -> denoiser; called at
    each evaluation, so it should remember what it has built. A level of the grid begins its step, one between
    belongs to the step that it lies in.
    """
    levels = sigmas.tolist()[:-1]

    def stepped(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        begun = sum(level >= float(sigma) for level in levels)
        return denoise_of(max(begun - 1, 0))(x, sigma)

    return stepped
