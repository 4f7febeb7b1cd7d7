"""Sampling one batch: prompts and noise to a sampler's steps. The middle of the walk from command to pixels.

`stream` reads the prompts (`words.py`), guides the denoiser with them (`guiding.py`), starts from noise or a
picture (`start.py`), hands all to a sampler of `ldm/diffusion/samplers.py` and yields what that yields.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.editing import concatenated, keep_known, resampled
from ldm.diffusion.grids import make_grid, usual_grid
from ldm.diffusion.guidance import Conditioning, by_step, composed
from ldm.diffusion.guidance_rules import Rule
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import Step, check_options, find_sampler
from ldm.diffusion.schedule import Schedule
from ldm.models.variants import perturbed
from sample import guiding
from sample.control import UNSTEERED, Steering
from sample.parts import Parts
from sample.settings import Sampling
from sample.start import Start, reads, with_channels
from sample.words import Words, read


@torch.no_grad()
def stream(
    parts: Parts, prompts: Sequence[str], *, first: int = 0, start: Start | None = None, **how: Any
) -> Iterator[Step]:
    """Sample one batch, a picture a prompt, and yield every step.

    first: number of the first picture, of its seed. start: what to start from, whose size counts then; with
    strength 0 there is no step to yield. how: the fields of `Sampling`. `decode(step.sample)` of the last
    step is the result. What happens between steps (progress, previews of `step.denoised`, stopping) is up to
    the caller.

    Raises ValueError for an unknown sampler, schedule or option, steps outside 1..T, an illegal size, a
    prompt that the model cannot read, guidance or a control that does not fit, and latents that are not
    finite after a step.
    """
    sampling = Sampling(**how)
    sigmas = checked_levels(parts, sampling, start)
    if not prompts:
        raise ValueError("at least one prompt is needed; the empty one is unconditional")
    start = start or Start()
    latents, numbers = start.latents, range(first, first + len(prompts))
    shape = parts.latent_shape(sampling.size) if latents is None else tuple(latents.shape[1:])
    start = with_channels(parts, start, shape, sampling, numbers)
    steering = Steering.of(parts, sampling.controls, shape, len(prompts))
    words = read(parts, prompts, sampling.wording, len(sigmas) - 1)
    groups, runs = words.groups(), []
    for rows in groups:
        given = start if len(groups) == 1 else start.rows(rows)
        more, steers = given.told(len(rows)), steering.rows(rows)
        denoise = denoiser(parts, prompts, words, rows, sampling, sigmas, more, steers)
        runs.append(
            trajectory(parts, denoise, sampling, sigmas, shape, [numbers[row] for row in rows], given)
        )
    return runs[0] if len(runs) == 1 else lockstep(runs, groups)


def checked_levels(parts: Parts, sampling: Sampling, start: Start | None) -> Float[Tensor, "levels"]:
    """`levels`, once all is checked that needs no prompt; raises ValueError as `stream`."""
    guiding.check(sampling)
    sampler_options(sampling, parts.schedule)
    return levels(parts, sampling, start)


def levels(parts: Parts, sampling: Sampling, start: Start | None) -> Float[Tensor, "levels"]:
    """The noise levels that are visited, (steps taken + 1,) falling."""
    schedule, steps = parts.schedule, sampling.steps
    whole, taken = (steps, steps) if start is None else start.grid(steps, schedule.num_timesteps)
    usual = usual_grid(schedule, find_sampler(sampling.sampler).spacing)
    return make_grid(schedule, sampling.schedule or usual, whole)[-(taken + 1) :]


def denoiser(
    parts: Parts,
    prompts: Sequence[str],
    words: Words,
    rows: Sequence[int],
    sampling: Sampling,
    sigmas: Float[Tensor, "levels"],
    more: Conditioning,
    steering: Steering,
) -> Denoise:
    """The guided denoiser of these rows of a batch, for prompts that change with the step too.

    more: what the network is told besides prompts. steering: the controls of these rows.
    """
    guidance, steps = sampling.guide, len(sigmas) - 1
    if not words.contexts:  # a model that reads nothing: both predictions would be the same
        read(parts, [sampling.negative], sampling.wording, steps)  # raises where there is one
        guidance = replace(guidance, scale=1)
    rule = guiding.make_rule(guidance, parts.schedule, sigmas)
    worse = perturbed(parts.unet, guidance.perturbed_layers) if guidance.perturbed else None
    weak = None

    def told_to(
        model: Parts, words: Words, rows: Sequence[int], rule: Rule | None, marks: bool = False
    ) -> Told:
        weights = [words.weights(rows[0], step) for step in range(steps)]  # all rows of a group agree
        # With a picture's guidance the empty prompt counts whatever the scale
        needed = guidance.image is not None or any(guiding.needs_uncond(each, rule) for each in weights)
        negative = [sampling.negative]
        uncond = read(model, negative, sampling.wording, steps, composed=False) if needed else None
        return Told(words, uncond, rows, more, marks)

    own_rule = None if guidance.weak is not None else rule
    told = told_to(parts, words, rows, own_rule, steering.spares_unconditional)
    if guidance.weak is not None:
        model = guiding.fitting(guidance.weak, parts)
        weak = evaluated(model, model.network)
        own = read(model, [prompts[row] for row in rows], sampling.wording, steps)
        told_weak = told_to(model, own, range(len(rows)), None)

    def at(step: int) -> Denoise:
        weaker = None if weak is None else composed(weak, *told_weak(step), guidance.together).cond
        network = evaluated(parts, parts.network, steering, step, steps)
        pag = None if worse is None else evaluated(parts, worse, steering, step, steps)
        return guiding.guided(network, *told(step), guidance, rule, weak=weaker, perturbed=pag)

    at_key = cache(lambda key: at(first_of[key]))
    keys = [(told.key(step), steering.key(step, steps)) for step in range(steps)]
    first_of = {key: keys.index(key) for key in dict.fromkeys(keys)}
    if len(first_of) == 1:
        return at(0)
    return by_step(sigmas, lambda step: at_key(keys[step]))


def evaluated(
    parts: Parts,
    network: Callable[..., Tensor],
    steering: Steering = UNSTEERED,
    step: int = 0,
    steps: int = 1,
) -> Denoiser:
    """The network of a model as a denoiser, steered as in this step; of one that reads channels besides, with
    these as a keyword."""
    network = concatenated(network) if reads(parts) else network
    return Denoiser(steering.around(network, step, steps), parts.schedule, parts.dtype)


@dataclass(frozen=True)
class Told:
    """What a network is told of a group of rows at a step: (weighted prompts, unconditional)."""

    words: Words
    uncond: Words | None  # the negative prompt, read; None where it has no say
    rows: Sequence[int]
    more: Conditioning  # whatever the prompts say
    marks: bool = False  # tell prompts from the unconditional, for a control that spares the latter

    def __call__(self, step: int) -> tuple[guiding.Weighted, Conditioning]:
        yes, no = ({"controlled": torch.full((len(self.rows),), each)} for each in (True, False))
        yes, no = (yes, no) if self.marks else ({}, {})
        prompts = [
            (weight, {**each, **self.more, **yes}) for weight, each in self.words.told(self.rows, step)
        ]
        if self.uncond is None:
            return prompts, prompts[0][1]
        [(_, nothing)] = self.uncond.told([0] * len(self.rows), step)
        return prompts, {**nothing, **self.more, **no}

    def key(self, step: int) -> object:
        """Equal for steps at which the same is told."""
        return self.words.key(self.rows, step), self.uncond and self.uncond.key([0], step)


def trajectory(
    parts: Parts,
    denoise: Denoise,
    sampling: Sampling,
    sigmas: Float[Tensor, "levels"],
    shape: tuple[int, ...],
    numbers: Sequence[int],
    start: Start,
) -> Iterator[Step]:
    """The sampler's steps for pictures by number, each with its own noise."""

    def draw(kind: str, *step: int) -> Tensor:
        return parts.draw(kind, shape, sampling.seed, numbers, *step, variation=sampling.variation)

    noise, sampler = draw("image"), find_sampler(sampling.sampler).function
    x = to_sigma_scale(noise, float(sigmas[0]))
    known, mask = start.latents, start.mask
    if known is not None and start.strength != 1:  # 1 forgets it: exactly what a prompt alone starts from
        x = known + float(sigmas[0]) * noise
    if known is not None and mask is not None:
        denoise = keep_known(denoise, known, noise, mask)
    options = sampler_options(sampling, parts.schedule)
    if start.resample > 1:
        sampler = partial(resampled, sampler, times=start.resample)
    steps = sampler(denoise, x, sigmas, noise=lambda *step: draw("step", *step), **options)
    while True:
        with torch.no_grad():  # not around the yield, which would reach into the caller's code
            step = next(steps, None)
        if step is None:
            return
        if not bool(torch.isfinite(step.x).all()):
            raise ValueError(
                f"latents are not finite after step {step.index + 1} of {len(sigmas) - 1} (sampler "
                f"{sampling.sampler}, guidance {sampling.guide.scale:g}, {parts.dtype}); try a lower "
                "guidance, or float32"
            )
        if known is not None and mask is not None and step.index == len(sigmas) - 2:
            step = replace(step, sigma=0.0, x=torch.where(mask, step.sample, known))
        yield step


def lockstep(runs: Sequence[Iterator[Step]], groups: Sequence[Sequence[int]]) -> Iterator[Step]:
    """The steps of the groups of a batch as steps of the whole batch, its rows in their order."""
    order = torch.tensor([row for rows in groups for row in rows]).argsort()
    for steps in zip(*runs, strict=True):
        x, denoised = (
            torch.cat([getattr(step, name) for step in steps])[order.to(steps[0].x.device)]
            for name in ("x", "denoised")
        )
        yield replace(steps[0], x=x, denoised=denoised)


def sampler_options(sampling: Sampling, schedule: Schedule) -> dict[str, Any]:
    """The options of the sampler beyond the common ones. Raises ValueError for one that it does not have."""
    own = {**(sampling.options or {}), **({} if sampling.eta is None else {"eta": sampling.eta})}
    check_options(sampling.sampler, own)
    counts_timesteps = "schedule" in inspect.signature(find_sampler(sampling.sampler).function).parameters
    return {**own, "schedule": schedule} if counts_timesteps else own
