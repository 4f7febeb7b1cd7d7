"""What a UNet reads besides, of every kind of model; super-resolution beside diffusers, from noise to picture."""

from dataclasses import replace

import pytest
import torch
from formula import filled
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated, instruct_channels, superresolution_channels
from ldm.diffusion.grids import make_grid
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import add_noise, to_sigma_scale
from ldm.diffusion.samplers import ddim, find_sampler
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import diffusers, diffusers_config
from ldm.weights.compvis import AUTOENCODER_PREFIX, UNET_PREFIX
from ldm.weights.kinds import find_kind, kind_names
from sample.extra_channels import EXTRAS, extra_of

KINDS = {
    "sd15_inpainting": "inpainting",
    "sd2_inpainting": "inpainting",
    "ldm_inpainting": "ldm_inpainting",
    "sd2_depth": "depth",
    "ldm_sr": "superresolution",
    "sd15_pix2pix": "instruct",
    "sd_x4_upscaler": "upscaler",
}


@pytest.mark.parametrize("name", kind_names())
def test_every_kind(name: str) -> None:
    config = find_kind(name).config
    if config.unet is not None and config.autoencoder is not None:
        assert extra_of(config.unet, config.autoencoder) == KINDS.get(name)
    assert set(KINDS.values()) == set(EXTRAS)


def test_other_channels_are_refused() -> None:
    with pytest.raises(
        ValueError, match="reads 3 channels besides its 4 .*text: 5 for a mask and .*1 for a "
    ):
        extra_of(UNetConfig(in_channels=7), AutoencoderConfig())
    with pytest.raises(ValueError, match="reads 5 channels"):
        extra_of(UNetConfig(in_channels=9, num_classes=1000), AutoencoderConfig())
    plain = UNetConfig(in_channels=8, context_dim=None, attention="adm")
    with pytest.raises(ValueError, match="reads 4 channels .*read no text: 5 for the masked picture and a"):
        extra_of(plain, AutoencoderConfig())


