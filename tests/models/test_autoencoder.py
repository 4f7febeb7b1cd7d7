"""The autoencoder's behaviour: the posterior's formulas, latent scale and shift, batches, errors with the numbers."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian

SMALL = {"base_channels": 8, "channel_mult": (1, 2, 2), "norm_groups": 4, "num_res_blocks": 1}


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(**SMALL, scale_factor=0.5, shift_factor=0.25)
    return AutoencoderKL(config).eval().requires_grad_(False)


def test_posterior() -> None:
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    posterior = DiagonalGaussian(torch.stack([mean, logvar]).view(1, 2, 1, 2))
    expected = sum(
        (m * m + math.exp(v) - 1 - v) / 2 for m, v in zip(mean.tolist(), logvar.tolist(), strict=True)
    )
    assert_close(posterior.kl(), torch.tensor([expected]))
    assert_close(posterior.mode(), mean.view(1, 1, 1, 2))
    noise = torch.tensor([3.0, -1.0]).view(1, 1, 1, 2)
    assert_close(posterior.sample(noise).flatten(), mean + noise.flatten() * (logvar / 2).exp())


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 2, 1, 2)
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert bool(posterior.kl().isfinite().all())


def test_kl_matches_torch_distributions() -> None:
    moments = torch.randn(3, 8, 4, 4)
    posterior = DiagonalGaussian(moments)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    assert_close(posterior.kl(), divergence.sum(dim=(1, 2, 3)))


def test_scale_and_shift_are_applied_once_each_way(autoencoder: AutoencoderKL) -> None:
    images, noise = torch.rand(2, 3, 16, 12) * 2 - 1, torch.randn(2, 4, 4, 3)
    posterior = autoencoder.encode(images)
    assert_close(autoencoder.encode_latents(images), (posterior.mean - 0.25) * 0.5)
    assert_close(autoencoder.encode_latents(images, noise), (posterior.sample(noise) - 0.25) * 0.5)
    assert_close(autoencoder.scale_latents(posterior.mean), autoencoder.encode_latents(images))
    latents = autoencoder.encode_latents(images)
    assert_close(autoencoder.decode_latents(latents), autoencoder.decode(posterior.mean), rtol=0, atol=1e-5)


def test_shapes_and_factor(autoencoder: AutoencoderKL) -> None:
    assert autoencoder.factor == autoencoder.config.factor == 4
    images = torch.zeros(2, 3, 16, 24)
    assert autoencoder.encode(images).mean.shape == (2, 4, 4, 6)
    reconstruction, _ = autoencoder(images, torch.zeros(2, 4, 4, 6))
    assert reconstruction.shape == images.shape
    assert AutoencoderConfig().factor == 8


def test_an_image_does_not_depend_on_its_batch(autoencoder: AutoencoderKL) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    latents = autoencoder.encode_latents(images)
    decoded = autoencoder.decode_latents(latents)
    for i in range(3):
        alone = autoencoder.encode_latents(images[i : i + 1])
        assert_close(latents[i : i + 1], alone, rtol=0, atol=1e-5)
        assert_close(decoded[i : i + 1], autoencoder.decode_latents(latents[i : i + 1]), rtol=0, atol=1e-5)


def test_where_the_attention_is() -> None:
    plain = AutoencoderKL(AutoencoderConfig(**SMALL, mid_attention=False))
    with_attention = AutoencoderKL(AutoencoderConfig(**SMALL, attention_levels=(2,)))
    assert not any("attention" in name for name in plain.state_dict())
    assert {name.split(".to_q")[0] for name in with_attention.state_dict() if "to_q.weight" in name} == {
        "encoder.mid_block.attention",
        "decoder.mid_block.attention",
        "encoder.down_blocks.2.attentions.0",
        "decoder.up_blocks.0.attentions.0",
        "decoder.up_blocks.0.attentions.1",
    }


def test_errors(autoencoder: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="image size 18x16 is not a multiple of the autoencoder's factor 4"):
        autoencoder.encode(torch.zeros(1, 3, 16, 18))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_channels": 6}, r"\[6, 12, 12\] must be multiples of norm_groups 4"),
        ({"channel_mult": ()}, r"\[\] must be multiples"),
        ({"scale_factor": 0.0}, "scale_factor must be positive, got 0.0"),
        ({"num_res_blocks": 0}, "at least 1, got 0, 4 and 3"),
        ({"attention_levels": (3,)}, r"attention_levels \[3\] must be in 0..2"),
    ],
)
def test_errors_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{**SMALL, **values})
