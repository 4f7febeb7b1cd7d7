"""The training loss: target, weight and mean of each prediction, and where it is zero."""

import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.loss import LossConfig, diffusion_loss, loss_weight
from ldm.diffusion.process import add_noise, velocity
from ldm.diffusion.schedule import DiffusionConfig, Schedule


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 6, 8, generator=generator)
    return x0, noise, torch.tensor([0, 10, 300, 700, 999])


def schedule_of(prediction, **values):
    return Schedule(DiffusionConfig(prediction=prediction, **values))


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_perfect_prediction_costs_nothing(prediction, weighting, drawn):
    x0, noise, t = drawn
    schedule = schedule_of(prediction)
    alpha_bar = schedule.alpha_bar[t]
    target = {"eps": noise, "v": velocity(x0, noise, alpha_bar), "x0": x0}[prediction]
    seen = {}

    def predict(x_t, given_t):
        seen.update(x_t=x_t, t=given_t)
        return target

    loss = diffusion_loss(predict, x0, t, noise, schedule, LossConfig(weighting))
    assert torch.equal(loss, torch.zeros(5))
    assert_close(seen["x_t"], add_noise(x0, noise, alpha_bar))
    assert torch.equal(seen["t"], t)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_value_by_hand(prediction, drawn):
    """Weight times mean squared error, one value a sample, in float64."""
    x0, noise, t = (each.double() if each.is_floating_point() else each for each in drawn)
    schedule = schedule_of(prediction)
    output = torch.randn(5, 4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = diffusion_loss(lambda x_t, t: output, x0, t, noise, schedule, LossConfig("min_snr", 5.0))
    for b in range(5):
        alpha_bar = schedule.alpha_bar[t[b]].item()
        ratio = alpha_bar / (1 - alpha_bar)
        weight = {"eps": min(ratio, 5) / ratio, "v": min(ratio, 5) / (ratio + 1), "x0": min(ratio, 5)}[
            prediction
        ]
        v = alpha_bar**0.5 * noise[b] - (1 - alpha_bar) ** 0.5 * x0[b]
        target = {"eps": noise[b], "v": v, "x0": x0[b]}[prediction]
        expected = weight * ((output[b] - target) ** 2).sum() / (4 * 6 * 8)
        assert_close(loss[b], expected, rtol=1e-12, atol=0)


def test_min_snr_weights_the_same_error_in_x0(drawn):
    """One network in three parameterisations has one min-SNR loss: weights are the change of variables."""
    x0, noise, t = (each.double() if each.is_floating_point() else each for each in drawn)
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = []
    for prediction in ("eps", "v", "x0"):
        schedule = schedule_of(prediction)
        signal = schedule.alpha_bar[t].sqrt()[:, None, None, None]
        sigma = (1 - signal**2).sqrt()

        def predict(x_t, t, prediction=prediction, signal=signal, sigma=sigma):
            eps = (x_t - signal * guess) / sigma
            return {"eps": eps, "v": signal * eps - sigma * guess, "x0": guess}[prediction]

        losses.append(diffusion_loss(predict, x0, t, noise, schedule, LossConfig("min_snr")))
    assert_close(losses[0], losses[2], rtol=1e-9, atol=0)
    assert_close(losses[1], losses[2], rtol=1e-9, atol=0)


def test_weights_by_hand():
    alpha_bar = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)  # SNR 1, 9, 99
    config = LossConfig("min_snr", 5.0)
    for prediction, expected in (
        ("x0", [1, 5, 5]),
        ("eps", [1, 5 / 9, 5 / 99]),
        ("v", [1 / 2, 5 / 10, 5 / 100]),
    ):
        weight = loss_weight(alpha_bar, prediction, config)
        assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        assert torch.equal(loss_weight(alpha_bar, prediction, LossConfig()), torch.ones_like(alpha_bar))


def test_bfloat16_network_is_compared_in_float32(drawn):
    x0, noise, t = drawn
    loss = diffusion_loss(lambda x_t, t: noise.bfloat16(), x0, t, noise, schedule_of("eps"), LossConfig())
    assert loss.dtype == torch.float32
    expected = (noise.bfloat16().float() - noise).square().mean(dim=(1, 2, 3))
    assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_zero_terminal_snr(prediction, weighting, drawn):
    x0, noise, t = drawn
    schedule = schedule_of(prediction, zero_terminal_snr=True)
    loss = diffusion_loss(lambda x_t, t: torch.zeros_like(x_t), x0, t, noise, schedule, LossConfig(weighting))
    assert loss.isfinite().all()
    # pure noise: the target of v is -x0
    assert_close(loss[-1], x0[-1].square().mean() if weighting == "simple" else torch.tensor(0.0))


def test_gradient_reaches_the_network(drawn):
    x0, noise, t = drawn
    scale = torch.tensor(0.5, requires_grad=True)
    loss = diffusion_loss(lambda x_t, t: scale * x_t, x0, t, noise, schedule_of("eps"), LossConfig()).mean()
    loss.backward()
    x_t = add_noise(x0, noise, Schedule(DiffusionConfig()).alpha_bar[t])
    assert_close(scale.grad, (2 * (0.5 * x_t - noise) * x_t).mean())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weighting": "snr"}, "weighting is 'snr', expected one of simple, min_snr"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0, got 0.0"),
        ({"min_snr_gamma": float("nan")}, "min_snr_gamma must be above 0, got nan"),
    ],
)
def test_illegal_config(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
