"""Perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377): away from a model that sees less
structure.

    guided = rule(uncond, cond) + scale (cond - weak)

weak is the prediction for the same prompt of `models/variants.py`'s `perturbed(unet)`, whose self-attention
is partly the identity. It needs no unconditional prediction, and joins any rule of `guidance_rules.py`:

    weak = Denoiser(perturbed(unet), schedule)
    perturbed_attention(paired(denoise, cond, uncond), Linear(7.5), partial(weak, **cond), 3.0)
"""

import math

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance import Predictions, guide
from ldm.diffusion.guidance_rules import Rule, Sigma


def perturbed_attention(predictions: Predictions, rule: Rule, weak: Denoise, scale: float | int) -> Denoise:
    """The guided denoiser: rule(uncond, cond) + scale (cond - weak), each a prediction of x0.

    The weights sum to 1, so that guiding eps or v is the same. Where the rule needs only cond (`Linear(1)`),
    a step is two evaluations of B, else three. `rule` comes first: a `Rescaled` one rescales its own part and
    leaves the move away from `weak` as it is.

    weak: the perturbed network's denoiser with the conditioning of `predictions.cond` (of several prompts:
    the `cond` of `composed` on it). scale: 3 is diffusers' default; 0 does not evaluate `weak`. Raises
    ValueError for a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale of perturbed-attention guidance must be a finite number, got {scale}")
    if scale == 0:
        return guide(predictions, rule)

    def guided(x: Float[Tensor, "B C h w"], sigma: Sigma) -> Float[Tensor, "B C h w"]:
        if rule.only == "cond":
            cond = x0 = predictions.cond(x, sigma)
        else:
            uncond, cond = predictions.both(x, sigma)
            x0 = rule(x, sigma, uncond, cond)
        return x0 + scale * (cond - weak(x, sigma))

    return guided