@torch.no_grad()
def test_superresolution_as_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights, noise and small picture through all steps of DDIM and the first stage."""
    library = pytest.importorskip("diffusers")
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion_superresolution as module

    kind = find_kind("ldm_sr").config
    assert kind.unet is not None and kind.autoencoder is not None and kind.diffusion is not None
    unet_config = replace(kind.unet, model_channels=32, norm_groups=8)
    vq_config = replace(kind.autoencoder, base_channels=8, norm_groups=4, codebook_size=64)
    parts = []
    for config, prefix, build, to_json in (
        (unet_config, UNET_PREFIX, UNet, diffusers_config.unet_json),
        (vq_config, AUTOENCODER_PREFIX, make_autoencoder, diffusers_config.autoencoder_json),
    ):
        weights, data = filled(config, prefix), to_json(config)
        ours, theirs = build(config), getattr(library, data.pop("_class_name")).from_config(data)
        ours.load_state_dict(weights)
        theirs.load_state_dict(diffusers.to_diffusers(weights, config))
        parts.append((ours.eval(), theirs.eval()))
    (unet, their_unet), (first_stage, their_first_stage) = parts
    scheduler = library.DDIMScheduler.from_config(diffusers_config.scheduler_json(kind.diffusion))
    pipe = library.LDMSuperResolutionPipeline(their_first_stage, their_unet, scheduler)
    pipe.set_progress_bar_config(disable=True)

    low, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 3, 16, 24)
    monkeypatch.setattr(module, "randn_tensor", lambda *shape, **how: noise)
    expected = pipe(low, num_inference_steps=3, output_type="pt").images

    schedule = Schedule(kind.diffusion)
    sigmas = make_grid(schedule, find_sampler("ddim").spacing, 3)
    denoise = Denoiser(concatenated(unet), schedule)
    channels = superresolution_channels(low)
    start = to_sigma_scale(noise, float(sigmas[0]))
    *_, last = ddim(lambda x, sigma: denoise(x, sigma, channels=channels), start, sigmas)
    made = first_stage.decode_latents(last.sample).clamp(-1, 1)
    assert made.shape == (2, 3, 64, 96)
    assert_close((made + 1) / 2, expected, rtol=0, atol=1e-4)
    *_, other = ddim(lambda x, sigma: denoise(x, sigma, channels=-channels), start, sigmas)
    assert float((other.sample - last.sample).abs().max()) > 0.1  # the channels count


@torch.no_grad()
def test_upscaler_as_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights, noises, small picture and noise level through guided steps of DDIM."""
    library = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as module

    kind = find_kind("sd_x4_upscaler").config
    assert kind.unet is not None and kind.autoencoder is not None and kind.diffusion is not None
    unet_config = replace(kind.unet, model_channels=32, norm_groups=8, context_dim=16)
    vae_config = replace(kind.autoencoder, base_channels=8, norm_groups=4)
    weights, data = filled(unet_config, UNET_PREFIX), diffusers_config.unet_json(unet_config)
    unet, their_unet = UNet(unet_config), library.UNet2DConditionModel.from_config(data)
    unet.load_state_dict(weights)
    their_unet.load_state_dict(diffusers.to_diffusers(weights, unet_config))
    vae = library.AutoencoderKL.from_config(diffusers_config.autoencoder_json(vae_config))
    settings = diffusers_config.scheduler_json(kind.diffusion)
    schedulers = [each.from_config(settings) for each in (library.DDPMScheduler, library.DDIMScheduler)]
    pipe = library.StableDiffusionUpscalePipeline(vae.eval(), None, None, their_unet.eval(), *schedulers)
    pipe.set_progress_bar_config(disable=True)

    low, noise, low_noise = (
        torch.rand(2, 3, 16, 24) * 2 - 1,
        torch.randn(2, 4, 16, 24),
        torch.randn(2, 3, 16, 24),
    )
    uncond, cond = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    monkeypatch.setattr(module, "randn_tensor", lambda *shape, **how: low_noise)
    expected = pipe(
        image=(low + 1) / 2, prompt_embeds=cond, negative_prompt_embeds=uncond, latents=noise, noise_level=120,
        num_inference_steps=4, guidance_scale=5.0, output_type="latent",
    ).images  # fmt: skip

    schedule = Schedule(kind.diffusion)
    denoise = Denoiser(concatenated(unet), schedule)
    read = add_noise(superresolution_channels(low), low_noise, schedule.alpha_bar[120])
    sigmas = make_grid(schedule, find_sampler("ddim").spacing, 4)

    def sampled(level: int) -> torch.Tensor:
        told = {"channels": read, "y": torch.tensor([level, level])}
        guided = classifier_free(denoise, {"context": cond, **told}, {"context": uncond, **told}, 5.0)
        *_, last = ddim(guided, to_sigma_scale(noise, float(sigmas[0])), sigmas)
        return last.sample

    made = sampled(120)
    assert_close(made, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert float((sampled(0) - made).abs().max()) > 1e-3 * float(expected.abs().max())  # the level counts


@torch.no_grad()
def test_instruct_channels_as_diffusers() -> None:
    """The mode of the posterior, unscaled; with guidance twice, then zeros."""
    library = pytest.importorskip("diffusers")
    config = AutoencoderConfig(base_channels=8, norm_groups=4, num_res_blocks=1)
    ours, weights = make_autoencoder(config), filled(config, AUTOENCODER_PREFIX)
    ours.load_state_dict(weights)
    theirs = library.AutoencoderKL.from_config(diffusers_config.autoencoder_json(config))
    theirs.load_state_dict(diffusers.to_diffusers(weights, config))
    images = torch.rand(2, 3, 32, 48) * 2 - 1

    class Holder:
        vae = theirs

    expected = library.StableDiffusionInstructPix2PixPipeline.prepare_image_latents(
        Holder(), images, 2, 1, torch.float32, torch.device("cpu"), True
    )
    made = instruct_channels(ours.encode_latents(images), config.scale_factor, config.shift_factor)
    assert_close(torch.cat([made, made, torch.zeros_like(made)]), expected, rtol=0, atol=1e-5)
    assert DiffusionConfig() == find_kind("sd15_pix2pix").config.diffusion
