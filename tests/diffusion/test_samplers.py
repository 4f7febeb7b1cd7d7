"""Samplers in closed form on Gaussian data, against each other in float64, and their contract."""

import math

import numpy as np
import pytest
import torch
from problems import MEAN, STD, draw, exact_denoiser, last, network, seeded
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import make_grid
from ldm.diffusion.process import alpha_bar_of, to_sigma_scale
from ldm.diffusion.samplers import (
    SAMPLERS,
    check_options,
    ddim,
    ddpm,
    euler,
    euler_ancestral,
    find_sampler,
)
from ldm.diffusion.schedule import SPACINGS, DiffusionConfig, Schedule, sigma_grid, timesteps

# ---- against each other ----


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 27, 50])
def test_ddim_is_euler(spacing, steps, prediction):
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    denoise, sigmas = Denoiser(network, schedule), sigma_grid(schedule, spacing, steps)
    x = to_sigma_scale(draw(2, 4, 8, 8), float(sigmas[0]))
    pairs = zip(ddim(denoise, x, sigmas), euler(denoise, x, sigmas), strict=True)
    for count, (a, b) in enumerate(pairs):
        assert a.index == b.index == count and a.sigma == b.sigma == sigmas[count + 1]
        assert_close(a.x, b.x, rtol=1e-12, atol=1e-12)
        assert_close(a.denoised, b.denoised, rtol=1e-12, atol=1e-12)
    assert count == steps - 1


@pytest.mark.parametrize(
    ("spacing", "steps"), [(s, n) for s in SPACINGS for n in (1, 2, 27)] + [("trailing", 1000)]
)
def test_ddpm_is_ancestral_euler(spacing, steps):
    """And DDIM with eta = 1: all add the variance sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2."""
    schedule = Schedule(DiffusionConfig())
    denoise, sigmas = Denoiser(network, schedule), sigma_grid(schedule, spacing, steps)
    x = to_sigma_scale(draw(1, 4, 4, 4), float(sigmas[0]))
    runs = zip(
        ddpm(denoise, x, sigmas, noise=seeded(x)),
        euler_ancestral(denoise, x, sigmas, noise=seeded(x)),
        ddim(denoise, x, sigmas, noise=seeded(x), eta=1.0),
        strict=True,
    )
    for a, b, c in runs:
        # relative to the level: noise added at sigma 14 is what later steps take away again
        assert_close(a.x, b.x, rtol=1e-12, atol=1e-12 * max(1.0, a.sigma))
        assert_close(a.x, c.x, rtol=1e-12, atol=1e-12 * max(1.0, a.sigma))


def test_eta_zero_is_deterministic():
    sigmas = sigma_grid(Schedule(DiffusionConfig()), "trailing", 10)
    x = to_sigma_scale(draw(1, 4, 4, 4), float(sigmas[0]))
    expected = last(euler(exact_denoiser, x, sigmas)).x
    assert_close(last(euler_ancestral(exact_denoiser, x, sigmas, eta=0)).x, expected, rtol=1e-12, atol=1e-12)
    assert_close(last(ddim(exact_denoiser, x, sigmas, eta=0)).x, expected, rtol=1e-12, atol=1e-12)


def test_variances_of_one_step():
    """What a step adds, measured as its response to unit noise, is the paper's number."""
    schedule = Schedule(DiffusionConfig())
    sigma, sigma_next = schedule.sigmas[[800, 500]].tolist()
    now, before = alpha_bar_of(sigma), alpha_bar_of(sigma_next)
    grid, x = torch.tensor([sigma, sigma_next], dtype=torch.float64), draw(1, 4, 4, 4)

    def end(sampler, unit, options):
        return last(sampler(exact_denoiser, x, grid, noise=lambda _: unit * torch.ones_like(x), **options)).x

    def response(sampler, **options):
        return (end(sampler, 1.0, options) - end(sampler, 0.0, options)).mean().item()

    beta_tilde = (1 - before) / (1 - now) * (1 - now / before)
    assert_close(response(ddpm), math.sqrt(beta_tilde / before), rtol=1e-12, atol=0)
    assert_close(response(ddim, eta=0.5), 0.5 * math.sqrt(beta_tilde / before), rtol=1e-12, atol=0)
    sigma_up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    assert_close(response(euler_ancestral), sigma_up, rtol=1e-12, atol=0)
    assert_close(response(euler_ancestral, eta=0.5), 0.5 * sigma_up, rtol=1e-12, atol=0)
    assert_close(
        response(euler_ancestral, eta=100.0), sigma_next, rtol=1e-12, atol=0
    )  # never above the level


