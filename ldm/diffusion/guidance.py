"""Guidance: move the denoised picture away from a worse prediction of it, whichever that is.

A guided denoiser is made of two parts, and is itself `denoise(x, sigma) -> x0`, so that samplers know nothing
of it:

    Predictions   where the better (cond) and the worse (uncond) x0 come from: `paired` prompts, several
                  prompts `composed`, a weaker model (`autoguided`)
    Rule          what is made of the two, in `guidance_rules.py`: `Linear` (classifier-free), `Rescaled`,
                  `Projected` (APG), `PlusPlus` (CFG++)

    guide(paired(denoise, cond, uncond), Rescaled(Linear(7.5), 0.7, schedule))

`interval`, `dynamic_threshold` and `by_step` wrap any denoiser, guided or not, so that all of it stacks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance_rules import Linear, Rule, Sigma
from ldm.diffusion.process import per_sample

Conditioning = Mapping[
    str, Tensor
]  # keyword arguments of the network (context, y, ...), each with a batch axis first
OF_EACH = {"context", "controlled"}  # keywords of which R B rows go with B of x, see `UNet.forward`


def batched(
    denoise: Callable[..., Tensor], conditionings: Sequence[Conditioning], together: bool = True
) -> Callable[[Tensor, Sigma], list[Tensor]]:
    """(x, sigma) -> the x0 of each conditioning, in their order, from one batch.

    Conditionings of other lengths (prompts of one and of two chunks) go in a batch of their own, so that no
    prompt needs padding. together: False takes each by itself, for less memory. Where they differ in the
    context alone, x goes in once for all of them, see `joined`.
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
    inputs = [joined([conditionings[i] for i in group]) for group in groups]

    def evaluate(x: Tensor, sigma: Sigma) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group, (conditioning, copies) in zip(groups, inputs, strict=True):
            x0 = denoise(*copied(x, sigma, copies), **conditioning)  # (len(group) B, C, h, w)
            found.update(zip(group, x0.chunk(len(group)), strict=True))
        return [found[i] for i in range(len(conditionings))]

    return evaluate


def joined(conditionings: Sequence[Conditioning]) -> tuple[dict[str, Tensor], int]:
    """R conditionings as one, each value (R B, ...), and how many copies of x go with it: R.

    Where nothing but the context (and `controlled`, see `models/controlled.py`) differs, every other value
    being the same object in all of them, one copy is enough: the rest stays (B, ...), and the network
    computes once what does not depend on the context.
    """
    first, count = conditionings[0], len(conditionings)
    shared = {name for name in first if all(each[name] is first[name] for each in conditionings)}
    once = "context" in first and shared >= first.keys() - OF_EACH
    kept = first.keys() - OF_EACH if once else set()
    both = {
        name: first[name] if name in kept else torch.cat([each[name] for each in conditionings])
        for name in first
    }
    return both, 1 if once else count


def copied(x: Tensor, sigma: Sigma, copies: int) -> tuple[Tensor, Sigma]:
    """x and its level, one for all or of each sample, again and again."""
    levels = torch.cat([sigma] * copies) if isinstance(sigma, Tensor) and sigma.ndim else sigma
    return torch.cat([x] * copies), levels


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
    """Several prompts with weights (Liu et al. 2022, arXiv:2206.01714; the web UI's AND).

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
    arXiv:2406.02507), both with the prompt: one evaluation of each.

    weak: a smaller or less trained network's denoiser, or the same one with its attention perturbed.
    """
    strong_alone, weak_alone = partial(denoise, **cond), partial(weak, **cond)
    return Predictions(
        strong_alone, weak_alone, lambda x, sigma: (weak_alone(x, sigma), strong_alone(x, sigma))
    )


def guide(predictions: Predictions, rule: Rule) -> Denoise:
    """The guided denoiser. One evaluation of B where the rule needs no more."""
    if rule.only is not None:
        return predictions.cond if rule.only == "cond" else predictions.uncond

    def guided(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        return rule(x, sigma, *predictions.both(x, sigma))

    return guided


def classifier_free(
    denoise: Callable[..., Tensor], cond: Conditioning, uncond: Conditioning, scale: float | int
) -> Denoise:
    """uncond + scale (cond - uncond), from one batch [uncond, cond] per step (Ho & Salimans 2022, eq. 6).

    The plain case of `guide(paired(...), Linear(scale))`, written out. denoise: (x, sigma, **conditioning) ->
    x0. cond, uncond: the same names, batch B as x. Raises ValueError for a scale that is not finite or
    conditionings that do not match.
    """
    rule = Linear(scale)
    if rule.only is not None:  # the other conditioning need not fit, nor be copied
        return partial(denoise, **(cond if rule.only == "cond" else uncond))
    if {name: cond[name].shape for name in cond} != {name: uncond[name].shape for name in uncond}:
        return guide(paired(denoise, cond, uncond), rule)  # prompts of other lengths, or an error
    both, copies = joined([uncond, cond])

    def guided(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        x0_uncond, x0_cond = denoise(*copied(x, sigma, copies), **both).chunk(2)  # of (2B, C, h, w)
        return x0_uncond + scale * (x0_cond - x0_uncond)

    return guided


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
    prediction, `Predictions.cond` (Kynkäänniemi et al. 2024, arXiv:2404.07724).

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
        return torch.where(per_sample(inside.double(), x) > 0, guided(x, sigma), plain(x, sigma))

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
