"""Kinds whose UNet reads a picture besides: sizes of the original's models, names in both directions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import empty_single_file, save, single_file
from formula import filled, named_input, named_weight
from torch.testing import assert_close

from ldm.config import configs_folder
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated, instruct_channels, instructions
from ldm.diffusion.grids import make_grid
from ldm.diffusion.guidance import instructed
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import ddim, find_sampler
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import compvis, diffusers, diffusers_config
from ldm.weights.kinds import find_kind
from ldm.weights.names import shapes
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import PIPELINES, convert

# Parameters of the UNets: FACTS.md 7; Stable Diffusion's with 4 x 320 x 9 weights more
COUNTS = {"ldm_inpainting": 387_245_827, "ldm_sr": 113_622_563, "sd15_pix2pix": 859_520_964 + 4 * 320 * 9}
COUNTS["sd_x4_upscaler"] = 473_398_020
CHANNELS = {"ldm_inpainting": (7, 3), "ldm_sr": (6, 3), "sd15_pix2pix": (8, 4), "sd_x4_upscaler": (7, 4)}
FIRST_STAGES = {"ldm_inpainting": "vq_f4_noattn", "ldm_sr": "vq_f4", "sd15_pix2pix": "kl_f8"}


def unet_of(kind: str) -> UNetConfig:
    config = find_kind(kind).config.unet
    assert config is not None
    return config


def small(kind: str) -> UNetConfig:
    """The same structure with 32 channels in place of 160 to 320."""
    config = unet_of(kind)
    context = None if config.context_dim is None else 16
    return replace(config, model_channels=32, norm_groups=8, context_dim=context)


@pytest.mark.parametrize("kind", COUNTS)
def test_parameters_channels_and_first_stage(kind: str) -> None:
    config = unet_of(kind)
    assert sum(shape.numel() for shape in shapes(config).values()) == COUNTS[kind]
    assert (config.in_channels, config.out_channels) == CHANNELS[kind]
    if kind in FIRST_STAGES:
        assert find_kind(kind).config.autoencoder == find_kind(FIRST_STAGES[kind]).config.autoencoder


@pytest.mark.parametrize("kind", COUNTS)
def test_round_trip_of_names(kind: str) -> None:
    """At full size without memory, then bit for bit on the small form, which runs."""
    config = unet_of(kind)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes(config).items()}
    back = compvis.to_ours(compvis.to_compvis(empty, config), config)
    assert {name: tensor.shape for name, tensor in back.items()} == dict(shapes(config))
    config = small(kind)
    ours = filled(config, compvis.UNET_PREFIX)
    for table in (compvis.to_compvis, diffusers.to_diffusers):
        to_ours = compvis.to_ours if table is compvis.to_compvis else diffusers.to_ours
        assert_close(to_ours(table(ours, config), config), ours, rtol=0, atol=0)
    unet = UNet(config)
    unet.load_state_dict(ours)
    context = None if config.context_dim is None else named_input("context", 1, 5, config.context_dim)
    y = None if config.num_classes is None else torch.tensor([20])
    with torch.no_grad():
        made = unet(named_input("x", 1, config.in_channels, 8, 8), torch.tensor([7.0]), context, y)
    assert made.shape == (1, config.out_channels, 8, 8)


def test_names_of_the_original() -> None:
    """Resampling inside residual blocks for inpainting; attention at the coarsest level alone for bsr_sr."""
    names = set(empty_single_file(find_kind("ldm_inpainting").config, ("unet",)))
    assert compvis.UNET_PREFIX + "input_blocks.3.0.in_layers.2.weight" in names
    assert compvis.UNET_PREFIX + "output_blocks.5.2.in_layers.2.weight" in names
    names = set(empty_single_file(find_kind("ldm_sr").config, ("unet",)))
    attended = {name.split(".")[3] for name in names if "input_blocks" in name and ".1.qkv.weight" in name}
    assert attended == {"10", "11"}
    assert compvis.UNET_PREFIX + "input_blocks.3.0.op.weight" in names


@pytest.mark.parametrize("kind", ["ldm_sr", "sd15_pix2pix", "sd_x4_upscaler"])
def test_one_forward_beside_diffusers(kind: str) -> None:
    library = pytest.importorskip("diffusers")
    config = small(kind)
    data = diffusers_config.unet_json(config)
    theirs = getattr(library, data["_class_name"]).from_config(data).eval()
    ours, weights = UNet(config), filled(config, compvis.UNET_PREFIX)
    ours.load_state_dict(weights)
    theirs.load_state_dict(diffusers.to_diffusers(weights, config))
    x, t = named_input("x", 2, config.in_channels, 16, 16), torch.tensor([1, 981])
    context = None if config.context_dim is None else named_input("context", 2, 5, config.context_dim)
    more = {} if context is None else {"encoder_hidden_states": context}
    y = None if config.num_classes is None else torch.tensor([20, 350])
    with torch.no_grad():
        made, expected = ours(x, t, context, y), theirs(x, t, **more, class_labels=y).sample
    assert float(expected.std()) > 0.01
    assert_close(made, expected, rtol=0, atol=1e-5)
    found = diffusers_config.unet_config(data, "it")  # which lists the resolutions in another order
    assert replace(found, attention_resolutions=config.attention_resolutions) == config


def test_a_file_that_holds_its_first_stage_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inpainting model's condition is encoded by its first stage, which its file names a second time."""
    kind = find_kind("tiny_sd15")
    no_text = single_file("tiny_sd15", parts=("unet", "autoencoder"))
    again = {
        name.replace(compvis.AUTOENCODER_PREFIX, compvis.CONDITIONER_PREFIX): tensor.clone()
        for name, tensor in no_text.items()
        if name.startswith(compvis.AUTOENCODER_PREFIX)
    }
    checkpoint = open_checkpoint(save(tmp_path / "file.safetensors", no_text | again))
    assert checkpoint.kind == "tiny_sd15"
    assert set(checkpoint.parts) == {"unet", "autoencoder"}
    assert checkpoint.config.autoencoder == kind.config.autoencoder


