"""Samplers step by step against diffusers' schedulers, on a fixed linear network."""

import pytest
import torch
from problems import draw, network, seeded
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import ddim, ddpm, euler
from ldm.diffusion.schedule import DiffusionConfig, Schedule, sigma_grid, timesteps

NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def run_diffusers(scheduler, x, scale_to, steps_seen):
    """Their loop, in float64 where their scheduler allows it. x in their scale; returns every x."""
    for t in scheduler.timesteps:
        output = network(scale_to(scheduler, x, t), torch.as_tensor(t).reshape(1).float())
        x = scheduler.step(output, t, x, **steps_seen).prev_sample
        yield x


def as_it_is(scheduler, x, t):
    return x


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("spacing", "steps"), [("compvis", 50), ("leading", 27), ("trailing", 10)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_equals_diffusers(spacing, steps, prediction, eta):
    """Not "linspace": there their DDIM steps back by 1000 // steps and not to the timestep it visits next."""
    from diffusers import DDIMScheduler

    schedule = Schedule(DiffusionConfig(prediction=prediction))
    compvis = spacing == "compvis"  # the settings that Stable Diffusion 1 and 2 ship with
    other = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=NAMES[prediction],
        clip_sample=False,
        timestep_spacing="leading" if compvis else spacing,
        steps_offset=int(compvis),
        set_alpha_to_one=not compvis,
    )
    other.set_timesteps(steps)
    assert other.timesteps.tolist() == timesteps(spacing, steps, 1000).tolist()
    other.alphas_cumprod = schedule.alpha_bar  # their table is float32
    other.final_alpha_cumprod = schedule.alpha_bar[0] if compvis else torch.tensor(1.0, dtype=torch.float64)
    sigmas = sigma_grid(schedule, spacing, steps)
    x_t = draw(2, 4, 8, 8)
    generator = torch.Generator().manual_seed(3)
    theirs = run_diffusers(other, x_t, as_it_is, {"eta": eta, "generator": generator})
    x = to_sigma_scale(x_t, float(sigmas[0]))
    ours = ddim(Denoiser(network, schedule), x, sigmas, noise=seeded(x), eta=eta)
    for step, expected in zip(ours, theirs, strict=True):
        assert_close(step.sample, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 27), ("trailing", 50), ("trailing", 9)])
def test_ddpm_equals_diffusers(spacing, steps, prediction):
    from diffusers import DDPMScheduler

    schedule = Schedule(DiffusionConfig(prediction=prediction))
    other = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=NAMES[prediction],
        clip_sample=False,
        timestep_spacing=spacing,
    )
    other.set_timesteps(steps)
    other.alphas_cumprod, other.one = schedule.alpha_bar, torch.tensor(1.0, dtype=torch.float64)
    sigmas = sigma_grid(schedule, spacing, steps)
    x_t = draw(1, 4, 4, 4)
    theirs = run_diffusers(other, x_t, as_it_is, {"generator": torch.Generator().manual_seed(3)})
    x = to_sigma_scale(x_t, float(sigmas[0]))
    ours = ddpm(Denoiser(network, schedule), x, sigmas, noise=seeded(x))
    for step, expected in zip(ours, theirs, strict=True):
        assert_close(step.sample, expected, rtol=1e-11, atol=1e-9)  # they add noise of 1e-10 in the last step


@pytest.mark.parametrize(
    ("prediction", "zero_terminal_snr"),
    [("eps", False), ("v", False), ("x0", False), ("v", True), ("x0", True)],
)
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 28), ("trailing", 20), ("leading", 30)])
def test_euler_equals_diffusers(spacing, steps, prediction, zero_terminal_snr):
    """In float32, as their Euler always computes."""
    from diffusers import EulerDiscreteScheduler

    schedule = Schedule(DiffusionConfig(prediction=prediction, zero_terminal_snr=zero_terminal_snr))
    other = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    other.set_timesteps(steps)
    sigmas = sigma_grid(schedule, spacing, steps)
    # zero terminal SNR: their rescale in float32 moves the last levels before the end by up to 2e-3
    assert_close(other.sigmas.double(), sigmas, rtol=5e-3 if zero_terminal_snr else 2e-5, atol=0)
    other.sigmas = sigmas.float()
    x = to_sigma_scale(draw(2, 4, 8, 8, dtype=torch.float32), float(sigmas[0]))
    theirs = run_diffusers(other, x, lambda scheduler, x, t: scheduler.scale_model_input(x, t), {})
    for step, expected in zip(euler(Denoiser(network, schedule), x, sigmas), theirs, strict=True):
        error = (step.x - expected).norm() / expected.norm()
        assert error < 1e-5, (step.index, error)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_equals_diffusers(prediction):
    """Their DDIM takes alpha_bar = 0 itself; our sigma of 4096 costs some 2^-12 of the starting noise."""
    from diffusers import DDIMScheduler

    schedule = Schedule(DiffusionConfig(prediction=prediction, zero_terminal_snr=True))
    other = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=NAMES[prediction],
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    other.set_timesteps(20)
    other.alphas_cumprod = schedule.alpha_bar
    other.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    sigmas = sigma_grid(schedule, "trailing", 20)
    x_t = draw(2, 4, 8, 8)
    x = to_sigma_scale(x_t, float(sigmas[0]))
    theirs = run_diffusers(other, x_t, as_it_is, {})
    for step, expected in zip(ddim(Denoiser(network, schedule), x, sigmas), theirs, strict=True):
        assert step.x.isfinite().all()
        assert (step.sample - expected).norm() < 2**-11 * x_t.norm(), step.index
