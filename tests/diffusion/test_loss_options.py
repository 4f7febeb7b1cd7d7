"""Weightings, densities, distances and maps of the loss: closed forms, and one quantity whatever is predicted."""

import math

import pytest
import torch
from problems import draw
from torch.testing import assert_close

from ldm.diffusion.denoiser import ROWS
from ldm.diffusion.loss import (
    WEIGHTINGS,
    LossConfig,
    by_density,
    diffusion_loss,
    distance,
    loss_weight,
    trained_timesteps,
    x0_weight,
)
from ldm.diffusion.process import add_noise, per_sample
from ldm.diffusion.schedule import PREDICTIONS, DiffusionConfig, Schedule

SIGMA_DATA = 0.5


def schedule_of(prediction, **values):
    form = "flow" if prediction == "flow" else "scaled_linear"
    return Schedule(DiffusionConfig(schedule=form, prediction=prediction, sigma_data=SIGMA_DATA, **values))


# ---- weightings ----


@pytest.mark.parametrize(
    ("config", "of_x0"),
    [
        (LossConfig("min_snr"), [1, 4, 5]),
        (LossConfig("soft_min_snr"), [5 / 6, 20 / 9, 80 / 21]),
        (LossConfig("soft_min_snr", math.inf), [1, 4, 16]),
        (LossConfig("p2"), [1 / 2, 4 / 5, 16 / 17]),
        (LossConfig("p2", p2_k=2.0, p2_gamma=0.5), [1 / 3**0.5, 4 / 6**0.5, 16 / 18**0.5]),
        (LossConfig("p2", p2_gamma=0.0), [1, 4, 16]),
        (LossConfig("edm"), [5, 8, 20]),
    ],
)
def test_weights_by_hand(config, of_x0):
    """At SNR 1, 4, 16: of x0, and divided by how much larger the error of each other prediction is."""
    ratio = torch.tensor([1, 4, 16], dtype=torch.float64)
    alpha_bar, expected = ratio / (1 + ratio), torch.tensor(of_x0, dtype=torch.float64)
    assert_close(x0_weight(ratio, config, SIGMA_DATA), expected, rtol=1e-12, atol=0)
    larger = {"x0": [1, 1, 1], "eps": [1, 4, 16], "v": [2, 5, 17], "flow": [4, 9, 25], "edm": [5, 8, 20]}
    assert larger.keys() == set(PREDICTIONS)
    for prediction, factors in larger.items():
        weight = loss_weight(alpha_bar, prediction, config, SIGMA_DATA)
        assert_close(weight, expected / torch.tensor(factors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "simple"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_minimises_the_same(prediction, weighting):
    """x0_weight |x0 - estimate|^2, the estimate made of the network's output as in sampling."""
    x0, noise, wrong = draw(3, 4, 2, 4, 4)
    schedule, config = schedule_of(prediction), LossConfig(weighting)
    t = torch.tensor([0, 100, 500, 900])
    estimate, levels = x0 + 0.1 * wrong, schedule.sigmas[t]
    row = ROWS[prediction](levels, schedule)

    def predict(seen, told):
        x = seen / per_sample(row.c_in, seen)
        assert_close(x, x0 + per_sample(levels, x) * noise, rtol=1e-9, atol=1e-9)
        return (estimate - per_sample(row.c_skip, x) * x) / per_sample(row.c_out, x)

    expected = x0_weight(levels**-2, config, SIGMA_DATA) * (estimate - x0).square().mean((1, 2, 3))
    loss = diffusion_loss(predict, x0, t, noise, schedule, config)
    assert_close(loss, expected, rtol=1e-8, atol=0)


def test_soft_min_snr_is_that_of_k_diffusion():
    """(sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2 of what Karras et al. precondition."""
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    expected = (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2) ** 2
    config = LossConfig("soft_min_snr", SIGMA_DATA**-2)
    assert_close(loss_weight(1 / (1 + sigma**2), "edm", config, SIGMA_DATA), expected, rtol=1e-9, atol=0)


def test_edm_weights_its_own_prediction_evenly():
    alpha_bar = Schedule(DiffusionConfig()).alpha_bar
    assert_close(loss_weight(alpha_bar, "edm", LossConfig("edm"), 0.5), torch.ones_like(alpha_bar))
    assert torch.equal(loss_weight(alpha_bar, "edm", LossConfig(), 0.5), torch.ones_like(alpha_bar))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", ["v", "x0", "edm", "flow"])
def test_pure_noise_has_a_finite_weight(prediction, weighting):
    schedule = schedule_of(prediction, zero_terminal_snr=prediction != "flow")
    x0, noise = draw(2, 1, 4, 4, 4)
    loss = diffusion_loss(lambda x, t: 0 * x, x0, torch.tensor([999]), noise, schedule, LossConfig(weighting))
    assert loss.isfinite().all()
    assert (loss > 0) == (weighting in ("simple", "edm"))


# ---- densities ----


def test_lognormal_density():
    """ln sigma has the mean and deviation asked for, on a schedule wide enough to hold it."""
    schedule = Schedule(DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02))
    t = torch.randint(1000, (100_000,), generator=torch.Generator().manual_seed(0))
    for mean, std in ((-1.2, 1.2), (0.5, 0.8)):
        config = LossConfig(density="lognormal", lognormal_mean=mean, lognormal_std=std)
        drawn = trained_timesteps(t, schedule, config)
        assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
        log_sigma = schedule.sigmas[drawn].log()
        assert_close(log_sigma.mean().item(), mean, rtol=0, atol=0.02)
        assert_close(log_sigma.std().item(), std, rtol=0.02, atol=0)
        for z in (-1, 0, 1):  # about 16, 50 and 84 % lie below
            share = (log_sigma < mean + z * std).double().mean().item()
            assert_close(share, 0.5 * (1 + math.erf(z / 2**0.5)), rtol=0, atol=0.02)


def test_lognormal_density_outside_the_levels_falls_on_the_ends():
    schedule, t = Schedule(DiffusionConfig()), torch.arange(1000)
    for mean, end in ((30.0, 999), (-30.0, 0)):
        config = LossConfig(density="lognormal", lognormal_mean=mean)
        assert (trained_timesteps(t, schedule, config) == end).all()


def test_lognormal_is_logit_normal_of_a_flow():
    """sigma = t / (1 - t), so that ln sigma is the logit of t."""
    schedule, t = schedule_of("flow"), torch.arange(1000)
    config = LossConfig(density="lognormal", lognormal_mean=-0.3, lognormal_std=0.9)
    other = LossConfig(density="logit_normal", logit_mean=-0.3, logit_std=0.9)
    assert (trained_timesteps(t, schedule, config) - by_density(t, 1000, other)).abs().max() <= 1
    assert torch.equal(trained_timesteps(t, schedule, other), by_density(t, 1000, other))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_density_is_what_the_network_sees(prediction):
    schedule, config = schedule_of(prediction), LossConfig(density="lognormal")
    t, seen = torch.arange(0, 1000, 7), []
    x0 = torch.zeros(len(t), 1, 1, 1)
    diffusion_loss(lambda x, told: seen.append(told) or x, x0, t, x0, schedule, config)
    drawn = trained_timesteps(t, schedule, config)
    levels = schedule.time(schedule.sigmas[drawn]) * 1000 if prediction == "flow" else drawn
    assert torch.equal(seen[0].float(), levels.float())


# ---- distances ----


def test_distances_by_hand():
    error = torch.tensor([[-3.0, 0.0, 0.4]], dtype=torch.float64)
    assert distance(error, LossConfig()).tolist() == [[9.0, 0.0, 0.4**2]]
    assert distance(error, LossConfig(distance="l1")).tolist() == [[3.0, 0.0, 0.4]]
    huber = distance(error, LossConfig(distance="huber", huber_c=0.3))
    expected = [[2 * 0.3 * ((e * e + 0.09) ** 0.5 - 0.3) for e in (3.0, 0.0, 0.4)]]
    assert_close(huber, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_huber_is_l2_for_small_errors_and_l1_for_large_ones():
    error = torch.tensor([[1e-4, -1e-4]])
    assert_close(distance(error, LossConfig(distance="huber")), error.square(), rtol=1e-5, atol=0)
    error = torch.tensor([[1e4, -1e4]])
    assert_close(distance(error, LossConfig(distance="huber")), 0.2 * error.abs(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["l1", "huber"])
def test_distance_is_weighted_and_averaged(name):
    x0, noise, output = draw(3, 3, 4, 6, 8)
    t = torch.tensor([5, 400, 990])
    schedule, config = schedule_of("eps"), LossConfig("p2", distance=name)
    loss = diffusion_loss(lambda x, told: output, x0, t, noise, schedule, config)
    weight = loss_weight(schedule.alpha_bar[t], "eps", config)
    assert_close(loss, weight * distance(output - noise, config).mean((1, 2, 3)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["l2", "l1", "huber"])
def test_gradient_at_a_perfect_prediction_is_zero(name):
    noise = draw(1, 4, 4, 4, dtype=torch.float32).requires_grad_()
    config, t = LossConfig(distance=name), torch.tensor([10])
    loss = diffusion_loss(
        lambda x, told: noise, noise.detach(), t, noise.detach(), schedule_of("eps"), config
    )
    loss.sum().backward()
    assert torch.equal(noise.grad, torch.zeros_like(noise))


# ---- perturbation and mask ----


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perturbation_changes_what_is_seen_and_not_what_is_wanted(prediction):
    """Ning et al. 2023: x_t of eps + gamma xi, the target still of eps."""
    x0, noise, extra = draw(3, 2, 4, 4, 4)
    t, schedule, seen, output = torch.tensor([10, 800]), schedule_of(prediction), [], draw(2, 4, 4, 4, seed=9)

    def loss(noise, **options):
        predict = lambda x, told: seen.append(x) or output  # noqa: E731
        return diffusion_loss(predict, x0, t, noise, schedule, LossConfig(), **options)

    plain, perturbed = loss(noise), loss(noise, perturbation=extra)
    loss(noise + extra)
    assert torch.equal(plain, perturbed)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    if prediction == "eps":
        assert_close(seen[1], add_noise(x0, noise + extra, schedule.alpha_bar[t]))


def test_mask():
    x0, noise, output = draw(3, 2, 4, 6, 8)
    t, schedule = torch.tensor([10, 800]), schedule_of("v")

    def loss(mask):
        return diffusion_loss(lambda x, told: output, x0, t, noise, schedule, LossConfig(), mask=mask)

    assert torch.equal(loss(torch.ones(2, 1, 6, 8)), loss(None))
    assert torch.equal(loss(torch.zeros(2, 1, 6, 8)), torch.zeros(2, dtype=torch.float64))
    left = torch.zeros(2, 1, 6, 8)
    left[..., :4] = 1
    assert_close(loss(left) + loss(1 - left), loss(None), rtol=1e-12, atol=0)
    output[..., 4:] = 1e3
    before = loss(left)
    output[..., 4:] = -1e3
    assert torch.equal(loss(left), before)


# ---- what is refused ----


@pytest.mark.parametrize(("values", "message"), [
    ({"weighting": "snr"}, "weighting is 'snr', expected one of simple, min_snr, soft_min_snr, p2, edm"),
    ({"density": "normal"}, "density is 'normal', expected one of uniform, logit_normal, lognormal"),
    ({"distance": "l3"}, "distance is 'l3', expected one of l2, l1, huber"),
    ({"p2_k": 0.0}, "p2_k must be above 0, got 0.0"),
    ({"huber_c": -1.0}, "huber_c must be above 0, got -1.0"),
    ({"p2_gamma": -1.0}, "p2_gamma must be a number of at least 0, got -1.0"),
    ({"p2_gamma": math.nan}, "p2_gamma must be a number of at least 0, got nan"),
    ({"lognormal_std": 0.0}, "lognormal_mean must be finite and lognormal_std above 0, got -1.2 and 0.0"),
    ({"lognormal_mean": math.inf}, "lognormal_mean must be finite and lognormal_std above 0, got inf and 1.2"),
])  # fmt: skip
def test_illegal_config(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        LossConfig(**values)
    assert "\n" not in str(caught.value)
