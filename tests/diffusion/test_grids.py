"""Sigma grids: exact values, diffusers' and k-diffusion's (in test_samplers_kdiffusion.py), limits."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.grids import ALIGNED_SD15, beta_quantile, make_grid
from ldm.diffusion.grids import GRIDS as ALL
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS, DiffusionConfig, Schedule, sigma_grid
from sample.options import GRIDS as NAMED_GRIDS
from sample.options import SAMPLERS as NAMED_SAMPLERS

SD = Schedule(DiffusionConfig())
GRIDS = [name for name in ALL if name != "flow"]  # which is in test_flow.py


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 49, 50, 51, 300, 999, 1000])
def test_falls_from_the_top_to_0(name, steps):
    grid = make_grid(SD, name, steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    if name != "compvis":
        assert grid[-1] == 0
    if name not in (*SPACINGS, "lcm", "ddim_uniform"):
        assert_close(grid[0], SD.sigmas[-1], rtol=1e-4, atol=0)
        if steps > 1 and name not in ("sgm_uniform", "simple"):
            assert_close(grid[-2], SD.sigmas[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("T", [1, 2, 10, 50, 100])
def test_of_other_schedules(name, T):
    schedule = Schedule(DiffusionConfig(num_timesteps=T, schedule="cosine"))
    if name == "align_your_steps":
        return
    for steps in {1, 2, T - 1, T} & set(range(1, T + 1)):
        grid = make_grid(schedule, name, steps)
        assert grid.shape == (steps + 1,) and (T == 1 or (grid.diff() < 0).all()), (name, steps)


def test_karras_values():
    expected = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0]
    assert_close(make_grid(SD, "karras", 10), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)
    assert torch.equal(make_grid(SD, "karras", 10), make_grid(SD, "karras:7", 10))


def test_timestep_grids():
    for spacing in SPACINGS:
        assert torch.equal(make_grid(SD, spacing, 20), sigma_grid(SD, spacing, 20))
    t = SD.t(make_grid(SD, "uniform", 28)[:-1])
    assert_close(t, torch.linspace(999, 0, 28, dtype=torch.float64), rtol=0, atol=2e-4)
    t = SD.t(make_grid(SD, "sgm_uniform", 4)[:-1])
    assert_close(t, torch.tensor([999, 749.25, 499.5, 249.75], dtype=torch.float64), rtol=0, atol=2e-4)
    assert SD.t(make_grid(SD, "simple", 3)[:-1]).tolist() == [999, 666, 333]
    assert SD.t(make_grid(SD, "simple", 4)[:-1]).tolist() == [999, 749, 499, 249]
    assert SD.t(make_grid(SD, "lcm", 4)[:-1]).tolist() == [999, 759, 499, 259]


def test_exponential_is_even_in_ln_sigma():
    grid = make_grid(SD, "exponential", 11)[:-1].log()
    assert_close(grid.diff(), grid.diff()[:1].expand(10), rtol=1e-12, atol=1e-13)
    assert torch.equal(make_grid(SD, "polyexponential", 11), make_grid(SD, "exponential", 11))
    low, high = SD.sigmas[0].log(), SD.sigmas[-1].log()
    middle = make_grid(SD, "polyexponential:2", 11)[5].log()
    assert_close(middle, low + 0.25 * (high - low), rtol=1e-12, atol=1e-12)


def test_align_your_steps():
    grid = make_grid(SD, "align_your_steps", 11)
    assert_close(grid[:-1], torch.tensor(ALIGNED_SD15, dtype=torch.float64), rtol=1e-12, atol=0)
    middle = make_grid(SD, "align_your_steps", 21)[1]  # half way between the first two
    assert_close(middle.item(), math.sqrt(14.615 * 6.475), rtol=1e-12, atol=0)


def test_beta_quantile():
    """alpha = beta = 1/2 is the arcsine law, 1 the uniform one; 0.6 as SciPy has it."""
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert_close(beta_quantile(p, 0.5), (torch.pi / 2 * p).sin().square(), rtol=1e-10, atol=1e-15)
    assert_close(beta_quantile(p, 1.0), p, rtol=1e-12, atol=1e-15)
    stats = pytest.importorskip("scipy.stats")
    expected = torch.from_numpy(stats.beta.ppf(p.numpy(), 0.6, 0.6))
    assert_close(beta_quantile(p, 0.6), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize(("name", "option"), [
    ("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas"),
])  # fmt: skip
def test_as_diffusers(name, option, steps):
    """Their Euler makes these of its own ends: with "linspace" the model's, in float32."""
    pytest.importorskip("scipy")
    from diffusers import EulerDiscreteScheduler

    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, option: True}
    other = EulerDiscreteScheduler(**options)
    other.set_timesteps(steps)
    assert_close(make_grid(SD, name, steps).float(), other.sigmas, rtol=5e-5, atol=0)


