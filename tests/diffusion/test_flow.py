"""Rectified flow: x_t = (1 - t) x0 + t eps as x0 + sigma eps, from its table to its training.

In closed form, against the update of its papers, and against diffusers.
"""

import math

import numpy as np
import pytest
import torch
from problems import MEAN, STD, draw, exact_denoiser, last, network, seeded
from torch.testing import assert_close

from ldm.config import load_config
from ldm.diffusion.denoiser import Denoiser, flow_row
from ldm.diffusion.grids import GRIDS, make_grid, usual_grid
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.loss import LossConfig, by_density, diffusion_loss, loss_weight
from ldm.diffusion.process import flow_velocity, mix, to_sigma_scale
from ldm.diffusion.samplers import SAMPLERS, euler
from ldm.diffusion.schedule import FLOW_TOP, DiffusionConfig, Schedule, sigma_grid


def flow(shift=1.0, T=1000):
    return Schedule(DiffusionConfig(schedule="flow", prediction="flow", shift=shift, num_timesteps=T))


ON_A_FLOW = ("trailing", "linspace", "uniform", "sgm_uniform", "simple", "kl_optimal", "lcm", "flow")


# ---- the table ----


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_table(shift):
    """Timestep n is at t = (n + 1) / T; sigma t / (1 - t), times the shift, is that of s t / (1 + (s - 1) t)."""
    schedule, t = flow(shift), torch.arange(1, 1001, dtype=torch.float64) / 1000
    shifted = shift * t / (1 + (shift - 1) * t)
    assert_close(schedule.time(schedule.sigmas), shifted, rtol=1e-12, atol=0)
    assert_close(schedule.sigmas[:-1], (shifted / (1 - shifted))[:-1], rtol=1e-10, atol=0)
    assert schedule.sigmas[-1] == FLOW_TOP and schedule.time(FLOW_TOP) == 1 and schedule.pure
    assert_close(
        schedule.alpha_bar, (1 - shifted) ** 2 / ((1 - shifted) ** 2 + shifted**2), rtol=1e-9, atol=0
    )
    assert schedule.alpha_bar[-1] == 0
    whole, between = torch.arange(1000), torch.linspace(0, 998.9, 777, dtype=torch.float64)
    assert torch.equal(schedule.sigma(whole), schedule.sigmas)
    assert torch.equal(schedule.t(schedule.sigmas), whole.double())
    assert torch.equal(schedule.t(schedule.sigmas.float()), whole.double())
    assert_close(schedule.t(schedule.sigma(between)), between, rtol=0, atol=1e-4)
    assert schedule.t(2 * FLOW_TOP) == 999 and schedule.t(0.0) == 0
    assert schedule.sigma(999 - 1e-12) == FLOW_TOP


def test_one_timestep():
    schedule = flow(T=1)
    assert schedule.sigmas.tolist() == [FLOW_TOP] and schedule.t(1.0) == 0
    for name in ON_A_FLOW:
        assert make_grid(schedule, name, 1).tolist() == [FLOW_TOP, 0]