# ---- closed form ----


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_first_order_convergence(sampler):
    schedule = Schedule(DiffusionConfig())
    x = MEAN + 14.0 * draw(1, 1, 4, 4)
    counts, errors = (16, 32, 64, 128, 256), []
    for steps in counts:
        sigmas = schedule.sigma(torch.linspace(999, 0, steps + 1, dtype=torch.float64))
        low, high = (STD**2 + sigmas[[-1, 0]] ** 2).tolist()
        exact = MEAN + (x - MEAN) * math.sqrt(low / high)
        errors.append((last(sampler(exact_denoiser, x, sigmas)).x - exact).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9, (slope, errors)
    assert errors[-1] < 0.02  # of a start at 14


@pytest.mark.parametrize(
    ("name", "steps"), [("ddim", 250), ("euler", 250), ("ddpm", 500), ("euler_ancestral", 250)]
)
def test_marginals_of_gaussian_data(name, steps):
    """Started from the exact marginal at sigma_T, mean and spread of the samples are those of the data."""
    sigmas = sigma_grid(Schedule(DiffusionConfig()), "trailing", steps)
    count = 20_000
    x = MEAN + math.sqrt(STD**2 + float(sigmas[0]) ** 2) * draw(count, 1)
    result = last(SAMPLERS[name].function(exact_denoiser, x, sigmas, noise=seeded(x))).x
    assert_close(result.mean().item(), MEAN, rtol=0, atol=4 * STD / math.sqrt(count))
    # sampling error of a standard deviation plus the bias of finitely many steps
    assert_close(result.std().item(), STD, rtol=4 / math.sqrt(2 * count) + 5 / steps, atol=0)


def test_one_step_from_noise_is_the_denoised_picture():
    sigmas = torch.tensor([14.6, 0.0], dtype=torch.float64)
    x = draw(2, 4, 4, 4)
    for name, row in SAMPLERS.items():
        options = {"churn": 0.0} if "edm" in name else {}
        # the last step to 0 draws nothing
        step = last(row.function(exact_denoiser, x, sigmas, noise=None, **options))
        assert_close(step.x, exact_denoiser(x, 14.6), rtol=1e-12, atol=1e-12)
        assert torch.equal(step.sample, step.x)


# ---- contract ----


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_size_changes_no_picture(name):
    """Noise of a picture comes from its own generator: alone, in fours, or in another order."""
    schedule = Schedule(DiffusionConfig())

    def elementwise(x_t, t):
        return torch.tanh(x_t) + (t / 1000)[:, None, None, None]

    def sample(indices):
        sampler = find_sampler(name)
        sigmas = make_grid(schedule, sampler.spacing, 6)
        generators = [torch.Generator().manual_seed(100 + i) for i in indices]

        def noise(_=None, part=0):
            return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])

        x = to_sigma_scale(noise(), float(sigmas[0]))
        return last(sampler.function(Denoiser(elementwise, schedule), x, sigmas, noise=noise)).sample

    together = sample([0, 1, 2, 3])
    assert torch.equal(sample([3, 1]), together[[3, 1]])
    for i in range(4):
        assert torch.equal(sample([i])[0], together[i])


FIRST_ORDER = ("ddpm", "ddim", "euler", "euler_ancestral")  # evaluate each level once, and no other


@pytest.mark.parametrize(
    ("name", "spacing"), [*zip(FIRST_ORDER, SPACINGS, strict=True), ("ddpm", "linspace"), ("lcm", "trailing")]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 27, 999, 1000])
def test_any_step_count_visits_its_timesteps(name, spacing, steps):
    schedule = Schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    sigmas = sigma_grid(schedule, spacing, steps)
    visited = []

    def denoise(x, sigma):
        visited.append(sigma)
        return exact_denoiser(x, sigma)

    x = to_sigma_scale(draw(1, 1), float(sigmas[0]))
    step = last(SAMPLERS[name].function(denoise, x, sigmas, noise=lambda _: torch.ones(1, 1, dtype=x.dtype)))
    assert (
        schedule.t(torch.tensor(visited, dtype=torch.float64)).tolist()
        == timesteps(spacing, steps, 1000).tolist()
    )
    assert step.index == steps - 1 and step.sigma == sigmas[-1] and step.x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_yielded_as_they_happen(name):
    """A caller that stops early pays for what it saw; the given x is not written to."""
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return exact_denoiser(x, sigma)

    sigmas = torch.tensor([10.0, 5.0, 1.0, 0.0], dtype=torch.float64)
    x = 10 * draw(1, 4, 4, 4)
    kept = x.clone()
    run = SAMPLERS[name].function(denoise, x, sigmas, noise=seeded(x))
    assert calls == []
    first = next(run)
    assert len(calls) <= 4 and (first.index, first.sigma) == (0, 5.0)
    if "edm" not in name:  # those start by adding noise
        assert calls[0] == 10.0
        assert_close(first.denoised, exact_denoiser(x, 10.0))
    assert torch.equal(x, kept)
    with pytest.raises(AttributeError):
        first.x = x
    assert_close(first.sample, first.x / math.sqrt(26), rtol=1e-12, atol=0)


