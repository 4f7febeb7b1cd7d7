"""Every formula of the forward process, evaluated by hand and by sampling."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion import process
from ldm.diffusion.schedule import DiffusionConfig, Schedule


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return x0, eps, torch.tensor([0.9, 0.5, 0.004], dtype=torch.float64)


def test_add_noise_and_velocity_by_hand(drawn):
    x0, eps, alpha_bar = drawn
    x_t = process.add_noise(x0, eps, alpha_bar)
    v = process.velocity(x0, eps, alpha_bar)
    for b, value in enumerate(alpha_bar.tolist()):
        assert_close(x_t[b], math.sqrt(value) * x0[b] + math.sqrt(1 - value) * eps[b], rtol=1e-14, atol=1e-14)
        assert_close(v[b], math.sqrt(value) * eps[b] - math.sqrt(1 - value) * x0[b], rtol=1e-14, atol=1e-14)


def test_conversions_return_what_made_x_t(drawn):
    x0, eps, alpha_bar = drawn
    x_t = process.add_noise(x0, eps, alpha_bar)
    v = process.velocity(x0, eps, alpha_bar)
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert_close(process.x0_from_eps(x_t, eps, alpha_bar), x0, **close)
    assert_close(process.x0_from_v(x_t, v, alpha_bar), x0, **close)
    assert_close(process.eps_from_x0(x_t, x0, alpha_bar), eps, **close)
    assert_close(process.eps_from_v(x_t, v, alpha_bar), eps, **close)


def test_velocity_is_the_derivative_along_the_circle():
    """With alpha_bar = cos^2 phi, v = d x_t / d phi (Salimans & Ho, appendix D)."""
    x0, eps = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi, h = 0.7, 1e-6
    ahead, behind = (process.add_noise(x0, eps, math.cos(p) ** 2) for p in (phi + h, phi - h))
    assert_close(process.velocity(x0, eps, math.cos(phi) ** 2), (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


def test_alpha_bar_as_number_scalar_or_batch(drawn):
    x0, eps, _ = drawn
    expected = process.add_noise(x0, eps, 0.3)
    assert torch.equal(process.add_noise(x0, eps, torch.tensor(0.3, dtype=torch.float64)), expected)
    assert torch.equal(process.add_noise(x0, eps, torch.full((3,), 0.3, dtype=torch.float64)), expected)


def test_coefficients_are_computed_before_they_are_rounded():
    """1 - alpha_bar at timestep 0 is 0.00085: alpha_bar rounded to float32 first would lose four digits."""
    alpha_bar = Schedule(DiffusionConfig()).alpha_bar[:1]
    noise = process.add_noise(torch.zeros(1, 1), torch.ones(1, 1), alpha_bar)
    assert noise.dtype == torch.float32
    assert_close(noise.item(), math.sqrt(0.00085), rtol=6e-8, atol=0)


def test_ends_of_the_process(drawn):
    x0, eps, _ = drawn
    assert torch.equal(process.add_noise(x0, eps, 1.0), x0)
    assert torch.equal(process.add_noise(x0, eps, 0.0), eps)
    assert torch.equal(process.velocity(x0, eps, 0.0), -x0)


def test_snr():
    alpha_bar = torch.tensor([0.0, 0.2, 0.5, 0.99], dtype=torch.float64)
    assert_close(process.snr(alpha_bar), torch.tensor([0.0, 0.25, 1.0, 99.0], dtype=torch.float64))
    table = Schedule(DiffusionConfig())
    assert_close(process.snr(table.alpha_bar), table.sigmas**-2, rtol=1e-12, atol=0)


def test_posterior_by_hand():
    table = Schedule(DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02))
    x_t, x0 = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t in (1, 500, 999):
        now, before = table.alpha_bar[t].item(), table.alpha_bar[t - 1].item()
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        mean, variance = process.posterior(x_t, x0, now, before)
        expected = math.sqrt(before) * beta / (1 - now) * x0
        expected += math.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t
        assert_close(mean, expected, rtol=1e-9, atol=1e-12)  # beta itself is a difference of neighbours
        assert_close(variance, (1 - before) / (1 - now) * beta, rtol=1e-9, atol=0)
    mean, variance = process.posterior(x_t, x0, 0.3, 1.0)  # the last step
    assert_close(mean, x0)
    assert variance == 0


def test_posterior_is_bayes_rule():
    """q(x_prev | x_t, x0) from the product of q(x_prev | x0) and q(x_t | x_prev), two Gaussians in x_prev."""
    now, before = 0.2, 0.6
    alpha = now / before
    x0, x_t = 1.3, -0.4
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    got, variance = process.posterior(
        torch.tensor([x_t], dtype=torch.float64), torch.tensor([x0], dtype=torch.float64), now, before
    )
    assert_close(got.item(), mean, rtol=1e-14, atol=0)
    assert_close(variance, 1 / precision, rtol=1e-14, atol=0)


def test_two_scales():
    x0, eps = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sigma = 2.5
    alpha_bar = process.alpha_bar_of(sigma)
    assert_close(math.sqrt((1 - alpha_bar) / alpha_bar), sigma, rtol=1e-14, atol=0)
    x, x_t = x0 + sigma * eps, process.add_noise(x0, eps, alpha_bar)
    assert_close(process.to_alpha_bar_scale(x, sigma), x_t, rtol=1e-13, atol=1e-13)
    assert_close(process.to_sigma_scale(x_t, sigma), x, rtol=1e-13, atol=1e-13)
    assert process.to_alpha_bar_scale(x, 0.0).equal(x)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_at_least_float32(given, expected):
    assert process.at_least_float32(torch.zeros(2, 3, dtype=given)).dtype == expected