@pytest.mark.parametrize(("values", "message"), [
    ({"prediction": "flow"}, 'go together, got schedule "scaled_linear" and prediction "flow"'),
    ({"schedule": "flow"}, 'go together, got schedule "flow" and prediction "eps"'),
    ({"schedule": "flow", "prediction": "v"}, 'go together, got schedule "flow" and prediction "v"'),
    ({"schedule": "flow", "prediction": "flow", "shift": 0.0}, "shift must be a positive number, got 0.0"),
    ({"schedule": "flow", "prediction": "flow", "shift": math.nan}, "shift must be a positive number, got nan"),
    ({"schedule": "flow", "prediction": "flow", "shift": math.inf}, "shift must be a positive number, got inf"),
    ({"shift": 3.0}, 'shift 3.0 is of schedule "flow" only, got schedule "scaled_linear"'),
    ({"schedule": "flow", "prediction": "flow", "zero_terminal_snr": True}, "leave zero_terminal_snr out"),
    ({"prediction": "flow", "zero_terminal_snr": True}, "go together"),
    ({"prediction": "eps", "zero_terminal_snr": True}, 'needs prediction "v" or "x0", got "eps"'),
])  # fmt: skip
def test_impossible_configs(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        DiffusionConfig(**values)
    assert "\n" not in str(caught.value)


def test_too_much_shift():
    with pytest.raises(ValueError, match="exceeds noise level 16777216 before its end: lower shift"):
        flow(shift=1e5)


def test_from_yaml(tmp_path):
    path = tmp_path / "flow.yaml"
    path.write_text("schedule: flow\nprediction: flow\nshift: 3.0\n")
    expected = DiffusionConfig(schedule="flow", prediction="flow", shift=3.0)
    assert load_config(DiffusionConfig, path) == expected
    with pytest.raises(ValueError, match='got schedule "flow" and prediction "eps"'):
        load_config(DiffusionConfig, path, ["prediction=eps"])


# ---- the denoiser ----


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_perfect_network_gives_x0_back(shift):
    schedule, (x0, eps) = flow(shift), draw(2, 1, 4, 8, 8)
    for n in (0, 1, 500, 998, 999):
        sigma = float(schedule.sigmas[n])
        time = sigma / (1 + sigma)

        def perfect(x_t, told, n=n, time=time):
            t = (n + 1) / 1000
            assert_close(told, torch.tensor([1000 * shift * t / (1 + (shift - 1) * t)]), rtol=1e-6, atol=0)
            assert n < 999 or told == 1000
            assert_close(x_t, mix(x0, eps, time), rtol=1e-9, atol=1e-9)
            return eps - x0

        denoised = Denoiser(perfect, schedule)(x0 + sigma * eps, sigma)
        assert_close(denoised, x0, rtol=0, atol=1e-8)  # at level 2^24 rounding alone is 1e-9


def test_row_in_closed_form():
    """x0 = x_t - t v with x_t = x / (1 + sigma), t = sigma / (1 + sigma): at sigma 3, t is 3/4."""
    row = flow_row(torch.tensor(3.0, dtype=torch.float64), flow())
    assert [each.item() for each in row] == [0.25, -0.75, 0.25, 750.0]


def test_mix_and_velocity():
    x0, eps, time = *draw(2, 3, 4, 5, 6), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x_t, v = mix(x0, eps, time), flow_velocity(x0, eps)
    for b, t in enumerate(time.tolist()):
        assert_close(x_t[b], (1 - t) * x0[b] + t * eps[b], rtol=1e-14, atol=1e-14)
    assert_close(mix(x0, eps, 0.7) - mix(x0, eps, 0.2), 0.5 * v, rtol=1e-12, atol=1e-12)  # straight


# ---- sampling ----


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_is_rectified_flow_euler(steps, shift):
    """x_t <- x_t + (t_next - t) v(x_t, t), on the flow grid and so, unless shifted, on equal steps of t."""
    schedule = flow(shift)
    sigmas = make_grid(schedule, "flow", steps)
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    assert_close(schedule.time(sigmas), shift * t / (1 + (shift - 1) * t), rtol=1e-12, atol=1e-15)
    x_t = draw(2, 4, 4, 4)
    times = (sigmas / (1 + sigmas)).tolist()
    for step in euler(Denoiser(network, schedule), x_t * (1 + sigmas[0]), sigmas):
        now, after = times[step.index], times[step.index + 1]
        told = (1000 * schedule.time(sigmas[step.index])).float().expand(2)
        x_t = x_t + (after - now) * network(x_t, told)
        assert_close(step.x / (1 + step.sigma), x_t, rtol=1e-12, atol=1e-12)


def diffusers_flow(x, shift, steps, sigmas):
    from diffusers import FlowMatchEulerDiscreteScheduler

    other = FlowMatchEulerDiscreteScheduler(shift=shift)
    other.set_timesteps(steps, sigmas=sigmas)
    for t in other.timesteps:
        x = other.step(network(x, t.expand(len(x))), t, x).prev_sample
    return x, other.sigmas


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_equals_diffusers(steps, shift, dtype):
    """Given the equal steps that pipelines give it; its levels and sums are float32. Theirs starts at t = 1."""
    schedule, noise = flow(shift), draw(2, 4, 4, 4, dtype=dtype)
    sigmas = make_grid(schedule, "flow", steps)
    expected, times = diffusers_flow(noise, shift, steps, np.linspace(1, 1 / steps, steps))
    assert_close(schedule.time(sigmas).float(), times, rtol=0, atol=2e-7)
    x = to_sigma_scale(noise, float(sigmas[0]))
    got = last(euler(Denoiser(network, schedule), x, sigmas)).x
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < 1e-6, error


@pytest.mark.parametrize("steps", [2, 10, 28])
def test_their_own_timesteps_are_uniform_ones(steps):
    """From t = 1 to 1 / T, where there is no shift; shifted, theirs goes to a twice shifted 1 / T."""
    schedule, noise = flow(), draw(2, 4, 4, 4)
    sigmas = make_grid(schedule, "uniform", steps)
    expected, times = diffusers_flow(noise, 1.0, steps, None)
    assert_close(schedule.time(sigmas).float(), times, rtol=0, atol=2e-7)
    got = last(euler(Denoiser(network, schedule), to_sigma_scale(noise, float(sigmas[0])), sigmas)).x
    assert ((got - expected).norm() / expected.norm()).item() < 1e-6


def gaussian_velocity(x_t, told):
    """E[eps - x0 | x_t] of Gaussian data, with (1 - t) x0 + t eps = x_t."""
    t = (told.double() / 1000)[:, None, None, None]
    signal, of_x_t = 1 - t, x_t - (1 - t) * MEAN
    variance = (signal * STD) ** 2 + t**2
    return t * of_x_t / variance - MEAN - signal * STD**2 * of_x_t / variance


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_first_order_convergence(shift):
    """To the exact end of the path from pure noise, MEAN + STD noise."""
    schedule, noise = flow(shift), draw(1, 4, 4, 4)
    counts, errors = (16, 32, 64, 128, 256), []
    for steps in counts:
        sigmas = make_grid(schedule, "flow", steps)
        x = to_sigma_scale(noise, float(sigmas[0]))
        end = last(euler(Denoiser(gaussian_velocity, schedule), x, sigmas)).x
        errors.append((end - (MEAN + STD * noise)).abs().max().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9, (slope, errors)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.stochastic])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_deterministic_sampler_starts_from_pure_noise(name, dtype):
    """Where sigma is infinite and a stand-in is used, also in float32: near the exact end of the path."""
    noise = draw(1, 4, 4, 4, dtype=dtype)
    errors = []
    for steps in (25, 100):
        sigmas = make_grid(flow(), "flow", steps)
        x = to_sigma_scale(noise, float(sigmas[0]))
        end = last(SAMPLERS[name].function(exact_denoiser, x, sigmas)).x
        errors.append((end - (MEAN + STD * noise)).abs().max().item())
    assert errors[0] < 0.1 and errors[1] < 0.6 * errors[0], errors


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.stochastic])
def test_every_stochastic_sampler_starts_from_pure_noise(name):
    """Mean and spread of Gaussian data: the noise law x0 + sigma eps is that of a flow as well."""
    count = 20_000
    sigmas = make_grid(flow(), "flow", 100)
    x = to_sigma_scale(draw(count, 1, dtype=torch.float32), float(sigmas[0]))
    if name in ("lcm", "tcd"):  # for models that answer with the end of the path

        def denoise(x, sigma):
            return MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + sigma**2)
    else:
        denoise = exact_denoiser
    options = {"gamma": 1.0, "schedule": flow()} if name == "tcd" else {}
    options |= {"noise_scale": 1.0, "churn": 10.0} if "edm" in name else {}
    end = last(SAMPLERS[name].function(denoise, x, sigmas, noise=seeded(x), **options)).x
    assert_close(end.mean().item(), MEAN, rtol=0, atol=0.03)
    assert_close(end.std().item(), STD, rtol=0.06, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", ON_A_FLOW)
def test_finite_on_every_grid(name, grid):
    noises = draw(27, 2, 1, 4, 1, 1, dtype=torch.float32)
    for steps in (1, 2, 3, 27):
        for shift in (1.0, 3.0):
            schedule = flow(shift)
            sigmas = make_grid(schedule, grid, steps)
            assert sigmas[0] == FLOW_TOP and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
            x = to_sigma_scale(draw(1, 4, 1, 1, dtype=torch.float32), float(sigmas[0]))
            run = SAMPLERS[name].function(
                exact_denoiser, x, sigmas, noise=lambda index, part=0: noises[index, part]
            )
            for step in run:
                assert step.x.isfinite().all() and step.denoised.isfinite().all()
            assert step.x.abs().max() < 10, (steps, shift)


def test_image_to_image_noise():
    """A picture noised to a level inside the grid, x0 + sigma eps, is the flow's own mixture of t."""
    schedule, (x0, eps) = flow(3.0), draw(2, 2, 4, 4, 4)
    sigmas = make_grid(schedule, "flow", 20)[-13:]  # 12 of 20 steps: strength 0.6
    time = float(schedule.time(sigmas[0]))
    assert_close(time, 3 * 0.6 / (1 + 2 * 0.6), rtol=1e-12, atol=0)
    seen = []

    def spying(x_t, told):
        seen.append(x_t)
        return eps - x0

    end = last(euler(Denoiser(spying, schedule), x0 + float(sigmas[0]) * eps, sigmas)).x
    assert_close(seen[0], (1 - time) * x0 + time * eps, rtol=1e-12, atol=1e-12)
    assert_close(end, x0, rtol=1e-10, atol=1e-10)  # straight paths end at the picture in any number of steps


def test_inversion_and_back():
    sigmas, x = make_grid(flow(), "flow", 20), MEAN + STD * draw(2, 4, 4, 4)
    top = last(ddim_invert(exact_denoiser, x, sigmas.flip(0), iterations=60)).x
    assert_close(last(euler(exact_denoiser, top, sigmas)).x, x, rtol=0, atol=1e-8)


# ---- grids ----


def test_which_grids_fit():
    schedule = flow()
    assert usual_grid(schedule, "compvis") == usual_grid(schedule, "karras") == "flow"
    assert usual_grid(Schedule(DiffusionConfig()), "karras") == "karras"
    pure = Schedule(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
    assert usual_grid(pure, "karras") == "trailing"
    for name in GRIDS:
        if name in ON_A_FLOW:
            make_grid(schedule, name, 10)
            continue
        message = f"schedule {name} (starts below pure noise|needs a highest noise level).*; take flow"
        with pytest.raises(ValueError, match=message) as caught:
            make_grid(schedule, name, 10)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match="schedule flow is for flow models, which this is not; take sgm_uniform"
    ):
        make_grid(Schedule(DiffusionConfig()), "flow", 10)


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 1000])
def test_trailing_is_the_flow_grid_on_the_table(steps):
    """Where steps divides T."""
    assert_close(sigma_grid(flow(), "trailing", steps), make_grid(flow(), "flow", steps), rtol=1e-9, atol=0)


