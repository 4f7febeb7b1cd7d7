"""Classifier-free guidance: its formula, its number of evaluations, and what it refuses."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.schedule import DiffusionConfig, Schedule

B = 2


class Counting:
    """A denoiser that remembers its batches; nonlinear in the conditioning, different for each sample."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, context, y):
        self.batches.append(x.shape[0])
        level = torch.as_tensor(sigma).to(x.dtype)
        level = level[:, None, None, None] if level.ndim else level
        shift = torch.tanh(context.sum(dim=(1, 2))) + y.to(x.dtype) / 10
        return x / (1 + level) + shift[:, None, None, None]


@pytest.fixture
def setup():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(2, B, 5, 3, generator=generator, dtype=torch.float64)
    cond = {"context": context[0], "y": torch.tensor([1, 2])}
    uncond = {"context": context[1], "y": torch.tensor([7, 7])}
    return Counting(), x, cond, uncond


@pytest.mark.parametrize("scale", [7.5, 2, 0.5, -1.0, 1e6])
@pytest.mark.parametrize("sigma", [3.0, torch.tensor([0.5, 3.0])])
def test_formula_in_one_batch(setup, scale, sigma):
    denoise, x, cond, uncond = setup
    guided = classifier_free(denoise, cond, uncond, scale)(x, sigma)
    assert denoise.batches == [2 * B]
    x0_cond, x0_uncond = denoise(x, sigma, **cond), denoise(x, sigma, **uncond)
    assert_close(guided, x0_uncond + scale * (x0_cond - x0_uncond), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "which"), [(1, "cond"), (1.0, "cond"), (0, "uncond"), (0.0, "uncond")])
def test_one_evaluation_at_one_and_zero(setup, scale, which):
    denoise, x, cond, uncond = setup
    guided = classifier_free(denoise, cond, uncond, scale)(x, 3.0)
    assert denoise.batches == [B]
    assert torch.equal(guided, denoise(x, 3.0, **{"cond": cond, "uncond": uncond}[which]))


def test_order_is_uncond_then_cond():
    seen = {}

    def denoise(x, sigma, context):
        seen["context"] = context
        return x

    classifier_free(denoise, {"context": torch.ones(1, 2)}, {"context": torch.zeros(1, 2)}, 2.0)(
        torch.zeros(1, 1, 1, 1), 1.0
    )
    assert seen["context"].tolist() == [[0, 0], [1, 1]]


def test_guiding_x0_is_guiding_eps():
    """At a fixed x, the guided x0 is the one that belongs to the guided noise, as the original writes it."""

    def network(x_t, t, context):
        return 0.3 * x_t + context.mean(dim=(1, 2))[:, None, None, None]

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond, uncond = torch.full((1, 2, 3), 0.9).double(), torch.full((1, 2, 3), -0.4).double()
    schedule = Schedule(DiffusionConfig())
    sigma = schedule.sigmas[600].item()
    guide = classifier_free(Denoiser(network, schedule), {"context": cond}, {"context": uncond}, 7.5)
    x_t, t = x / math.sqrt(1 + sigma**2), torch.tensor([600.0])
    eps_cond, eps_uncond = network(x_t, t, cond), network(x_t, t, uncond)
    eps = eps_uncond + 7.5 * (eps_cond - eps_uncond)
    assert_close(guide(x, sigma), x - sigma * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_must_be_finite(setup, scale):
    denoise, _, cond, uncond = setup
    with pytest.raises(ValueError, match="guidance scale must be a finite number"):
        classifier_free(denoise, cond, uncond, scale)


def test_conditionings_must_match(setup):
    denoise, _, cond, uncond = setup
    with pytest.raises(ValueError, match="conditional and unconditional inputs differ"):
        classifier_free(denoise, cond, {"context": uncond["context"]}, 7.5)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(1, 5, 3\)"):
        classifier_free(denoise, cond, {**uncond, "context": uncond["context"][:1]}, 7.5)