def test_table():
    stochastic = {name for name, row in SAMPLERS.items() if row.stochastic}
    assert stochastic - {"ddpm", "lcm", "tcd"} == {
        name for name in SAMPLERS if any(word in name for word in ("ancestral", "sde", "edm"))
    }
    sigmas = torch.tensor([10.0, 5.0, 0.0], dtype=torch.float64)
    for name, row in SAMPLERS.items():
        run = row.function(exact_denoiser, draw(1, 4, 4, 4), sigmas)
        if name in stochastic:
            with pytest.raises(ValueError, match="this sampler draws noise"):
                list(run)
        else:
            assert len(list(run)) == 2


def test_unknown_sampler():
    assert find_sampler("euler").function is euler
    with pytest.raises(ValueError, match="unknown sampler 'eular': did you mean euler"):
        find_sampler("eular")
    with pytest.raises(
        ValueError, match="unknown sampler 'xyz': known: ddpm, ddim, plms, pndm, euler, euler_ancestral"
    ):
        find_sampler("xyz")


def test_options():
    check_options("unipc", {"order": 3, "variant": "bh1"})
    check_options("ddim", {"eta": 1})
    for name, options, message in [
        ("plms", {"eta": 0.5}, "sampler plms has no eta: it has no options"),
        ("unipc", {"eta": 0.5}, "sampler unipc has no eta: it has order, variant"),
        ("tcd", {"schedule": 1}, "sampler tcd has no schedule: it has gamma"),
        ("unipc", {"order": 2.5}, "order of sampler unipc must be like 2, got 2.5"),
        ("ddim", {"eta": "much"}, "eta of sampler ddim must be like 0.0, got 'much'"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_options(name, options)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("unipc", {"order": 4}, "order must be one of 1, 2, 3, got 4"),
    ("unipc", {"variant": "bh3"}, "variant must be one of bh1, bh2, got bh3"),
    ("deis", {"order": 0}, "order must be one of 1, 2, 3, got 0"),
    ("lms", {"order": 5}, "order must be one of 1, 2, 3, 4, got 5"),
    ("dpmpp_2m_sde", {"variant": "euler"}, "variant must be one of midpoint, heun"),
    ("edm_heun", {"churn": -1.0}, "churn must be at least 0, got -1.0"),
    ("edm_euler", {"noise_scale": math.nan}, "noise_scale must be at least 0, got nan"),
    ("tcd", {"gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
    *((name, {"eta": -1.0}, "eta must be at least 0, got -1.0") for name in (
        "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")),
])  # fmt: skip
def test_illegal_options(name, options, message):
    sigmas = torch.tensor([10.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        next(SAMPLERS[name].function(exact_denoiser, draw(1, 4, 4, 4), sigmas, **options))


@pytest.mark.parametrize(
    ("sampler", "eta"), [(ddim, -0.1), (ddim, 1.1), (ddim, math.nan), (euler_ancestral, -1.0)]
)
def test_illegal_eta(sampler, eta):
    sigmas = torch.tensor([10.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="eta must be"):
        next(sampler(exact_denoiser, draw(1, 4, 4, 4), sigmas, eta=eta))


@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_for_every_step_count(name):
    """In float32, on its own grid, and from the pure noise of a zero-terminal-SNR model (FAULTS 20)."""
    row, noises = SAMPLERS[name], draw(1000, 2, 1, 1, dtype=torch.float32)

    def noise(index, part=0):
        return noises[index, part]

    for steps in (1, 2, 3, 20, 999, 1000):
        sigmas = make_grid(Schedule(DiffusionConfig()), row.spacing, steps)
        x = float(sigmas[0]) * draw(1, 1, dtype=torch.float32)
        step = last(row.function(exact_denoiser, x, sigmas, noise=noise))
        assert step.index == steps - 1 and step.x.isfinite().all(), steps
        assert steps < 20 or step.x.abs() < 10
        assert step.x.dtype == torch.float32
    pure = Schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    for grid in ("trailing", "karras", "uniform"):
        sigmas = make_grid(pure, grid, 20)
        x = float(sigmas[0]) * draw(1, 1, dtype=torch.float32)
        assert last(row.function(exact_denoiser, x, sigmas, noise=noise)).x.isfinite().all()
