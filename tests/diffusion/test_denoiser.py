"""The denoiser contract: a network that knows x0 gives it back, at every level and in every form of sigma."""

import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.denoiser import ROWS, Denoiser
from ldm.diffusion.process import add_noise, velocity, x0_from_eps, x0_from_v
from ldm.diffusion.schedule import PREDICTIONS, DiffusionConfig, Schedule


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_network(x_t, t, context=None):
    """Something that depends on all its inputs."""
    out = 0.7 * x_t.roll(1, dims=1) + (0.1 + t / 2000).to(x_t.dtype)[:, None, None, None]
    return out if context is None else out + context.mean(dim=(1, 2))[:, None, None, None]


@pytest.mark.parametrize(
    ("prediction", "zero_terminal_snr"),
    [("eps", False), ("v", False), ("x0", False), ("v", True), ("x0", True)],
)
def test_a_perfect_network_gives_x0_back(prediction, zero_terminal_snr):
    schedule = Schedule(DiffusionConfig(prediction=prediction, zero_terminal_snr=zero_terminal_snr))
    x0, eps = draw(2, 1, 4, 8, 8)
    for t in (0, 1, 500, 998, 999):
        sigma = schedule.sigmas[t]
        alpha_bar = 1 / (1 + sigma**2)

        def network(x_t, given, t=t, alpha_bar=alpha_bar):
            assert given.tolist() == [t]
            assert_close(x_t, add_noise(x0, eps, alpha_bar), rtol=1e-12, atol=1e-12)
            return {"eps": eps, "v": velocity(x0, eps, alpha_bar), "x0": x0}[prediction]

        denoised = Denoiser(network, schedule)(x0 + sigma * eps, sigma.item())
        assert_close(denoised, x0, rtol=0, atol=1e-11)  # at sigma 4096 rounding alone is 1e-12


def test_rows_are_the_conversions_of_process():
    """c_skip x + c_out output equals x0 from the same output in the alpha_bar notation."""
    sigma, x, output = 3.0, draw(1, 4, 4, 4), draw(1, 4, 4, 4, seed=1)
    schedule = Schedule(DiffusionConfig())
    x_t, alpha_bar = x * 0.1**0.5, 0.1  # sigma 3
    expected = {
        "eps": x0_from_eps(x_t, output, alpha_bar),
        "v": x0_from_v(x_t, output, alpha_bar),
        "x0": output,
    }
    elsewhere = {"flow", "edm"}  # tested in test_flow.py and test_edm.py
    assert ROWS.keys() == set(PREDICTIONS) == expected.keys() | elsewhere
    for prediction in expected:
        c_skip, c_out, c_in, c_noise = ROWS[prediction](torch.tensor(sigma, dtype=torch.float64), schedule)
        assert_close(c_skip * x + c_out * output, expected[prediction], rtol=1e-13, atol=1e-13)
        assert_close(c_in * x, x_t, rtol=1e-13, atol=1e-13)
        assert c_noise == schedule.t(sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_form_of_sigma(prediction):
    form = {"schedule": "flow"} if prediction == "flow" else {}
    denoise = Denoiser(linear_network, Schedule(DiffusionConfig(prediction=prediction, **form)))
    x = draw(3, 4, 8, 8, dtype=torch.float32)
    expected = denoise(x, 2.0)
    assert torch.equal(denoise(x, 2), expected)
    assert torch.equal(denoise(x, torch.tensor(2.0)), expected)
    assert torch.equal(denoise(x, torch.tensor(2.0, dtype=torch.float64)), expected)
    assert torch.equal(denoise(x, torch.full((3,), 2.0)), expected)
    levels = torch.tensor([0.1, 2.0, 14.0])
    mixed = denoise(x, levels)
    for b in range(3):
        assert_close(mixed[b : b + 1], denoise(x[b : b + 1], levels[b]), rtol=1e-6, atol=1e-6)


def test_timesteps_on_and_between_the_table():
    seen = []

    def network(x_t, t):
        seen.append(t)
        return x_t

    schedule = Schedule(DiffusionConfig())
    denoise = Denoiser(network, schedule)
    x = draw(2, 4, 8, 8, dtype=torch.float32)
    denoise(x, schedule.sigmas[481].item())
    denoise(x, schedule.sigmas[[3, 999]].float())
    denoise(x, schedule.sigma(10.5))
    denoise(x, 1e3)
    assert [t.tolist() for t in seen[:2] + seen[3:]] == [[481, 481], [3, 999], [999, 999]]
    assert_close(seen[2], torch.tensor([10.5, 10.5]), rtol=0, atol=1e-5)
    assert all(t.dtype == torch.float32 for t in seen)


def test_conditioning_is_passed_on():
    denoise = Denoiser(linear_network, Schedule(DiffusionConfig()))
    x = draw(2, 4, 8, 8, dtype=torch.float32)
    context = draw(2, 5, 6, seed=1, dtype=torch.float32)
    expected = denoise(x, 2.0) - 2.0 * context.mean(dim=(1, 2))[:, None, None, None]
    assert_close(denoise(x, 2.0, context=context), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "network_dtype", "seen_dtype", "result"),
    [
        (torch.float32, None, torch.float32, torch.float32),
        (torch.float64, None, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float16, torch.float32),
    ],
)
def test_precision(given, network_dtype, seen_dtype, result):
    seen = []

    def network(x_t, t):
        seen.append(x_t.dtype)
        return x_t

    denoised = Denoiser(network, Schedule(DiffusionConfig()), network_dtype)(draw(1, 4, 8, 8).to(given), 5.0)
    assert seen == [seen_dtype] and denoised.dtype == result


def test_float32_around_a_half_precision_network():
    """x - sigma eps with sigma = 14.6 is computed in float32 although the network's output is bfloat16."""
    schedule = Schedule(DiffusionConfig())
    x0, eps = draw(2, 1, 4, 8, 8, dtype=torch.float32)
    eps = eps.bfloat16().float()  # what such a network could at best return
    sigma = schedule.sigmas[-1].item()
    denoised = Denoiser(lambda x_t, t: eps.bfloat16(), schedule, torch.bfloat16)(x0 + sigma * eps, sigma)
    assert_close(denoised, x0, rtol=0, atol=1e-5)