@torch.no_grad()
def test_instructions_as_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the original's names, written as diffusers' folder; the picture edited here and there."""
    library = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_instruct_pix2pix as module

    kind = find_kind("tiny_sd15").config
    assert kind.unet is not None and kind.text is not None and kind.autoencoder is not None
    config = replace(kind, unet=replace(kind.unet, in_channels=8))
    tensors = {name: named_weight(name, tuple(t.shape)) for name, t in empty_single_file(config).items()}
    file = save(tmp_path / "tiny.safetensors", tensors)
    (tmp_path / "kind.yaml").write_text(
        (configs_folder() / "model/tiny_sd15.yaml").read_text().replace("unet: {", "unet: {in_channels: 8, ")
    )
    checkpoint = open_checkpoint(file, kind=str(tmp_path / "kind.yaml"))
    folder = convert(checkpoint, tmp_path / "folder", "diffusers")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == PIPELINES[4]
    pipe = library.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    monkeypatch.setattr(module, "randn_tensor", lambda *shape, **how: noise)
    expected = pipe(
        "make it red", (image + 1) / 2, num_inference_steps=3, guidance_scale=7.5, image_guidance_scale=1.5,
        negative_prompt="blurry", output_type="pt",
    ).images  # fmt: skip

    unet, first_stage, text = (checkpoint.require(part).load() for part in ("unet", "autoencoder", "text"))
    context, negative = (
        {"context": text(Tokenizer(77, "end")([prompt]))} for prompt in ("make it red", "blurry")
    )
    scales = first_stage.config.scale_factor, first_stage.config.shift_factor
    channels = instruct_channels(first_stage.encode_latents(image), *scales)
    schedule = Schedule(DiffusionConfig())
    denoise = instructed(
        Denoiser(concatenated(unet), schedule), *instructions(context, negative, channels), 7.5, 1.5
    )
    sigmas = make_grid(schedule, find_sampler("ddim").spacing, 3)
    *_, last = ddim(denoise, to_sigma_scale(noise, float(sigmas[0])), sigmas)
    made = first_stage.decode_latents(last.sample).clamp(-1, 1)
    print(f"\ninstructed picture beside diffusers: {float(((made + 1) / 2 - expected).abs().max()):.1e}")
    assert_close((made + 1) / 2, expected, rtol=0, atol=1e-4)
