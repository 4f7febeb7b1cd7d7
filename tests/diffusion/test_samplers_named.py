"""The samplers beyond DDPM, DDIM and Euler against diffusers' schedulers, on equal levels, in float64.

Each test is a row of the table that maps our names to theirs. Their schedulers are given our levels, since
their own are float32; that their own are the same is tested with the grids.
"""

import pytest
import torch
from problems import draw, network, seeded

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import make_grid
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig, Schedule, sigma_grid, timesteps

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {prediction: Schedule(DiffusionConfig(prediction=prediction)) for prediction in NAMES}


def mine(name, x_t, sigmas, prediction="eps", **options):
    """Every step of our sampler, started from noise x_t in the network's scale."""
    x = to_sigma_scale(x_t, float(sigmas[0]))
    denoise = Denoiser(network, SCHEDULES[prediction])
    return SAMPLERS[name].function(denoise, x, sigmas, noise=seeded(x), **options)


def with_levels(scheduler, sigmas):
    """A scheduler that goes by its own `sigmas`, given ours."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.clone()
    scheduler.set_begin_index(0)
    return scheduler


def close(x, expected, bound=1e-10):
    error = ((x - expected).norm() / expected.norm()).item()
    assert error < bound, error


# ---- those that go by sigmas, in the scale of the network ----


def go(scheduler, sigmas, x, prediction, **more):
    """Their loop, with the timesteps of our levels; yields x in the scale of the network."""
    for i, t in enumerate(scheduler.timesteps):
        output = network(x, SCHEDULES[prediction].t(sigmas[i : i + 1]).float())
        x = scheduler.step(output, t, x, **more).prev_sample
        yield x


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("order", "variant"), [(1, "bh2"), (2, "bh2"), (3, "bh2"), (2, "bh1"), (3, "bh1")])
@pytest.mark.parametrize(
    ("grid", "steps"), [("linspace", 1), ("linspace", 2), ("trailing", 5), ("karras", 20)]
)
def test_unipc(order, variant, grid, steps, prediction):
    from diffusers import UniPCMultistepScheduler

    sigmas, x = make_grid(SCHEDULES["eps"], grid, steps), draw(2, 4, 4, 4)
    if variant == "bh1":
        sigmas[-1] = SCHEDULES["eps"].sigmas[0] / 2  # at level 0 theirs is not a number
    other = UniPCMultistepScheduler(
        **SD, solver_order=order, solver_type=variant, prediction_type=NAMES[prediction]
    )
    theirs = go(with_levels(other, sigmas), sigmas, x, prediction)
    ours = mine("unipc", x, sigmas, prediction, order=order, variant=variant)
    for step, expected in zip(ours, theirs, strict=True):
        close(step.sample, expected)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("grid", "steps"), [("compvis", 5), ("compvis", 20), ("compvis", 1)])
def test_deis(order, grid, steps, prediction):
    """Their last level is that of timestep 0, as in "compvis": of level 0 they would take the logarithm."""
    from diffusers import DEISMultistepScheduler

    sigmas, x = make_grid(SCHEDULES["eps"], grid, steps), draw(2, 4, 4, 4)
    other = DEISMultistepScheduler(**SD, solver_order=order, prediction_type=NAMES[prediction])
    theirs = go(with_levels(other, sigmas), sigmas, x, prediction)
    for step, expected in zip(mine("deis", x, sigmas, prediction, order=order), theirs, strict=True):
        close(step.sample, expected)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("grid", "steps"), [("linspace", 1), ("karras", 3), ("linspace", 20)])
def test_dpmpp_2m(grid, steps, prediction):
    """In float32, as theirs computes; it falls to first order where the last level is 0, as ours."""
    from diffusers import DPMSolverMultistepScheduler

    sigmas, x = make_grid(SCHEDULES["eps"], grid, steps), draw(2, 4, 4, 4)
    other = DPMSolverMultistepScheduler(**SD, prediction_type=NAMES[prediction])
    theirs = go(with_levels(other, sigmas), sigmas, x, prediction)
    for step, expected in zip(mine("dpmpp_2m", x, sigmas, prediction), theirs, strict=True):
        close(step.sample, expected, 1e-6)


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize(("grid", "steps"), [("linspace", 1), ("karras", 3), ("linspace", 20)])
def test_dpmpp_2m_sde(grid, steps, variant):
    from diffusers import DPMSolverMultistepScheduler

    sigmas, x = make_grid(SCHEDULES["eps"], grid, steps), draw(2, 4, 4, 4, dtype=torch.float32)
    other = DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_type=variant)
    noise = {"generator": torch.Generator().manual_seed(3)}
    theirs = go(with_levels(other, sigmas), sigmas, x, "eps", **noise)
    for step, expected in zip(mine("dpmpp_2m_sde", x, sigmas, variant=variant), theirs, strict=True):
        close(step.sample, expected, 1e-5)


# ---- those that go by sigmas, in the scale of sigma ----


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("name", "their_name", "tolerance"), [
    ("heun", "HeunDiscreteScheduler", 1e-10),
    ("dpm2", "KDPM2DiscreteScheduler", 1e-5),
    ("lms", "LMSDiscreteScheduler", 1e-10),
])  # fmt: skip
@pytest.mark.parametrize("steps", [2, 10])
def test_two_evaluations_and_lms(name, their_name, tolerance, steps, prediction):
    import diffusers

    sigmas = make_grid(SCHEDULES["eps"], "linspace", steps)
    other = getattr(diffusers, their_name)(**SD, prediction_type=NAMES[prediction])
    other.set_timesteps(steps)
    if name == "lms":
        other.sigmas = sigmas.clone()
    elif name == "heun":  # each level but the ends twice
        other.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    x = start = float(sigmas[0]) * draw(2, 4, 4, 4)
    for t in other.timesteps:
        model_input = other.scale_model_input(x, t)
        index = other.step_index
        level = (
            other.sigmas[index]
            if name != "dpm2" or other.state_in_first_order
            else other.sigmas_interpol[index]
        )
        output = network(model_input, SCHEDULES[prediction].t(level.reshape(1)).float())
        x = other.step(output, t, x).prev_sample
    denoise = Denoiser(network, SCHEDULES[prediction])
    *_, step = SAMPLERS[name].function(denoise, start, sigmas)
    close(step.x, x, tolerance)


# ---- those that go by alpha_bar ----


@pytest.mark.parametrize(
    ("name", "steps"),
    [("plms", 2), ("plms", 4), ("plms", 20), ("plms", 50), ("pndm", 4), ("pndm", 20), ("pndm", 50)],
)
def test_plms_and_pndm(name, steps):
    """Stable Diffusion's shipped settings. Not with v: they mix velocities of different levels as if of one.

    They run PLMS' first step as two, and each Runge-Kutta step as four.
    """
    from diffusers import PNDMScheduler

    other = PNDMScheduler(**SD, skip_prk_steps=name == "plms", steps_offset=1, set_alpha_to_one=False)
    other.set_timesteps(steps)
    schedule = SCHEDULES["eps"]
    other.alphas_cumprod, other.final_alpha_cumprod = schedule.alpha_bar, schedule.alpha_bar[0]
    sigmas, x_t = sigma_grid(schedule, "compvis", steps), draw(2, 4, 4, 4)
    theirs, x = [], x_t
    for t in other.timesteps:
        x = other.step(network(x, t.reshape(1).float()), t, x).prev_sample
        theirs.append(x)
    theirs = theirs[1:] if name == "plms" else [*theirs[3:12:4], *theirs[12:]]
    for step, expected in zip(mine(name, x_t, sigmas), theirs, strict=True):
        close(step.sample, expected)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_lcm(steps, prediction):
    from diffusers import LCMScheduler

    other = LCMScheduler(**SD, prediction_type=NAMES[prediction])
    other.set_timesteps(steps)
    schedule = SCHEDULES[prediction]
    sigmas, x_t = make_grid(schedule, "lcm", steps), draw(2, 4, 4, 4)
    assert schedule.t(sigmas[:-1]).tolist() == other.timesteps.tolist()
    if steps == 4:
        assert other.timesteps.tolist() == [999, 759, 499, 259]
    other.alphas_cumprod, other.final_alpha_cumprod = schedule.alpha_bar, schedule.alpha_bar[0]
    generator, x = torch.Generator().manual_seed(3), x_t
    for step, t in zip(mine("lcm", x_t, sigmas, prediction), other.timesteps, strict=True):
        x = other.step(network(x, t.reshape(1).float()), t, x, generator=generator).prev_sample
        close(step.sample, x, 1e-6 if steps < 50 else 1e-4)  # the boundary factors


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd(steps, gamma, prediction):
    """Theirs ends at timestep 0, so here ours does too."""
    from diffusers import TCDScheduler

    other = TCDScheduler(**SD, prediction_type=NAMES[prediction])
    other.set_timesteps(steps)
    schedule = SCHEDULES[prediction]
    sigmas, x_t = make_grid(schedule, "lcm", steps), draw(2, 4, 4, 4)
    assert schedule.t(sigmas[:-1]).tolist() == other.timesteps.tolist()
    sigmas[-1] = schedule.sigmas[0]
    other.alphas_cumprod = schedule.alpha_bar
    generator, x = torch.Generator().manual_seed(3), x_t
    ours = mine("tcd", x_t, sigmas, prediction, gamma=gamma, schedule=schedule)
    for step, t in zip(ours, other.timesteps, strict=True):
        output = network(x, t.reshape(1).float())
        x = other.step(output, t, x, eta=gamma, generator=generator).prev_sample
        close(step.sample, x)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_inversion(steps):
    """Not with v or x0: these they convert with the level before that of the timestep."""
    from diffusers import DDIMInverseScheduler

    other = DDIMInverseScheduler(**SD, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    other.set_timesteps(steps)
    schedule = SCHEDULES["eps"]
    other.alphas_cumprod, other.initial_alpha_cumprod = schedule.alpha_bar, schedule.alpha_bar[0]
    assert other.timesteps.tolist() == timesteps("compvis", steps, 1000).flip(0).tolist()
    sigmas, x = sigma_grid(schedule, "compvis", steps).flip(0), draw(2, 4, 4, 4)
    ours = ddim_invert(Denoiser(network, schedule), to_sigma_scale(x, float(sigmas[0])), sigmas)
    for step, t in zip(ours, other.timesteps, strict=True):
        x = other.step(network(x, t.reshape(1).float()), t, x).prev_sample
        close(step.sample, x)
