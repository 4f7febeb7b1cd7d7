"""Every sampler on every grid (FAULTS 20 to 22): any number of steps, the levels it says, finite values.

Exact timesteps of each grid are in test_schedule.py, test_grids.py and test_names.py; long runs of each sampler
on its own grid in test_samplers.py.
"""

import math

import pytest
import torch
from problems import draw, exact_denoiser, last
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import GRIDS, make_grid
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import SAMPLERS, check_options, own_options
from ldm.diffusion.schedule import PREDICTIONS, SPACINGS, DiffusionConfig, Schedule, timesteps

SD = Schedule(DiffusionConfig())
FLOW = Schedule(DiffusionConfig(schedule="flow", prediction="flow"))
PURE = Schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True))
NOISES = draw(1000, 2, 1, 4, 1, 1, dtype=torch.float32)


def usable(schedule):
    """The grids that this model can be sampled on."""
    names = []
    for name in GRIDS:
        try:
            make_grid(schedule, name, 1)
        except ValueError:
            continue
        names.append(name)
    return names


def test_usable():
    assert len(usable(SD)) == len(GRIDS) - 1  # but "flow"
    assert len(usable(FLOW)) == 8 and len(usable(PURE)) == len(GRIDS) - 5


def visited(name, schedule, sigmas):
    """Levels at which each step evaluates, of a run in float32 whose every step is finite."""
    levels, calls = [], []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return exact_denoiser(x, sigma)

    x = to_sigma_scale(draw(1, 4, 1, 1, dtype=torch.float32), float(sigmas[0]))
    options = {"churn": 0.0} if "edm" in name else {}
    options |= {"schedule": schedule} if name in ("tcd", "pndm") else {}
    run = SAMPLERS[name].function(denoise, x, sigmas, noise=lambda i, part=0: NOISES[i, part], **options)
    for step in run:
        assert step.x.isfinite().all() and step.denoised.isfinite().all(), step.index
        assert step.index == len(levels) and step.sigma == sigmas[step.index + 1]
        levels.append(list(calls))
        calls.clear()
    assert not calls
    return levels


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [SD, FLOW, PURE], ids=["sd", "flow", "zero terminal SNR"])
def test_every_grid_is_visited_exactly(schedule, name):
    """Each step evaluates first where it starts, then nowhere above, nor below where an ancestral one goes."""
    for grid in usable(schedule):
        for steps in (1, 2, 3, 9) if schedule is not SD else (1, 2, 3, 9, 27):
            sigmas = make_grid(schedule, grid, steps)
            levels = visited(name, schedule, sigmas)
            assert [first for first, *_ in levels] == sigmas[:-1].tolist(), (grid, steps)
            assert len(levels) == steps and all(max(each) == each[0] and min(each) > 0 for each in levels)
            if grid in SPACINGS:
                t = schedule.t(torch.tensor([first for first, *_ in levels], dtype=torch.float64))
                assert t.tolist() == timesteps(grid, steps, 1000).tolist()


@pytest.mark.parametrize("steps", [300, 999, 1000])
@pytest.mark.parametrize(("sampler", "name"), [*zip(["ddim", "ddpm", "plms", "euler"], SPACINGS, strict=True),
    ("dpmpp_2m", "karras"), ("euler", "flow")])  # fmt: skip
def test_many_steps(sampler, name, steps):
    """The levels of the other grids, at these counts, are in test_grids.py."""
    schedule = FLOW if name == "flow" else SD
    sigmas = make_grid(schedule, name, steps)
    first = [each[0] for each in visited(sampler, schedule, sigmas)]
    assert first == sigmas[:-1].tolist()
    if name in SPACINGS:
        t = schedule.t(torch.tensor(first, dtype=torch.float64))
        assert t.tolist() == timesteps(name, steps, 1000).tolist()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_refused_counts(name, steps):
    with pytest.raises(ValueError, match=f"^steps must be between 1 and 1000, got {steps}$"):
        make_grid(FLOW if name == "flow" else SD, name, steps)


