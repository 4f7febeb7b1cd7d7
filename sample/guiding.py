"""From `Guidance` settings to the guided denoiser of one step: which predictions, which rule, what around it.

Called by `stream.py`. Everything here is put together from `ldm/diffusion/guidance.py`, `guidance_rules.py`
and `perturbed.py`; the plain case is `classifier_free`, as in the papers.
"""

import math
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.editing import instructions
from ldm.diffusion.guidance import (
    Conditioning,
    autoguided,
    classifier_free,
    composed,
    dynamic_threshold,
    guide,
    instructed,
    interval,
)
from ldm.diffusion.guidance_rules import Linear, PlusPlus, Projected, Rescaled, Rule
from ldm.diffusion.perturbed import perturbed_attention
from ldm.diffusion.schedule import Schedule
from sample.parts import Parts
from sample.settings import Guidance, Sampling

Weighted = Sequence[tuple[float, Conditioning]]  # prompts joined by AND: weight, what the network is told
WITHOUT_NOISE = ("ddim", "euler")  # the samplers whose step CFG++ rewrites


def check(sampling: Sampling) -> None:
    """Raises ValueError where the guidance does not go with the sampler."""
    if sampling.guide.rule == "plusplus":
        eta = (sampling.options or {}).get("eta", sampling.eta)
        if sampling.sampler not in WITHOUT_NOISE or eta:
            raise ValueError(
                f"guidance rule plusplus (CFG++) needs sampler {' or '.join(WITHOUT_NOISE)} without eta, "
                f"got {sampling.sampler}" + (f" with eta {eta}" if eta else "")
            )
    if sampling.guide.image is not None and sampling.guide != Guidance(
        sampling.guide.scale, image=sampling.guide.image, together=sampling.guide.together
    ):
        raise ValueError("guidance by a picture and a text (instruct) goes with no other kind of guidance")


def make_rule(guidance: Guidance, schedule: Schedule, sigmas: Float[Tensor, "levels"]) -> Rule:
    """The rule of one trajectory on the levels `sigmas`; with momentum it remembers, so each has its own."""
    rule: Rule
    if guidance.rule == "projected":
        rule = Projected(guidance.scale, guidance.eta, guidance.norm, guidance.momentum)
    elif guidance.rule == "plusplus":
        rule = PlusPlus(guidance.scale, sigmas)
    else:
        rule = Linear(guidance.scale)
    return Rescaled(rule, guidance.rescale, schedule) if guidance.rescale else rule


def needs_uncond(weights: Sequence[float], rule: Rule | None) -> bool:
    """Whether the unconditional prediction has a say: in `rule`, or (None) in prompts of these weights."""
    averages = math.isclose(sum(weights), 1)
    return not averages or (rule is not None and rule.only != "cond")


def fitting(weak: Parts, parts: Parts) -> Parts:
    """`weak`, if it is a model of the same latents that reads the same besides; else raises ValueError."""
    names: tuple[str, ...] = ("latent_channels", "factor", "scale_factor", "shift_factor")
    has, wanted = ([getattr(each.autoencoder.config, name) for name in names] for each in (weak, parts))
    if has != wanted:
        raise ValueError(
            f"the model for autoguidance has latents of another kind: {', '.join(names)} are {has}, "
            f"wanted {wanted}"
        )
    names = ("in_channels", "num_classes")
    has, wanted = ([getattr(each.unet.config, name) for name in names] for each in (weak, parts))
    if has != wanted:
        raise ValueError(
            f"the model for autoguidance reads something else besides latents: {', '.join(names)} are {has}, "
            f"wanted {wanted}"
        )
    return weak


def guided(
    denoise: Callable[..., Tensor],
    prompts: Weighted,
    uncond: Conditioning,
    guidance: Guidance,
    rule: Rule,
    *,
    weak: Denoise | None = None,
    perturbed: Callable[..., Tensor] | None = None,
) -> Denoise:
    """The denoiser of a step.

    denoise: (x, sigma, **conditioning) -> x0. weak: the weaker model with its own prompts, for autoguidance.
    perturbed: as `denoise`, of the network with its attention perturbed.
    """
    if guidance.plain and len(prompts) == 1 and prompts[0][0] == 1:
        return classifier_free(denoise, prompts[0][1], uncond, guidance.scale)
    if guidance.image is not None:
        if len(prompts) > 1 or prompts[0][0] != 1:
            raise ValueError("guidance by a picture and a text (instruct) takes one prompt, without AND")
        text, channels = {**prompts[0][1]}, prompts[0][1]["channels"]
        conditionings = instructions(text, {**uncond}, channels)
        return instructed(denoise, *conditionings, guidance.scale, guidance.image)
    predictions = composed(denoise, prompts, uncond, guidance.together)
    if weak is not None:
        predictions = autoguided(predictions.cond, weak, {})
    if perturbed is not None:
        of_prompts = composed(perturbed, prompts, uncond, guidance.together).cond
        made = perturbed_attention(predictions, rule, of_prompts, guidance.perturbed)
    else:
        made = guide(predictions, rule)
    if guidance.interval is not None:
        made = interval(made, predictions.cond, *guidance.interval)
    if guidance.threshold is not None:
        made = dynamic_threshold(made, *guidance.threshold)
    return made
