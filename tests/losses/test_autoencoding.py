"""The terms of the autoencoder's loss on given tensors, and its configuration."""

import math

import pytest
import torch
from torch.distributions import Laplace, Normal, kl_divergence
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.losses.autoencoding import (
    AutoencoderLossConfig,
    kl_loss,
    negative_log_likelihood,
    reconstruction_loss,
)
from ldm.models.autoencoder import DiagonalGaussian


def test_l1_is_the_mean_over_everything():
    images = torch.tensor([[[[0.0, 1.0]]], [[[-1.0, 0.5]]]])
    reconstructions = torch.tensor([[[[0.5, 1.0]]], [[[1.0, 0.25]]]])
    assert reconstruction_loss(images, reconstructions).item() == (0.5 + 0.0 + 2.0 + 0.25) / 4


def test_l1_of_half_precision_is_float32():
    loss = reconstruction_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == 1


def test_kl_equals_torch_distributions():
    moments = torch.randn(3, 8, 5, 4)
    posterior = DiagonalGaussian(moments)
    mean, logvar = moments.chunk(2, dim=1)
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    per_image = kl_divergence(Normal(mean, (0.5 * logvar).exp()), standard).sum(dim=(1, 2, 3))  # (B,), nats
    assert_close(posterior.kl(), per_image, rtol=1e-5, atol=1e-5)
    images = torch.zeros(3, 3, 20, 16)
    assert_close(kl_loss(posterior, images), per_image.mean() / (3 * 20 * 16), rtol=1e-5, atol=1e-7)


def test_kl_of_the_standard_normal_is_zero():
    assert kl_loss(DiagonalGaussian(torch.zeros(2, 8, 4, 4)), torch.zeros(2, 3, 16, 16)).item() == 0


@pytest.mark.parametrize("logvar", [-1.5, 0.7])
def test_negative_log_likelihood_is_the_originals(logvar):
    """The original's `rec / exp(logvar) + logvar` for each value, summed and divided by the number of values."""
    values = torch.rand(2, 3, 4, 5)
    expected = (values / math.exp(logvar) + logvar).sum() / values.numel()
    assert_close(negative_log_likelihood(values.mean(), torch.tensor(logvar)), expected)


def test_negative_log_likelihood_is_least_where_the_scale_is_the_error():
    logvar = torch.tensor(math.log(0.3), requires_grad=True)
    loss = negative_log_likelihood(torch.tensor(0.3), logvar)
    assert loss.item() == pytest.approx(1 + math.log(0.3))
    loss.backward()
    assert_close(logvar.grad, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_negative_log_likelihood_of_laplace():
    errors = torch.rand(50)
    scale = torch.tensor(0.4)
    ours = negative_log_likelihood(errors.mean(), scale.log()) + math.log(2)
    assert_close(ours, -Laplace(0.0, scale).log_prob(errors).mean())


def test_a_log_variance_of_zero_changes_no_bit():
    value = torch.rand(())
    assert torch.equal(negative_log_likelihood(value, torch.tensor(0.0)), value)


def test_defaults_are_l1_and_the_originals_kl_weight():
    config = AutoencoderLossConfig()
    assert (config.codebook_weight, config.beta, config.legacy) == (1, 0.25, True)
    assert (config.logvar, config.learned_logvar, config.revive_after) == (0, False, 0)
    assert (config.kl_weight, config.perceptual_weight, config.adversarial_weight) == (1e-6, 0, 0)
    assert (config.discriminator.layers, config.discriminator.features) == (3, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_weight": -1.0}, "loss.kl_weight must not be negative, got -1.0"),
        ({"adversarial_start": -5}, "loss.adversarial_start must not be negative, got -5"),
        ({"perceptual_weight": 1.0}, "needs loss.perceptual_weights=FILE"),
        ({"discriminator": {"layers": 0}}, "loss.discriminator.layers 0"),
        ({"revive_after": -1}, "loss.revive_after must not be negative, got -1"),
        ({"codebook_weight": -1.0}, "loss.codebook_weight must not be negative, got -1.0"),
        ({"beta": math.nan}, "loss.beta must not be negative, got nan"),
        ({"logvar": 100.0}, r"loss.logvar must be in -20.0..20.0, got 100.0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(AutoencoderLossConfig, values)


@pytest.mark.parametrize(
    ("codebook_size", "values", "message"),
    [
        (None, {"revive_after": 5}, "loss.revive_after 5 needs codes: set autoencoder.codebook_size"),
        (64, {"codebook_weight": 0.0}, "loss.codebook_weight must be positive: nothing else moves the codes"),
        (64, {"beta": 0.0}, "loss.beta must be positive .*: the codes would never move"),
        (64, {"beta": 0.0, "legacy": False}, "loss.beta must be positive .*: nothing would hold the latents"),
    ],
)
def test_terms_the_form_does_not_have(codebook_size, values, message):
    config = from_dict(AutoencoderLossConfig, values)
    with pytest.raises(ValueError, match=message):
        config.require_form(codebook_size)


def test_terms_each_form_has():
    AutoencoderLossConfig(codebook_weight=0.0, beta=0.0).require_form(None)
    AutoencoderLossConfig(revive_after=5).require_form(64)
