"""The terms of the autoencoder's loss on given tensors, and its configuration."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.losses.autoencoding import AutoencoderLossConfig, kl_loss, reconstruction_loss
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


def test_defaults_are_l1_and_the_originals_kl_weight():
    config = AutoencoderLossConfig()
    assert (config.kl_weight, config.perceptual_weight, config.adversarial_weight) == (1e-6, 0, 0)
    assert (config.discriminator.layers, config.discriminator.features) == (3, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_weight": -1.0}, "loss.kl_weight must not be negative, got -1.0"),
        ({"adversarial_start": -5}, "loss.adversarial_start must not be negative, got -5"),
        ({"perceptual_weight": 1.0}, "needs loss.perceptual_weights=FILE"),
        ({"discriminator": {"layers": 0}}, "loss.discriminator.layers 0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(AutoencoderLossConfig, values)
