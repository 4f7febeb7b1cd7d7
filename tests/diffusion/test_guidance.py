"""Guidance: closed forms on Gaussian data, diffusers' functions, numbers of evaluations, what is refused."""

import math

import pytest
import torch
from problems import draw, last
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import (
    autoguided,
    by_step,
    classifier_free,
    composed,
    dynamic_threshold,
    guide,
    instructed,
    interval,
    paired,
)
from ldm.diffusion.guidance_rules import Linear, PlusPlus, Projected, Rescaled
from ldm.diffusion.samplers import ddim, euler
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.blocks import repeat_rows

B = 2
S = 0.5  # deviation of the Gaussian data


class Counting:
    """A denoiser that remembers its batches; nonlinear in the conditioning, different for each sample."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, context, y):
        self.batches.append(len(context))
        level = torch.as_tensor(sigma).to(x.dtype)
        level = repeat_rows(level, len(context)) if level.ndim else level
        x, y = repeat_rows(x, len(context)), repeat_rows(y, len(context))
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
        return repeat_rows(x, len(context))

    classifier_free(denoise, {"context": torch.ones(1, 2)}, {"context": torch.zeros(1, 2)}, 2.0)(
        torch.zeros(1, 1, 1, 1), 1.0
    )
    assert seen["context"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("sigma", [3.0, torch.tensor([0.5, 3.0])])
@pytest.mark.parametrize("guided", [classifier_free, lambda *a: guide(paired(*a[:3]), Linear(a[3]))])
def test_x_goes_in_once_where_only_the_context_differs(setup, guided, sigma):
    """Told apart by the objects: other values that are the same one are not copied either."""
    denoise, x, cond, uncond = setup
    shapes = []

    def noting(x, sigma, **conditioning):
        level = (len(sigma),) if isinstance(sigma, torch.Tensor) else ()
        shapes.append((len(x), *level, *(len(conditioning[name]) for name in ("context", "y"))))
        return denoise(x, sigma, **conditioning)

    level = [B] if isinstance(sigma, torch.Tensor) else []
    same = {**uncond, "y": cond["y"]}
    apart = denoise(x, sigma, **same) * -6.5 + denoise(x, sigma, **cond) * 7.5
    for other, sizes in ((same, [B, *level, 2 * B, B]), ({**same, "y": cond["y"].clone()}, [2 * B])):
        assert_close(guided(noting, cond, other, 7.5)(x, sigma), apart, rtol=1e-12, atol=1e-12)
        assert shapes.pop()[: len(sizes)] == tuple(sizes)


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


def test_prompts_of_other_lengths_go_in_batches_of_their_own(setup):
    """No padding: each x0 is that of its own conditioning, in any order of lengths."""
    denoise, x, cond, uncond = setup
    long = {"context": torch.cat([cond["context"], uncond["context"]], dim=1), "y": cond["y"]}
    x0_uncond, x0_long, x0_cond = (denoise(x, 3.0, **each) for each in (uncond, long, cond))
    denoise.batches.clear()
    guided = classifier_free(denoise, long, uncond, 7.5)(x, 3.0)
    assert denoise.batches == [B, B]
    assert_close(guided, x0_uncond + 7.5 * (x0_long - x0_uncond), rtol=1e-12, atol=1e-12)
    denoise.batches.clear()
    guided = guide(composed(denoise, [(0.5, long), (2, cond)], uncond), Linear(3))(x, 3.0)
    assert denoise.batches == [2 * B, B]
    expected = x0_uncond + 1.5 * (x0_long - x0_uncond) + 6 * (x0_cond - x0_uncond)
    assert_close(guided, expected, rtol=1e-12, atol=1e-12)


def test_one_at_a_time_for_less_memory(setup):
    denoise, x, cond, uncond = setup
    apart = guide(paired(denoise, cond, uncond, together=False), Linear(7.5))(x, 3.0)
    assert denoise.batches == [B, B]
    assert_close(apart, classifier_free(denoise, cond, uncond, 7.5)(x, 3.0), rtol=1e-12, atol=1e-12)


# Gaussian data N(m, S^2) given a conditioning m, and its exact denoiser


def exact(x, sigma, mean):
    return (S**2 * x + sigma**2 * mean[:, None, None, None]) / (S**2 + sigma**2)


def about(*means):
    """Conditionings of a batch of one with these means."""
    return [{"mean": torch.tensor([mean], dtype=torch.float64)} for mean in means]


def path(x, sigma, sigma_next, mean):
    """The exact solution of dx/dsigma = (x - D) / sigma for N(mean, S^2)."""
    return mean + (x - mean) * ((S**2 + sigma_next**2) / (S**2 + sigma**2)) ** 0.5


def grid(steps, high=10.0, low=0.02):
    return torch.cat([torch.logspace(math.log10(high), math.log10(low), steps), torch.zeros(1)]).double()


@pytest.mark.parametrize("scale", [0, 0.3, 1, 7.5, -2])
def test_linear_guidance_moves_the_mean(scale):
    """It is the exact denoiser of N(m_u + w (m_c - m_u), S^2)."""
    cond, uncond = about(1.5, -0.4)
    x = draw(1, 4, 8, 8)
    guided = classifier_free(exact, cond, uncond, scale)(x, 1.7)
    assert_close(guided, exact(x, 1.7, about(-0.4 + scale * 1.9)[0]["mean"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.2), (1, -0.5), (0.7, 0.2, 0.1), (3, 0, 2)])
@pytest.mark.parametrize("scale", [0, 1, 4.5])
def test_composition_moves_the_mean_by_each_prompt(weights, scale):
    means = (1.5, 0.3, -2.0)[: len(weights)]
    (uncond,) = about(-0.4)
    prompts = list(zip(weights, about(*means), strict=True))
    x = draw(1, 4, 8, 8)
    guided = guide(composed(exact, prompts, uncond), Linear(scale))(x, 1.7)
    mean = -0.4 + sum(scale * w * (m + 0.4) for w, m in zip(weights, means, strict=True))
    assert_close(guided, exact(x, 1.7, **about(mean)[0]), rtol=1e-12, atol=1e-12)


def test_evaluations_of_a_composition(setup):
    denoise, x, cond, uncond = setup
    other = {"context": cond["context"] * 2, "y": cond["y"]}

    def count(weights, scale):
        prompts = list(zip(weights, (cond, other), strict=False))
        denoise.batches.clear()
        guide(composed(denoise, prompts, uncond), Linear(scale))(x, 3.0)
        return denoise.batches

    assert count((1, 0.5), 7.5) == [3 * B]
    assert count((1, 0), 7.5) == [2 * B]  # a prompt without weight
    assert count((1, 0.5), 0) == [B]
    assert count((1, 0.5), 1) == [3 * B]
    assert count((0.7, 0.3), 1) == [2 * B]  # an average needs no unconditional prediction
    assert count((1,), 1) == [B]


def test_a_composition_of_one_is_classifier_free_guidance(setup):
    denoise, x, cond, uncond = setup
    for scale in (0, 1, 7.5):
        one = guide(composed(denoise, [(1.0, cond)], uncond), Linear(scale))(x, 3.0)
        assert torch.equal(one, classifier_free(denoise, cond, uncond, scale)(x, 3.0))


def test_autoguidance():
    """Beyond a weak model of deviation 1: its two means and slopes extrapolated."""

    def weak(x, sigma, mean):
        return (x + sigma**2 * (0.8 * mean)[:, None, None, None]) / (1 + sigma**2)

    (cond,) = about(1.5)
    x = draw(1, 4, 8, 8)
    x0, x0_weak = exact(x, 1.7, **cond), weak(x, 1.7, **cond)
    assert not torch.allclose(x0, x0_weak)
    predictions = autoguided(exact, weak, cond)
    assert_close(guide(predictions, Linear(2.5))(x, 1.7), x0_weak + 2.5 * (x0 - x0_weak), rtol=1e-12, atol=0)
    assert torch.equal(guide(predictions, Linear(1))(x, 1.7), x0)
    assert torch.equal(guide(predictions, Linear(0))(x, 1.7), x0_weak)


@pytest.mark.parametrize(("scale", "main", "weak"), [(2.5, [B], [B]), (1, [B], []), (0, [], [B])])
def test_evaluations_of_autoguidance(setup, scale, main, weak):
    denoise, x, cond, _ = setup
    other = Counting()
    guide(autoguided(denoise, other, cond), Linear(scale))(x, 3.0)
    assert (denoise.batches, other.batches) == (main, weak)


def test_two_scales_of_instructpix2pix():
    full, image, nothing = about(2.0, 0.7, -0.4)
    x = draw(1, 4, 8, 8)
    guided = instructed(exact, full, image, nothing, 7.5, 1.5)(x, 1.7)
    mean = -0.4 + 1.5 * (0.7 + 0.4) + 7.5 * (2.0 - 0.7)
    assert_close(guided, exact(x, 1.7, **about(mean)[0]), rtol=1e-12, atol=1e-12)
    assert_close(instructed(exact, full, image, nothing, 1, 1)(x, 1.7), exact(x, 1.7, **full))
    with pytest.raises(ValueError, match="guidance scale must be a finite number, got nan"):
        instructed(exact, full, image, nothing, 7.5, math.nan)


# Rescale


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("phi", [0, 0.7, 1.0])
def test_rescale_equals_diffusers_on_the_network_output(prediction, phi):
    utils = pytest.importorskip("diffusers.guiders.guider_utils")
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    sigma = schedule.sigmas[700].item()
    x = (1 + sigma**2) ** 0.5 * draw(B, 4, 8, 8)
    outputs = {0.0: draw(B, 4, 8, 8, seed=1) + 0.3, 1.0: 0.6 * draw(B, 4, 8, 8, seed=2)}

    def network(x_t, t, which):
        return torch.cat([outputs[float(i)] for i in which[::B]])

    cond, uncond = {"which": torch.ones(B)}, {"which": torch.zeros(B)}
    denoise = Denoiser(network, schedule)
    rule = Rescaled(Linear(7.5), phi, schedule)
    output = outputs[0.0] + 7.5 * (outputs[1.0] - outputs[0.0])
    output = utils.rescale_noise_cfg(output, outputs[1.0], guidance_rescale=phi)
    expected = Denoiser(lambda x_t, t: output, schedule)(x, sigma)
    assert_close(guide(paired(denoise, cond, uncond), rule)(x, sigma), expected, rtol=1e-10, atol=1e-10)
    per_sample = guide(paired(denoise, cond, uncond), rule)(x, torch.tensor([sigma, sigma], dtype=x.dtype))
    assert_close(per_sample, expected, rtol=1e-10, atol=1e-10)


def test_rescale_restores_the_deviation(setup):
    """phi = 1 on x0: each sample has the deviation of its conditional prediction, whatever the scale."""
    denoise, x, cond, uncond = setup

    def uneven(x, sigma, context, y):
        return denoise(x, sigma, context, y) + context.mean(dim=(1, 2))[:, None, None, None] * x**2

    schedule = Schedule(DiffusionConfig(prediction="x0"))
    plain = classifier_free(uneven, cond, uncond, 12)(x, 3.0)
    guided = guide(paired(uneven, cond, uncond), Rescaled(Linear(12), 1, schedule))(x, 3.0)
    wanted = uneven(x, 3.0, **cond).std(dim=(1, 2, 3))
    assert_close(guided.std(dim=(1, 2, 3)), wanted, rtol=1e-12, atol=0)
    assert (plain.std(dim=(1, 2, 3)) > 1.2 * wanted).any()


@pytest.mark.parametrize(("scale", "phi", "expected"), [(1, 0.7, [B]), (0, 0, [B]), (0, 0.7, [2 * B])])
def test_evaluations_of_rescale(setup, scale, phi, expected):
    denoise, x, cond, uncond = setup
    rule = Rescaled(Linear(scale), phi, Schedule(DiffusionConfig()))
    guided = guide(paired(denoise, cond, uncond), rule)(x, 3.0)
    assert denoise.batches == expected
    if expected == [B]:
        assert torch.equal(guided, denoise(x, 3.0, **(cond if scale else uncond)))


def test_rescale_of_a_constant_output_is_finite():
    cond, uncond = about(1.5, -0.4)
    schedule = Schedule(DiffusionConfig(prediction="x0"))
    x = torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    guided = guide(paired(exact, cond, uncond), Rescaled(Linear(7.5), 1, schedule))(x, 1.7)
    assert bool(torch.isfinite(guided).all())


@pytest.mark.parametrize("phi", [-0.1, 1.5, math.nan])
def test_rescale_out_of_range(phi):
    with pytest.raises(ValueError, match=f"guidance rescale must be between 0 and 1, got {phi}"):
        Rescaled(Linear(7.5), phi, Schedule(DiffusionConfig()))


# Adaptive projected guidance


@pytest.mark.parametrize(
    ("eta", "norm", "momentum"), [(0.0, None, 0.0), (0.3, 4.0, 0.0), (1.0, 15, -0.5), (0, 2.5, -0.75)]
)
def test_projection_equals_diffusers(eta, norm, momentum):
    apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    rule = Projected(7.5, eta=eta, norm=norm, momentum=momentum)
    buffer = apg.MomentumBuffer(momentum)
    for step in range(4):
        cond, uncond = draw(B, 4, 8, 8, seed=step), draw(B, 4, 8, 8, seed=10 + step)
        expected = apg.normalized_guidance(
            cond, uncond, 6.5, buffer, eta, norm or 0.0, use_original_formulation=True
        )
        assert_close(rule(cond, 3.0, uncond, cond), expected, rtol=1e-12, atol=1e-12)


def test_projection_in_closed_form():
    x = draw(1, 4, 8, 8)
    cond = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    cond[0, 0] = 3.0
    along, across = torch.zeros_like(cond), torch.zeros_like(cond)
    along[0, 0], across[0, 1] = 2.0, 5.0

    def by(rule, delta):
        return rule(x, 1.0, cond - delta, cond)

    assert_close(by(Projected(4), along), cond)  # what lies along cond is dropped
    assert_close(by(Projected(4, eta=0.5), along), cond + 3 * 0.5 * along)
    assert_close(by(Projected(4), across), cond + 3 * across)  # what lies across it is kept
    assert_close(by(Projected(4, norm=1), across), cond + 3 * across / 5)
    assert_close(by(Projected(4, norm=6), across), cond + 3 * across)
    assert_close(by(Projected(4, eta=1), along + across), by(Linear(4), along + across))
    assert torch.equal(Projected(4)(x, 1.0, x, 0 * x), -0.0 * x - 3 * x)  # no direction to project on


def test_projection_at_one_is_conditional(setup):
    denoise, x, cond, uncond = setup
    guided = guide(paired(denoise, cond, uncond), Projected(1, momentum=-0.5))(x, 3.0)
    assert denoise.batches == [B]
    assert torch.equal(guided, denoise(x, 3.0, **cond))
    unprojected = guide(paired(denoise, cond, uncond), Projected(0, eta=1))(x, 3.0)
    assert_close(unprojected, denoise(x, 3.0, **uncond), rtol=1e-12, atol=1e-12)


def test_momentum_is_for_one_trajectory():
    rule = Projected(7.5, momentum=-0.5)
    rule(draw(2, 4, 8, 8), 3.0, draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1))
    with pytest.raises(ValueError, match=r"one trajectory: made for \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        rule(draw(1, 4, 8, 8), 3.0, draw(1, 4, 8, 8), draw(1, 4, 8, 8, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "guidance scale must be a finite number, got nan"),
        ({"scale": 2, "eta": math.inf}, "eta of projected guidance must be a finite number, got inf"),
        ({"scale": 2, "norm": 0}, "norm of projected guidance must be above 0, got 0"),
        ({"scale": 2, "momentum": 1}, "momentum of projected guidance must be between -1 and 1, got 1"),
    ],
)
def test_projection_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Projected(**options)


# CFG++


@pytest.mark.parametrize("sampler", [euler, ddim])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_cfg_plus_plus_renoises_with_the_unconditional(sampler, steps):
    cond, uncond = about(1.5, -0.4)
    sigmas, x = grid(steps), 10 * draw(1, 4, 8, 8)
    plus = guide(paired(exact, cond, uncond), PlusPlus(0.6, sigmas))
    result = last(sampler(plus, x, sigmas)).x
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x0_uncond, x0_cond = exact(x, sigma, **uncond), exact(x, sigma, **cond)
        x = x0_uncond + 0.6 * (x0_cond - x0_uncond) + sigma_next * (x - x0_uncond) / sigma
    assert_close(result, x, rtol=1e-11, atol=1e-11)


def test_evaluations_of_cfg_plus_plus(setup):
    denoise, x, cond, uncond = setup
    rule = PlusPlus(0, grid(5))
    assert torch.equal(guide(paired(denoise, cond, uncond), rule)(x, 10.0), denoise(x, 10.0, **uncond))
    assert denoise.batches == [B, B]
    last_level = grid(5)[-2].item()
    assert PlusPlus(1, grid(5)).scale(last_level) == 1  # then the last x0 is the conditional one


@pytest.mark.parametrize("sigma", [0.0, 3.0, 11.0])
def test_cfg_plus_plus_follows_its_grid(sigma):
    with pytest.raises(ValueError, match=f"follows its own grid of levels .*; {sigma} is not on it"):
        PlusPlus(0.6, grid(5)).scale(sigma)


# Around any denoiser


def test_interval_in_closed_form():
    """Guided between two levels only: three exact paths one after the other, and Euler comes close to them."""
    cond, uncond = about(1.5, -0.4)
    x = 10 * draw(1, 1, 4, 4)
    predictions = paired(exact, cond, uncond)
    limited = interval(guide(predictions, Linear(4)), predictions.cond, 0.5, 2.0)
    moved = -0.4 + 4 * 1.9
    expected = path(path(path(x, 10.0, 2.0, 1.5), 2.0, 0.5, moved), 0.5, 0.0, 1.5)
    result = last(euler(limited, x, grid(1000, low=1e-3))).x
    assert_close(result, expected, rtol=0.01, atol=0.01)
    always = path(x, 10.0, 0.0, moved)
    assert (always - expected).abs().min() > 1


@pytest.mark.parametrize(("sigma", "evaluations"), [(0.5, B), (0.51, 2 * B), (2.0, 2 * B), (2.01, B)])
def test_evaluations_of_an_interval(setup, sigma, evaluations):
    denoise, x, cond, uncond = setup
    predictions = paired(denoise, cond, uncond)
    guided = guide(predictions, Linear(7.5))
    limited = interval(guided, predictions.cond, 0.5, 2)(x, sigma)
    assert denoise.batches == [evaluations]
    assert torch.equal(limited, guided(x, sigma) if evaluations > B else denoise(x, sigma, **cond))


def test_interval_with_a_level_for_each_sample(setup):
    denoise, x, cond, uncond = setup
    predictions = paired(denoise, cond, uncond)
    guided = guide(predictions, Linear(7.5))
    sigma = torch.tensor([1.0, 3.0])
    limited = interval(guided, predictions.cond, 0.5, math.inf)(x, sigma)
    assert torch.equal(limited, guided(x, sigma))
    limited = interval(guided, predictions.cond, 0.5, 2)(x, sigma)
    assert torch.equal(limited[0], guided(x, sigma)[0])
    assert torch.equal(limited[1], denoise(x, sigma, **cond)[1])


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (2, 2), (3, 1), (math.nan, 1), (0, math.nan)])
def test_interval_refuses(low, high):
    with pytest.raises(ValueError, match="guidance interval needs 0 <= low < high"):
        interval(exact, exact, low, high)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_equals_diffusers(ratio):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=1e9, clip_sample=False
    )
    x0 = torch.tensor([0.3, 5.0])[:, None, None, None] * draw(B, 4, 8, 8, dtype=torch.float32)
    ours = dynamic_threshold(lambda x, sigma: x0, ratio)(x0, 3.0)
    assert_close(ours, scheduler._threshold_sample(x0), rtol=1e-6, atol=1e-6)


def test_dynamic_thresholding_keeps_the_range():
    x0 = torch.arange(-50, 51).double().reshape(1, 1, 1, 101) / 10  # -5..5
    inside = dynamic_threshold(lambda x, sigma: x0, limit=5.0)(x0, 3.0)
    assert torch.equal(inside, x0)  # nothing is beyond
    cut = dynamic_threshold(lambda x, sigma: x0, percentile=0.5, limit=2.0)(x0, 3.0)
    assert_close(cut, x0.clamp(-2.5, 2.5) * 2 / 2.5)  # half of |x0| is below 2.5


@pytest.mark.parametrize(("percentile", "limit"), [(1.1, 1), (-0.1, 1), (math.nan, 1)])
def test_percentile_out_of_range(percentile, limit):
    with pytest.raises(ValueError, match="percentile of dynamic thresholding must be between 0 and 1"):
        dynamic_threshold(exact, percentile, limit)


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match="limit of dynamic thresholding must be above 0"):
        dynamic_threshold(exact, 0.995, limit)


def test_prompts_by_step():
    """Each level of the grid begins its step; one in between, as second-order samplers ask, lies in it."""
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    stepped = by_step(sigmas, lambda step: lambda x, sigma: torch.full_like(x, step))
    x = torch.zeros(1, 1, 1, 1)
    levels = [9.0, 8.0, 7.9, 4.0, 3.0, 2.0, 0.5, torch.tensor(4.0, dtype=torch.float64)]
    assert [int(stepped(x, sigma)) for sigma in levels] == [0, 0, 0, 1, 1, 2, 2, 1]
    means = about(1.5, -0.4, 0.2)
    x = 8 * draw(1, 1, 4, 4)
    changing = by_step(sigmas, lambda step: lambda x, sigma: exact(x, sigma, **means[step]))
    result = last(euler(changing, x, sigmas)).x
    for sigma, sigma_next, mean in zip([8.0, 4.0, 2.0], [4.0, 2.0, 0.0], means, strict=True):
        x0 = exact(x, sigma, **mean)
        x = x + (sigma_next - sigma) * (x - x0) / sigma
    assert_close(result, x)


def test_all_of_it_stacks(setup):
    """Composition, projection, rescale, interval, thresholding and steps: one batch, finite, repeatable."""
    denoise, x, cond, uncond = setup
    other = {"context": cond["context"] * 2, "y": cond["y"]}
    sigmas = grid(4)

    def build():
        predictions = composed(denoise, [(0.7, cond), (-0.3, other)], uncond)
        rule = Rescaled(Projected(7.5, norm=2.5, momentum=-0.5), 0.7, Schedule(DiffusionConfig()))
        guided = interval(guide(predictions, rule), predictions.cond, 0.1, 5)
        return by_step(sigmas, lambda step: dynamic_threshold(guided, limit=3))

    one, two = (last(euler(build(), 10 * x, sigmas)).x for _ in range(2))
    assert torch.equal(one, two) and bool(torch.isfinite(one).all()) and float(one.abs().max()) <= 3 + 1e-12
    assert denoise.batches[:4] == [3 * B] * 4


@pytest.mark.parametrize("scale", [1e6, -1e6])
def test_far_scales_stay_finite(setup, scale):
    denoise, x, cond, uncond = setup
    predictions = paired(denoise, cond, uncond)
    for rule in (Linear(scale), Rescaled(Linear(scale), 0.7, Schedule(DiffusionConfig())), Projected(scale)):
        assert bool(torch.isfinite(guide(predictions, rule)(x, 3.0)).all())


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_composition_refuses(setup, weight):
    denoise, _, cond, uncond = setup
    with pytest.raises(ValueError, match=f"weight of a prompt must be a finite number, got {weight}"):
        composed(denoise, [(weight, cond)], uncond)
    with pytest.raises(ValueError, match="at least one of the 2 prompts needs a weight other than 0"):
        composed(denoise, [(0, cond), (0.0, cond)], uncond)
    with pytest.raises(ValueError, match="conditional and unconditional inputs differ"):
        composed(denoise, [(1, cond), (1, {"context": cond["context"][:1], "y": cond["y"][:1]})], uncond)
