"""Our models, filled with the formula's weights, give the original code's outputs."""

import pytest
import torch
from formula import filled, named_input, reference
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import add_noise, to_sigma_scale
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import DiffusionConfig, Schedule, sigma_grid
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.compvis import AUTOENCODER_PREFIX, TRANSFORMERS_PREFIX, UNET_PREFIX
from ldm.weights.io import load_strict

SINGLE = {"rtol": 0.0, "atol": 1e-4}  # one forward pass
TEN_STEPS = 1e-3  # relative norm after ten guided steps


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return reference("sd15-tiny.safetensors")


@pytest.fixture(scope="module")
def unet() -> UNet:
    config = UNetConfig(model_channels=32, context_dim=64)
    model = UNet(config).eval().requires_grad_(False)
    load_strict(model, filled(config, UNET_PREFIX), "the formula")
    return model


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    config = AutoencoderConfig(base_channels=32)
    model = AutoencoderKL(config).eval().requires_grad_(False)
    load_strict(model, filled(config, AUTOENCODER_PREFIX), "the formula")
    return model


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    config = TextConfig(width=64, layers=4, heads=4, mlp_width=256)
    model = TextEncoder(config).eval().requires_grad_(False)
    load_strict(model, filled(config, TRANSFORMERS_PREFIX), "the formula")
    return model


def test_unet(unet: UNet, golden: dict[str, torch.Tensor]) -> None:
    context = named_input("context", 2, 77, 64)
    assert_close(
        unet(named_input("x", 2, 4, 16, 16), torch.tensor([1, 981]), context), golden["unet.eps"], **SINGLE
    )


def test_encoder(autoencoder: AutoencoderKL, golden: dict[str, torch.Tensor]) -> None:
    image = named_input("image", 1, 3, 64, 64).clamp(-1, 1)
    moments = autoencoder.quant_conv(autoencoder.encoder(image))
    assert_close(moments, golden["vae.moments"], **SINGLE)
    posterior = autoencoder.encode(image)
    assert_close(torch.cat([posterior.mean, posterior.logvar], dim=1), moments)


def test_decoder(autoencoder: AutoencoderKL, golden: dict[str, torch.Tensor]) -> None:
    z = named_input("z", 1, 4, 8, 8)
    assert_close(autoencoder.decode(z), golden["vae.decoded"], **SINGLE)
    assert_close(autoencoder.decode_latents(z * 0.18215), golden["vae.decoded"], **SINGLE)


def test_text_encoder(text_encoder: TextEncoder) -> None:
    golden = reference("clip-text-tiny.safetensors")
    ids = golden["text.tiny.ids"]
    assert_close(text_encoder(ids), golden["text.tiny.last_hidden_state"], **SINGLE)
    assert_close(text_encoder.hidden(ids, skip_layers=1), golden["text.tiny.penultimate"], **SINGLE)


def test_penultimate_layer_gets_the_final_norm(text_encoder: TextEncoder) -> None:
    golden = reference("clip-text-tiny.safetensors")
    config = TextConfig(width=64, layers=4, heads=4, mlp_width=256, skip_layers=1)
    skipping = TextEncoder(config).requires_grad_(False)
    skipping.load_state_dict(text_encoder.state_dict())
    expected = text_encoder.final_norm(golden["text.tiny.penultimate"])
    assert_close(skipping(golden["text.tiny.ids"]), expected, **SINGLE)


def guided(unet: UNet, schedule: Schedule):
    conditioning = ({"context": named_input(name, 1, 77, 64)} for name in ("cond", "uncond"))
    return classifier_free(Denoiser(unet, schedule), *conditioning, scale=7.5)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def test_ten_guided_ddim_steps(unet: UNet, golden: dict[str, torch.Tensor]) -> None:
    schedule = Schedule(DiffusionConfig())
    sigmas = sigma_grid(schedule, "compvis", 10)
    start = to_sigma_scale(named_input("xT", 1, 4, 16, 16), float(sigmas[0]))
    *_, last = ddim(guided(unet, schedule), start, sigmas)
    assert relative(last.sample, golden["sample.ddim10"]) < TEN_STEPS


def test_image_to_image(unet: UNet, golden: dict[str, torch.Tensor]) -> None:
    """The original noises to the level of index 6 (timestep 601) but starts denoising at index 5 (501)."""
    schedule = Schedule(DiffusionConfig())
    z0, noise = named_input("z0", 1, 4, 16, 16), named_input("noise", 1, 4, 16, 16)
    encoded = add_noise(z0, noise, schedule.alpha_bar[601])
    assert_close(encoded, golden["img2img.encoded"], **SINGLE)
    sigmas = sigma_grid(schedule, "compvis", 10)[4:]  # from timestep 501
    *_, last = ddim(guided(unet, schedule), to_sigma_scale(encoded, float(sigmas[0])), sigmas)
    assert relative(last.sample, golden["img2img.decoded"]) < TEN_STEPS