# ---- training ----


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss(shift):
    schedule, (x0, noise) = flow(shift), draw(2, 4, 4, 6, 8)
    n = torch.tensor([0, 300, 700, 999])
    t = (n + 1).double() / 1000
    t = (shift * t / (1 + (shift - 1) * t))[:, None, None, None]
    output, seen = draw(4, 4, 6, 8, seed=1), {}

    def predict(x_t, told):
        seen.update(x_t=x_t, told=told)
        return output

    loss = diffusion_loss(predict, x0, n, noise, schedule, LossConfig())
    assert_close(loss, (output - (noise - x0)).square().mean((1, 2, 3)), rtol=1e-12, atol=0)
    assert_close(seen["x_t"], (1 - t) * x0 + t * noise, rtol=1e-12, atol=1e-12)
    assert seen["told"].dtype == torch.float32 and seen["told"][-1] == 1000
    assert_close(seen["told"], (1000 * t.flatten()).float())
    perfect = diffusion_loss(lambda x_t, t: noise - x0, x0, n, noise, schedule, LossConfig("min_snr"))
    assert torch.equal(perfect, torch.zeros(4, dtype=torch.float64))


def test_training_and_sampling_tell_the_network_the_same():
    schedule, told = flow(3.0), {}
    n = torch.arange(1000)
    x0 = torch.zeros(1000, 1, 1, 1)
    diffusion_loss(lambda x, t: told.update(train=t) or x, x0, n, x0, schedule, LossConfig())
    Denoiser(lambda x, t: told.update(sample=t) or x, schedule)(x0, schedule.sigmas)
    assert torch.equal(told["train"], told["sample"])


