"""Perturbed-attention guidance: the formula, its evaluations, diffusers' with its processors on equal weights."""

from functools import partial

import pytest
import torch
from problems import draw
from torch import nn
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import composed, interval, paired
from ldm.diffusion.guidance_rules import Linear, Projected
from ldm.diffusion.perturbed import perturbed_attention
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.unet import UNet, UNetConfig
from ldm.models.variants import perturbed
from ldm.weights.diffusers import to_diffusers
from ldm.weights.diffusers_config import unet_json

CONFIG = UNetConfig(
    model_channels=16, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=8, num_heads=2, context_dim=12
)


class Counting:
    """x0 = (x + the context's sum) factor; remembers its batches."""

    def __init__(self, factor):
        self.factor, self.batches = factor, []

    def __call__(self, x, sigma, context):
        self.batches.append(len(context))
        x = x.repeat(len(context) // len(x), 1, 1, 1)  # where one x has several contexts
        return (x + context.sum(dim=(1, 2))[:, None, None, None]) * self.factor


@pytest.fixture
def setup():
    x, context = draw(2, 4, 8, 8), draw(2, 2, 5, 3, seed=1)
    return Counting(0.5), Counting(0.3), x, {"context": context[0]}, {"context": context[1]}


@pytest.mark.parametrize(
    ("guidance", "strong_batches"), [(7.5, [4]), (1, [2]), (0, [4])], ids=["guided", "plain", "unconditional"]
)
def test_formula_and_evaluations(setup, guidance, strong_batches):
    strong, weak, x, cond, uncond = setup
    predictions = paired(strong, cond, uncond)
    guided = perturbed_attention(predictions, Linear(guidance), partial(weak, **cond), 3.0)(x, 2.0)
    assert (strong.batches, weak.batches) == (strong_batches, [2])
    c, u, w = strong(x, 2.0, **cond), strong(x, 2.0, **uncond), weak(x, 2.0, **cond)
    assert_close(guided, u + guidance * (c - u) + 3 * (c - w), rtol=1e-12, atol=1e-12)


def test_scale_zero_is_the_rule_alone(setup):
    strong, weak, x, cond, uncond = setup
    guided = perturbed_attention(paired(strong, cond, uncond), Linear(1), partial(weak, **cond), 0)(x, 2.0)
    assert (strong.batches, weak.batches) == ([2], [])
    assert torch.equal(guided, strong(x, 2.0, **cond))


def test_it_stacks(setup):
    """On several prompts and another rule, within an interval of levels."""
    strong, weak, x, cond, uncond = setup
    prompts = [(2.0, cond), (-0.5, uncond)]
    predictions, theirs = (composed(network, prompts, uncond) for network in (strong, weak))
    rule = Projected(5.0, norm=1.0)
    guided = perturbed_attention(predictions, rule, theirs.cond, 2.0)
    both = interval(guided, predictions.cond, 1.0, 5.0)
    assert torch.equal(both(x, 0.5), predictions.cond(x, 0.5))
    uncond_x0, cond_x0 = predictions.both(x, 2.0)
    expected = rule(x, 2.0, uncond_x0, cond_x0) + 2 * (cond_x0 - theirs.cond(x, 2.0))
    assert_close(both(x, 2.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(setup, scale):
    strong, weak, _, cond, uncond = setup
    with pytest.raises(
        ValueError, match=f"perturbed-attention guidance must be a finite number, got {scale}"
    ):
        perturbed_attention(paired(strong, cond, uncond), Linear(1), partial(weak, **cond), scale)


@pytest.fixture(scope="module")
def networks():
    """The same random UNet twice, ours and diffusers'."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = UNet(CONFIG).double().eval().requires_grad_(False)
    for parameter in ours.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    theirs = diffusers.UNet2DConditionModel.from_config(unet_json(CONFIG)).double().eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), CONFIG), strict=True)
    return ours, theirs.requires_grad_(False)


@pytest.mark.parametrize(
    ("layers", "names"),
    [("mid", "mid"), ("down.1,up.1.0", ["down_blocks.1", "up_blocks.1.attentions.0"])],
    ids=["mid", "others"],
)
@pytest.mark.parametrize("guidance", [7.5, 1.0], ids=["guided", "plain"])
def test_equals_diffusers(networks, layers, names, guidance):
    """In eps: diffusers' three (or two) predictions in one batch, its own processors and its own sum."""
    from diffusers.models.attention_processor import (
        PAGCFGIdentitySelfAttnProcessor2_0,
        PAGIdentitySelfAttnProcessor2_0,
    )
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    ours, theirs = networks
    schedule = Schedule(DiffusionConfig())
    x, context = draw(2, 4, 8, 8, seed=2), draw(2, 2, 5, 12, seed=3)
    uncond, cond = ({"context": each} for each in context)
    timestep, scale = 300, 3.0
    sigma = float(schedule.sigmas[timestep])

    strong, weak = Denoiser(ours, schedule), Denoiser(perturbed(ours, layers), schedule)
    predictions = paired(strong, cond, uncond)
    x0 = perturbed_attention(predictions, Linear(guidance), partial(weak, **cond), scale)(x, sigma)
    eps = (x - x0) / sigma

    guided = guidance != 1
    mixin = PAGMixin()
    mixin.unet = theirs
    mixin._pag_scale, mixin._pag_adaptive_scale = scale, 0.0
    mixin.set_pag_applied_layers(
        names, (PAGCFGIdentitySelfAttnProcessor2_0(), PAGIdentitySelfAttnProcessor2_0())
    )
    before = theirs.attn_processors
    mixin._set_pag_attn_processor(mixin.pag_applied_layers, guided)
    hidden = torch.cat([context[0], context[1], context[1]] if guided else [context[1], context[1]])
    count = len(hidden) // 2
    noise = theirs(
        torch.cat([x / (sigma**2 + 1) ** 0.5] * count), timestep, encoder_hidden_states=hidden
    ).sample
    theirs.set_attn_processor(before)
    expected = mixin._apply_perturbed_attention_guidance(noise, guided, guidance, timestep)
    assert_close(eps, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    without = paired(strong, cond, uncond).cond(x, sigma)
    assert not torch.allclose(x0, without, atol=1e-2)  # the perturbation counts