def test_the_table_is_what_the_command_says():
    assert sorted(ALL) == sorted(NAMED_GRIDS)
    assert sorted(SAMPLERS) == sorted(NAMED_SAMPLERS)
    assert {row.spacing for row in SAMPLERS.values()} <= set(ALL)


PURE = Schedule(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
LSUN = Schedule(DiffusionConfig(beta_start=0.0015, beta_end=0.0195))


@pytest.mark.parametrize(("schedule", "name", "steps", "message"), [
    (SD, "karas", 10, "unknown schedule 'karas': did you mean karras"),
    (SD, "xyzzy", 10, "unknown schedule 'xyzzy': known: compvis, leading"),
    (SD, "karras", 0, "steps must be between 1 and 1000, got 0"),
    (SD, "karras", 1001, "steps must be between 1 and 1000, got 1001"),
    (SD, "simple:3", 10, "schedule simple has no rho, got '3'"),
    (SD, "karras:many", 10, "rho of schedule karras must be a positive number, got 'many'"),
    (SD, "karras:-1", 10, "rho of schedule karras must be a positive number, got '-1'"),
    (SD, "karras:inf", 10, "rho of schedule karras must be a positive number, got 'inf'"),
    (PURE, "leading", 10, "schedule leading starts below pure noise"),
    (PURE, "align_your_steps", 10, "starts below pure noise, where this zero-terminal-SNR model must be started"),
    (LSUN, "align_your_steps", 10, "made for noise levels 0.029 to 14.615 .* this model's are 0.039 to 83.822"),
])  # fmt: skip
def test_refused(schedule, name, steps, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_grid(schedule, name, steps)
    assert "\n" not in str(caught.value)


# ---- FAULTS 21: coefficients of every spacing in closed form ----


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral"])
@pytest.mark.parametrize("steps", [1, 2, 3, 27, 1000])
def test_coefficients_of_a_step(spacing, name, steps):
    """x_next = a x_t + b x0 + c noise in the network's scale, to 1e-12; each step ends where the next begins."""
    sigmas = make_grid(SD, spacing, steps)
    ones = torch.ones(1, 1, dtype=torch.float64)
    parts = []
    for x0, unit, start in ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)):
        x = start * ones
        for i in [0, steps // 2, steps - 1]:
            pair = sigmas[i : i + 2]
            alpha_bar = 1 / (1 + pair**2)
            run = SAMPLERS[name].function(
                lambda x, sigma, x0=x0: x0 * ones,
                x / alpha_bar[0].sqrt(),
                pair,
                noise=lambda _, unit=unit: unit * ones,
            )
            parts.append(next(run).sample.item())
    expected = []
    for part in range(3):
        for i in [0, steps // 2, steps - 1]:
            now, before = (1 / (1 + sigmas[i : i + 2].numpy() ** 2)).tolist()
            beta_tilde = (1 - before) / (1 - now) * (1 - now / before)
            spread = math.sqrt(beta_tilde) if name in ("ddpm", "euler_ancestral") else 0.0
            of_x = math.sqrt(max(1 - before - beta_tilde if spread else 1 - before, 0.0) / (1 - now))
            of_x0 = math.sqrt(before) - of_x * math.sqrt(now)
            expected.append((of_x, of_x0, spread)[part])
    np.testing.assert_allclose(parts, expected, rtol=1e-12, atol=1e-14)