def test_min_snr_weighs_the_same_error_in_x0():
    """x0 = x_t - t v: an error of v is t times as large in x0."""
    sigma = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    config, alpha_bar, t = LossConfig("min_snr"), 1 / (1 + sigma**2), sigma / (1 + sigma)
    expected = loss_weight(alpha_bar, "x0", config) * t**2
    assert_close(loss_weight(alpha_bar, "flow", config), expected, rtol=1e-12, atol=0)


def test_density():
    """The share of the way to the last timestep has the logit-normal law (Esser et al. 2024, section 3.1)."""
    assert torch.equal(by_density(torch.arange(10), 10, LossConfig()), torch.arange(10))
    T = 10_000
    for mean, std in ((0.0, 1.0), (-0.5, 0.7)):
        config = LossConfig(density="logit_normal", logit_mean=mean, logit_std=std)
        t = by_density(torch.arange(T), T, config)
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < T and (t.diff() >= 0).all()
        logits = ((t + 0.5) / T).logit()
        assert_close(logits.mean().item(), mean, rtol=0, atol=2e-3)
        assert_close(logits.std().item(), std, rtol=2e-3, atol=0)
    far = by_density(torch.arange(10), 10, LossConfig(density="logit_normal", logit_mean=100.0))
    assert far.tolist() == [9] * 10
    config = LossConfig(density="logit_normal")
    seen = []
    x0 = torch.zeros(1000, 1, 1, 1)
    schedule = Schedule(DiffusionConfig())
    diffusion_loss(lambda x, t: seen.append(t) or x, x0, torch.arange(1000), x0, schedule, config)
    assert torch.equal(seen[0], by_density(torch.arange(1000), 1000, config))


@pytest.mark.parametrize(("values", "message"), [
    ({"density": "normal"}, "density is 'normal', expected one of uniform, logit_normal"),
    ({"logit_std": 0.0}, "logit_mean must be finite and logit_std above 0, got 0.0 and 0.0"),
    ({"logit_mean": math.nan}, "logit_mean must be finite and logit_std above 0, got nan and 1.0"),
])  # fmt: skip
def test_illegal_density(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