@pytest.mark.parametrize("form", ["scaled_linear", "cosine", "flow"])
def test_one_timestep(form):
    prediction = "flow" if form == "flow" else "eps"
    schedule = Schedule(DiffusionConfig(schedule=form, prediction=prediction, num_timesteps=1))
    for grid in usable(schedule):
        sigmas = make_grid(schedule, grid, 1)
        assert sigmas[0] == pytest.approx(float(schedule.sigmas[0]), rel=1e-14) and sigmas[1] == 0
        for name in SAMPLERS:
            assert visited(name, schedule, sigmas) == [[float(sigmas[0])]]
        with pytest.raises(ValueError, match="steps must be between 1 and 1, got 2"):
            make_grid(schedule, grid, 2)


@pytest.mark.parametrize("grid", ["flow", "trailing", "uniform", "sgm_uniform"])
@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "unipc", "deis", "lms", "heun"])
def test_coefficients_of_a_flow_step(name, grid):
    """x_t' = t'/t x_t + (1 - t' - (1 - t) t'/t) x0, to 1e-12, of any sampler where x0 is constant."""
    sigmas = make_grid(FLOW, grid, 9)
    times = (sigmas / (1 + sigmas)).tolist()
    x_t, x0 = draw(1, 4, 4, 4), draw(1, 4, 4, 4, seed=1)
    for i in (1, 4, 7, 8):
        t, after = times[i], times[i + 1]
        run = SAMPLERS[name].function(lambda x, sigma: x0, x_t / (1 - t), sigmas[i : i + 2])
        expected = after / t * x_t + (1 - after - (1 - t) * after / t) * x0
        assert_close(next(run).x * (1 - after), expected, rtol=1e-12, atol=1e-12)


# ---- FAULTS 22: infinite levels ----


@pytest.mark.parametrize("schedule", [FLOW, PURE], ids=["flow", "zero terminal SNR"])
def test_no_level_is_infinite(schedule):
    """Pure noise has the finite level of the table's end, whatever the grid."""
    assert schedule.pure and schedule.alpha_bar[-1] == 0 and schedule.sigmas.isfinite().all()
    for name in usable(schedule):
        for steps in (1, 2, 27, 1000):
            grid = make_grid(schedule, name, steps)
            assert grid.isfinite().all() and math.isclose(grid[0], schedule.sigmas[-1], rel_tol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("level", [math.inf, math.nan])
def test_infinite_level_is_refused(prediction, level):
    form = {"schedule": "flow"} if prediction == "flow" else {}
    denoise = Denoiser(lambda x, t: x, Schedule(DiffusionConfig(prediction=prediction, **form)))
    with pytest.raises(
        ValueError, match=f"^noise level {level} is not finite; this model's highest is "
    ) as caught:
        denoise(draw(1, 4, 4, 4), level)
    assert "\n" not in str(caught.value)


# ---- options that a sampler does not have ----

WITH_ETA = ("ddim", "euler_ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
WITH_ETA = (*WITH_ETA, "dpmpp_2m_sde", "dpmpp_3m_sde")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_of_another_sampler_is_refused(name):
    own, every = own_options(name), {}
    for other in SAMPLERS:
        every |= own_options(other)
    assert ("eta" in own) == (name in WITH_ETA)
    for option, parameter in every.items():
        if option in own:
            check_options(name, {option: own[option].default})
            continue
        with pytest.raises(ValueError, match=f"^sampler {name} has no {option}: it has ") as caught:
            check_options(name, {option: parameter.default})
        assert "\n" not in str(caught.value)


def test_deterministic_samplers_draw_nothing():
    def never(*_):
        raise AssertionError("drew noise")

    sigmas = make_grid(SD, "uniform", 9)
    x = float(sigmas[0]) * draw(1, 4, 4, 4)
    for row in SAMPLERS.values():
        if not row.stochastic:
            assert last(row.function(exact_denoiser, x, sigmas, noise=never)).x.isfinite().all()
