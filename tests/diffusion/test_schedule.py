"""Noise schedules against published numbers, the original and diffusers; timesteps and grids exactly."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ldm.diffusion.schedule import (
    SPACINGS,
    TINY_ALPHA_BAR,
    DiffusionConfig,
    Schedule,
    make_betas,
    rescale_zero_terminal_snr,
    sigma_grid,
    timesteps,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "schedule.safetensors"
STEPS = (1, 2, 3, 9, 27, 40, 50, 300, 999, 1000)


@pytest.mark.parametrize(
    ("schedule", "start", "end", "first", "last", "sigma_min", "sigma_max"),
    [
        (
            "scaled_linear",
            0.00085,
            0.012,
            0.99915,
            0.0046600985,
            0.029167,
            14.614641,
        ),  # Stable Diffusion 1 and 2
        (
            "scaled_linear",
            0.0015,
            0.0195,
            0.9985,
            0.0001423040,
            0.038759,
            83.822494,
        ),  # faces, bedrooms, ImageNet
        (
            "scaled_linear",
            0.0015,
            0.0155,
            0.9985,
            0.0006686652,
            0.038759,
            38.658981,
        ),  # churches, super-resolution
        ("scaled_linear", 0.0015, 0.0205, 0.9985, 0.0000969109, 0.038759, 101.576376),  # inpainting, layout
        ("scaled_linear", 0.0001, 0.02, 0.9999, 7.334e-4, 0.0100005, 36.911),  # x4 upscaler
        ("linear", 0.0001, 0.02, 0.9999, 4.0358e-5, 0.0100005, 157.407),  # DDPM
    ],
)
def test_published_tables(schedule, start, end, first, last, sigma_min, sigma_max):
    table = Schedule(DiffusionConfig(schedule=schedule, beta_start=start, beta_end=end))
    assert table.alpha_bar.dtype == table.sigmas.dtype == torch.float64
    got = torch.stack([table.alpha_bar[0], table.alpha_bar[-1], table.sigmas[0], table.sigmas[-1]])
    expected = torch.tensor([first, last, sigma_min, sigma_max], dtype=torch.float64)
    assert_close(got, expected, rtol=1e-4, atol=0)  # as many digits as were published


def test_stable_diffusion_values():
    at = Schedule(DiffusionConfig()).alpha_bar[[0, 1, 21, 500, 981, 999]]
    published = [0.999149978, 0.998296022, 0.980380774, 0.276332676, 0.005775500, 0.004660098]
    assert_close(at, torch.tensor(published, dtype=torch.float64), rtol=0, atol=5e-8)


def test_original_table():
    expected = load_file(REFERENCE)[
        "schedule.alphas_cumprod"
    ]  # the original's float64 product, cast to float32
    assert_close(
        Schedule(DiffusionConfig()).alpha_bar.float(), expected, rtol=1.2e-7, atol=0
    )  # one float32 step


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_tables_equal_diffusers(ours, theirs, zero_terminal_snr):
    from diffusers import DDIMScheduler

    config = DiffusionConfig(schedule=ours, zero_terminal_snr=zero_terminal_snr, prediction="v")
    other = DDIMScheduler(
        beta_schedule=theirs,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    # diffusers computes in float32
    assert_close(Schedule(config).alpha_bar.float(), other.alphas_cumprod, rtol=2e-5, atol=1e-6)


def test_formulas_of_the_betas():
    t = torch.arange(7, dtype=torch.float64)
    linear = make_betas(DiffusionConfig("linear", 0.1, 0.7, 7))
    assert_close(linear, 0.1 + 0.6 * t / 6)
    scaled = make_betas(DiffusionConfig("scaled_linear", 0.01, 0.49, 7))
    assert_close(scaled, (0.1 + 0.6 * t / 6) ** 2)
    cosine = Schedule(DiffusionConfig("cosine", num_timesteps=100)).alpha_bar
    f = [math.cos(math.pi / 2 * (k / 100 + 0.008) / 1.008) ** 2 for k in range(101)]
    assert_close(cosine[:99], torch.tensor(f[1:100], dtype=torch.float64) / f[0])  # the product telescopes
    assert_close(cosine[99], cosine[98] * 0.001)  # the clip


def test_zero_terminal_snr():
    plain = Schedule(DiffusionConfig()).alpha_bar
    table = Schedule(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
    root = plain.sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert_close(table.alpha_bar, expected, rtol=1e-12, atol=0)
    assert table.alpha_bar[-1] == 0
    assert_close(table.alpha_bar[0], plain[0], rtol=1e-12, atol=0)
    assert table.sigmas.isfinite().all() and (table.sigmas.diff() > 0).all()
    assert_close(table.sigmas[-1].item(), math.sqrt(1 / TINY_ALPHA_BAR - 1))
    assert torch.tensor(1.0).half() + TINY_ALPHA_BAR**0.5 == 1  # half precision takes it for pure noise
    assert_close(table.sigmas[:-1], ((1 - expected) / expected)[:-1].sqrt(), rtol=1e-12, atol=0)
    assert_close(rescale_zero_terminal_snr(plain), table.alpha_bar)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 10, 4000, 20000])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_every_table_rises_and_is_finite(schedule, steps, zero_terminal_snr):
    config = DiffusionConfig(
        schedule=schedule, num_timesteps=steps, zero_terminal_snr=zero_terminal_snr, prediction="v"
    )
    table = Schedule(config)
    assert table.sigmas.isfinite().all() and (table.sigmas.diff() > 0).all()


def test_one_timestep():
    table = Schedule(DiffusionConfig(num_timesteps=1))
    assert_close(table.alpha_bar, torch.tensor([1 - 0.00085], dtype=torch.float64))
    assert table.t(table.sigmas[0]) == 0 and table.t(5.0) == 0 and table.sigma(0) == table.sigmas[0]
    for spacing in SPACINGS:
        assert timesteps(spacing, 1, 1).tolist() == [0]
        assert sigma_grid(table, spacing, 1).tolist() == [table.sigmas[0].item(), 0.0]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_t_and_sigma_are_inverse(schedule, zero_terminal_snr):
    table = Schedule(DiffusionConfig(schedule=schedule, zero_terminal_snr=zero_terminal_snr, prediction="v"))
    whole = torch.arange(1000)
    assert torch.equal(table.sigma(whole), table.sigmas)
    assert torch.equal(table.t(table.sigmas), whole.double())
    assert torch.equal(table.t(table.sigmas.float()), whole.double())  # also after rounding
    between = torch.linspace(0.05, 998.95, 777, dtype=torch.float64)
    assert_close(table.t(table.sigma(between)), between, rtol=0, atol=1e-8)
    assert table.t(table.sigmas[-1] * 2) == 999 and table.t(table.sigmas[0] / 2) == 0
    assert table.t(0.0) == 0


def test_log_linear_between():
    table = Schedule(DiffusionConfig())
    expected = (0.75 * table.sigmas[41].log() + 0.25 * table.sigmas[42].log()).exp()
    assert_close(table.sigma(41.25), expected, rtol=1e-14, atol=0)
    assert_close(table.t(expected).item(), 41.25, rtol=0, atol=1e-9)
    assert table.t(expected.item()) == table.t(expected)  # Python numbers keep their double precision
    assert table.sigma(41.3) == table.sigma(torch.tensor(41.3, dtype=torch.float64))
    assert table.t(torch.tensor([[1.0, 2.0]])).shape == (1, 2)


@pytest.mark.parametrize("t", [-1, 999.5, math.nan, torch.tensor([3, 1000])])
def test_timestep_outside_the_table(t):
    with pytest.raises(ValueError, match=r"outside 0\.\.999"):
        Schedule(DiffusionConfig()).sigma(t)


# What each spacing visits out of 1000, ascending
EXACT = {
    "compvis": {
        1: [1],
        2: [1, 501],
        3: [1, 334, 667],
        9: [1, 112, 223, 334, 445, 556, 667, 778, 889],
        27: list(range(1, 1000, 37)),
        40: list(range(1, 1000, 25)),
        50: list(range(1, 1000, 20)),
        300: [10 * k + j for k in range(100) for j in (1, 4, 7)],
        999: list(range(1, 1000)),
        1000: list(range(1000)),
    },
    "leading": {
        1: [0],
        2: [0, 500],
        3: [0, 333, 666],
        9: list(range(0, 999, 111)),
        27: list(range(0, 999, 37)),
        40: list(range(0, 1000, 25)),
        50: list(range(0, 1000, 20)),
        300: list(range(0, 900, 3)),
        999: list(range(999)),
        1000: list(range(1000)),
    },
    "trailing": {
        1: [999],
        2: [499, 999],
        3: [332, 666, 999],
        9: [110, 221, 332, 443, 555, 666, 777, 888, 999],
        40: list(range(24, 1000, 25)),
        50: list(range(19, 1000, 20)),
        300: [10 * k + j for k in range(100) for j in (2, 6, 9)],
        1000: list(range(1000)),
    },
    "linspace": {
        1: [999],
        2: [0, 999],
        3: [0, 500, 999],
        9: [0, 125, 250, 375, 500, 624, 749, 874, 999],
        28: list(range(0, 1000, 37)),
        1000: list(range(1000)),
    },
}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_exact_timesteps(spacing):
    for steps, expected in EXACT[spacing].items():
        assert timesteps(spacing, steps, 1000).tolist() == expected[::-1], (spacing, steps)


@pytest.mark.parametrize("steps", STEPS)
def test_timesteps_follow_their_formulas(steps):
    """In exact arithmetic; only linspace may differ by one, where its exact value is a half."""
    i = range(steps)
    compvis = [k * 1000 // steps + (steps < 1000) for k in i]
    trailing = [round(1000 - Fraction(1000 * k, steps)) - 1 for k in i]
    assert timesteps("compvis", steps, 1000).tolist() == compvis[::-1]
    assert timesteps("leading", steps, 1000).tolist() == [k * (1000 // steps) for k in i][::-1]
    assert timesteps("trailing", steps, 1000).tolist() == trailing
    linspace = timesteps("linspace", steps, 1000).flip(0).tolist()
    for k, t in zip(i, linspace, strict=True):
        assert abs(t - Fraction(999 * k, steps - 1)) <= Fraction(1, 2) if steps > 1 else t == 999


@pytest.mark.parametrize("T", [1, 2, 3, 7, 100])
def test_any_step_count(T):
    for spacing in SPACINGS:
        for steps in range(1, T + 1):
            t = timesteps(spacing, steps, T)
            assert t.dtype == torch.int64 and t.shape == (steps,)
            assert (t.diff() < 0).all() and t.min() >= 0 and t.max() < T, (spacing, steps, T)


def test_compvis_equals_the_original_wherever_it_works():
    """The original: arange(0, 1000, 1000 // S) + 1, usable if it has S entries and stays below 1000."""
    compared = []
    for steps in range(1, 1001):
        original = np.arange(0, 1000, 1000 // steps) + 1
        if len(original) == steps and original[-1] < 1000:
            assert timesteps("compvis", steps, 1000).tolist() == original[::-1].tolist()
            compared.append(steps)
    assert compared == [s for s in range(1, 1000) if 1000 % s == 0]


def test_spacings_equal_diffusers():
    from diffusers import DDIMScheduler

    for spacing in ("leading", "trailing", "linspace"):
        other = DDIMScheduler(timestep_spacing=spacing)
        for steps in (2, 3, 9, 10, 27, 28, 30, 40, 50, 77, 250, 300, 333, 999, 1000):
            other.set_timesteps(steps)
            theirs = other.timesteps.tolist()
            assert timesteps(spacing, steps, 1000).tolist() == theirs[:steps], (spacing, steps)
    offset = DDIMScheduler(
        timestep_spacing="leading", steps_offset=1
    )  # the configuration shipped with SD 1 and 2
    for steps in (1, 2, 4, 5, 10, 20, 25, 40, 50, 100, 250, 500):
        offset.set_timesteps(steps)
        assert timesteps("compvis", steps, 1000).tolist() == offset.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_sigma_grid(spacing, steps):
    table = Schedule(DiffusionConfig())
    grid = sigma_grid(table, spacing, steps)
    assert grid.dtype == torch.float64 and grid.shape == (steps + 1,)
    assert (grid.diff() < 0).all()
    assert torch.equal(grid[:-1], table.sigmas[timesteps(spacing, steps, 1000)])
    ends_at_timestep_0 = spacing == "compvis" and steps < 1000
    assert grid[-1] == (table.sigmas[0] if ends_at_timestep_0 else 0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_illegal_step_count(steps, spacing):
    with pytest.raises(ValueError, match=f"steps must be between 1 and 1000, got {steps}"):
        sigma_grid(Schedule(DiffusionConfig()), spacing, steps)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="unknown spacing 'uniform', expected one of compvis"):
        timesteps("uniform", 10, 1000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule is 'sigmoid', expected one of scaled_linear"),
        ({"prediction": "epsilon"}, "prediction is 'epsilon', expected one of eps, v, x0"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1, got 0.0 and 0.012"),
        ({"beta_start": 0.1}, "0 < beta_start <= beta_end < 1, got 0.1 and 0.012"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": math.nan}, "0 < beta_start <= beta_end < 1"),
        ({"num_timesteps": 0}, "num_timesteps must be at least 1, got 0"),
        ({"zero_terminal_snr": True}, 'zero_terminal_snr needs prediction "v" or "x0", got "eps"'),
        ({"zero_terminal_snr": True, "prediction": "v", "num_timesteps": 1}, "at least 2, got 1"),
    ],
)
def test_illegal_config(values, message):
    with pytest.raises(ValueError, match=message) as error:
        DiffusionConfig(**values)
    assert "\n" not in str(error.value)


def test_underflow_is_named():
    with pytest.raises(ValueError, match="underflows to 0 within 1000 timesteps: lower beta_end"):
        Schedule(DiffusionConfig(schedule="linear", beta_start=0.9, beta_end=0.9))
