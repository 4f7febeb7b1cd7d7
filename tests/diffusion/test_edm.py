"""Karras et al.'s preconditioning as a prediction: its row, its target, the exact denoiser and sampling with it."""

import math

import pytest
import torch
from problems import MEAN, STD, draw, exact_denoiser, last
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser, edm_row, v_row
from ldm.diffusion.grids import make_grid
from ldm.diffusion.loss import LossConfig, diffusion_loss
from ldm.diffusion.process import add_noise, edm_input, edm_target, per_sample, velocity
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.weights.diffusers_config import scheduler_json


def schedule_of(sigma_data=0.5, **values):
    return Schedule(DiffusionConfig(prediction="edm", sigma_data=sigma_data, **values))


def test_row_in_closed_form():
    """At sigma 3 and sigma_data 4: table 1 of the paper with 3, 4 and 5."""
    schedule = schedule_of(4.0)
    row = edm_row(torch.tensor(3.0, dtype=torch.float64), schedule)
    assert_close(torch.stack(row[:3]), torch.tensor([16 / 25, 12 / 5, 1 / 5], dtype=torch.float64))
    assert row.c_noise == schedule.t(3.0)


def test_of_deviation_one_it_is_minus_v():
    schedule, sigma = schedule_of(1.0), torch.tensor([0.1, 1.0, 12.0], dtype=torch.float64)
    edm, v = edm_row(sigma, schedule), v_row(sigma, schedule)
    for ours, other in zip(edm, (v.c_skip, -v.c_out, v.c_in, v.c_noise), strict=True):
        assert_close(ours, other, rtol=1e-12, atol=0)
    x0, eps, alpha_bar = *draw(2, 3, 4, 5, 6), 1 / (1 + sigma**2)
    assert_close(edm_target(x0, eps, alpha_bar, 1.0), -velocity(x0, eps, alpha_bar), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_target_and_input_are_those_of_the_row(sigma_data):
    """(x0 - c_skip x) / c_out and c_in x, which process.py writes with alpha_bar."""
    schedule, sigma = schedule_of(sigma_data), torch.tensor([0.03, 0.7, 14.0], dtype=torch.float64)
    x0, eps = draw(2, 3, 4, 5, 6)
    alpha_bar, x = 1 / (1 + sigma**2), x0 + per_sample(sigma, x0) * eps
    row = edm_row(sigma, schedule)
    expected = (x0 - per_sample(row.c_skip, x) * x) / per_sample(row.c_out, x)
    assert_close(edm_target(x0, eps, alpha_bar, sigma_data), expected, rtol=1e-9, atol=1e-9)
    x_t = add_noise(x0, eps, alpha_bar)
    assert_close(edm_input(x_t, alpha_bar, sigma_data), per_sample(row.c_in, x) * x, rtol=1e-12, atol=1e-12)


def test_input_and_target_have_unit_variance_at_every_level():
    x0, eps = 0.5 * draw(9, 200_000), draw(9, 200_000, seed=1)
    alpha_bar = torch.linspace(0, 1 - 1e-4, 9, dtype=torch.float64)
    for made in (
        edm_input(add_noise(x0, eps, alpha_bar), alpha_bar, 0.5),
        edm_target(x0, eps, alpha_bar, 0.5),
    ):
        assert_close(made.var(1), torch.ones(9, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_perfect_network_gives_x0_back(zero_terminal_snr):
    schedule, (x0, eps) = schedule_of(zero_terminal_snr=zero_terminal_snr), draw(2, 1, 4, 8, 8)
    for t in (0, 1, 500, 998, 999):
        sigma = float(schedule.sigmas[t])
        alpha_bar = 1 / (1 + sigma**2)

        def perfect(seen, told, t=t, alpha_bar=alpha_bar):
            assert told.tolist() == [t]
            x_t = add_noise(x0, eps, alpha_bar)
            assert_close(seen, edm_input(x_t, alpha_bar, 0.5), rtol=1e-9, atol=1e-9)
            return edm_target(x0, eps, alpha_bar, 0.5)

        assert_close(Denoiser(perfect, schedule)(x0 + sigma * eps, sigma), x0, rtol=0, atol=1e-10)


def test_training_and_sampling_show_the_network_the_same():
    """Also that a perfect prediction costs nothing in training."""
    schedule, (x0, eps), t = schedule_of(), draw(2, 4, 4, 6, 8), torch.tensor([0, 300, 700, 999])
    seen = []

    def perfect(x, told):
        seen.append((x, told.float()))
        return edm_target(x0, eps, schedule.alpha_bar[t], 0.5)

    loss = diffusion_loss(perfect, x0, t, eps, schedule, LossConfig("edm"))
    assert torch.equal(loss, torch.zeros(4, dtype=torch.float64))
    levels = schedule.sigmas[t]
    denoised = Denoiser(perfect, schedule)(x0 + per_sample(levels, x0) * eps, levels)
    assert_close(denoised, x0, rtol=0, atol=1e-12)
    assert_close(seen[0][0], seen[1][0], rtol=1e-9, atol=1e-9)
    assert torch.equal(seen[0][1], seen[1][1])


def gaussian_network(schedule):
    """The best network for Gaussian data, told only its input and the timestep."""

    def network(seen, told):
        sigma = schedule.sigma(told)
        row = edm_row(sigma, schedule)
        x = seen / per_sample(row.c_in, seen)
        best = exact_denoiser(x, per_sample(sigma, x))
        return (best - per_sample(row.c_skip, x) * x) / per_sample(row.c_out, x)

    return network


def test_gaussian_data():
    """The denoiser is the exact one; where the data's deviation is sigma_data and its mean 0, the network is 0."""
    schedule = schedule_of(STD)
    x = draw(3, 4, 4, 4)
    for t in (0, 500, 999):
        sigma = float(schedule.sigmas[t])
        expected = exact_denoiser(x, sigma)
        denoised = Denoiser(gaussian_network(schedule), schedule)(x, sigma)
        assert_close(denoised, expected, rtol=1e-9, atol=1e-9)
        centred = Denoiser(lambda seen, told: 0 * seen, schedule)(x, sigma)
        assert_close(centred, exact_denoiser(x + MEAN, sigma) - MEAN, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_sampling(name):
    """As with the exact denoiser itself, and with more steps nearer to the exact end of the path."""
    schedule, sampler, errors = schedule_of(0.8), SAMPLERS[name].function, []
    for steps in (50, 200):
        sigmas = make_grid(schedule, "linspace", steps)
        x = float(sigmas[0]) * draw(2, 4, 4, 4)
        end = last(sampler(Denoiser(gaussian_network(schedule), schedule), x, sigmas)).x
        assert_close(end, last(sampler(exact_denoiser, x, sigmas)).x, rtol=0, atol=1e-8)
        exact = MEAN + (x - MEAN) * STD / math.hypot(STD, float(sigmas[0]))
        errors.append((end - exact).abs().max().item())
    assert errors[1] < 0.03 and errors[1] < 0.4 * errors[0], errors


# ---- what is refused ----


@pytest.mark.parametrize(("values", "message"), [
    ({"sigma_data": 0.0}, "sigma_data must be a positive number, got 0.0"),
    ({"sigma_data": math.nan}, "sigma_data must be a positive number, got nan"),
    ({"schedule": "flow"}, 'go together, got schedule "flow" and prediction "edm"'),
])  # fmt: skip
def test_impossible_configs(values, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(prediction="edm", **values)


def test_diffusers_has_no_such_scheduler():
    with pytest.raises(ValueError, match="prediction 'edm' has no counterpart in diffusers") as caught:
        scheduler_json(DiffusionConfig(prediction="edm"))
    assert "\n" not in str(caught.value)
