"""The checkpoints' networks at full size against diffusers, transformers and open_clip, on the formula's weights.

    python -m pytest -n 0 tests/weights/test_full_size.py -m slow -s

prints the README's table. No weights of others are needed: `formula.py` fills a model of any size from the names
of its tensors. Two proofs: each part alone in a single forward, and the whole way from a file in the original's
names, through conversion, to guided DDIM steps beside diffusers' StableDiffusionPipeline. The tiny forms of all
of it run in the default suite (test_export.py, models/test_oracles.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import prefix_of, save, single_file
from formula import filled, named_input
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights import compvis, diffusers, diffusers_config
from ldm.weights.diffusers_controlnet import controlnet_json
from ldm.weights.kinds import find_kind
from ldm.weights.names import Config, build_empty
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import convert
from sample.pipeline import Pipeline

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # largest absolute difference, outputs of order 1

PARTS = [
    ("sd15", "unet"),
    ("sd15", "autoencoder"),
    ("sd15", "text"),
    ("sd15_inpainting", "unet"),
    ("sd21", "unet"),
    ("sd21", "text"),
    ("controlnet_sd15", "control"),
    ("ldm_faces", "unet"),
    ("ldm_imagenet_v2", "unet"),
    ("ldm_text", "bert"),
    ("vq_f4", "autoencoder"),
]


def told(kind: str, what: str, by: str, error: float) -> None:
    print(f"\n| {kind} | {what} | {by} | {error:.1e} |")


def oracle(config: Config) -> nn.Module:
    """The same network by others; without memory for its weights where that library allows it."""
    import diffusers as library
    import transformers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    match config:
        case UNetConfig():
            data = diffusers_config.unet_json(config)
        case AutoencoderConfig():
            data = diffusers_config.autoencoder_json(config)
        case ControlNetConfig():
            data = controlnet_json(config)
        case TextConfig():
            values = diffusers_config.text_json(config)
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**values))
        case BertTextConfig():
            return LDMBertModel(
                LDMBertConfig(
                    vocab_size=config.vocab_size,
                    max_position_embeddings=config.context_length,
                    encoder_layers=config.layers,
                    encoder_ffn_dim=config.mlp_width,
                    encoder_attention_heads=config.heads,
                    head_dim=config.head_channels,
                    d_model=config.width,
                )
            )
        case _:
            raise AssertionError(config)
    with torch.device("meta"):
        return getattr(library, data.pop("_class_name")).from_config(data)


def pair(kind: str, part: str) -> tuple[nn.Module, nn.Module, Config]:
    """Ours and theirs with the same memory for their weights."""
    config = find_kind(kind).config.parts[part]
    weights = filled(config, prefix_of(part, config), openclip=getattr(config, "activation", "") == "gelu")
    ours = build_empty(config)
    ours.load_state_dict(weights, strict=True, assign=True)
    theirs_config = config
    if isinstance(config, TextConfig) and config.skip_layers:  # there the last layer is the one that is read
        from dataclasses import replace

        last = f"blocks.{config.layers - 1}."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(last)}
        theirs_config = replace(config, layers=config.layers - 1, skip_layers=0)
    theirs = oracle(config)
    own = theirs.state_dict()
    translated = diffusers.to_diffusers(weights, theirs_config)
    missing = {name for name in own if name not in translated}
    assert missing <= {"to_logits.weight", "to_logits.bias"}  # LDM's head over the vocabulary, not read
    theirs.load_state_dict(translated, strict=not missing, assign=True)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False), config


def outputs(ours: Any, theirs: Any, config: Config) -> tuple[list[Tensor], list[Tensor]]:
    t = torch.tensor([1, 981])
    match config:
        case UNetConfig() | ControlNetConfig():
            unet = config.unet if isinstance(config, ControlNetConfig) else config
            x = named_input("x", 2, unet.in_channels, 32, 32)
            context = None if unet.context_dim is None else named_input("context", 2, 77, unet.context_dim)
            if isinstance(config, ControlNetConfig):
                hint = named_input("hint", 2, 3, 256, 256).sigmoid()
                found = theirs(x, t, context, controlnet_cond=hint, return_dict=False)
                return ours(x, t, context, ours.encode_hint(hint)), [*found[0], found[1]]
            more = {} if context is None else {"encoder_hidden_states": context}
            return [ours(x, t, context)], [theirs(x, t, **more).sample]
        case AutoencoderConfig():
            image = named_input("image", 1, 3, 256, 256).clamp(-1, 1)
            z = named_input("z", 1, config.latent_channels, 256 // config.factor, 256 // config.factor)
            encoded = theirs.encode(image)
            moments = encoded.latents if config.codebook_size else encoded.latent_dist.mean
            return [ours.encode(image).mean, ours.decode(z)], [moments, theirs.decode(z).sample]
        case TextConfig():
            ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
            ids[:, 0], ids[0, 9:], ids[1, 40:] = 49406, 49407, 49407
            return [ours(ids)], [theirs(ids).last_hidden_state]
        case _:
            ids = torch.randint(0, 30522, (2, 77), generator=torch.Generator().manual_seed(0))
            return [ours(ids)], [theirs(ids).last_hidden_state]


@pytest.mark.parametrize(("kind", "part"), PARTS)
@torch.no_grad()
def test_a_part_in_a_single_forward(kind: str, part: str) -> None:
    ours, theirs, config = pair(kind, part)
    mine, others = outputs(ours, theirs, config)
    error = max(float((a - b).abs().max()) for a, b in zip(mine, others, strict=True))
    told(kind, part, type(theirs).__name__, error)
    assert all(float(b.std()) > 0.01 for b in others), "an output without content proves nothing"
    assert error <= TOLERANCE


@torch.no_grad()
def test_sd21_text_tower_beside_openclip() -> None:
    """Straight from OpenCLIP's fused names: the penultimate layer, then the final norm."""
    from open_clip.transformer import TextTransformer

    config = find_kind("sd21").config.text
    assert config is not None
    prefix = compvis.OPENCLIP_PREFIX
    fused = {
        name.removeprefix(prefix): tensor
        for name, tensor in single_file("sd21", parts=("text",)).items()
        if name.startswith(prefix)
    }
    ours = build_empty(config)
    ours.load_state_dict(compvis.to_ours(fused, config), strict=True, assign=True)
    theirs = TextTransformer(
        context_length=77,
        vocab_size=49408,
        width=1024,
        heads=16,
        layers=24,
        output_dim=1024,
        output_tokens=True,
    ).eval()
    missing = theirs.load_state_dict(fused, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["text_projection"], [])
    theirs.transformer.resblocks = theirs.transformer.resblocks[:-1]
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 9], ids[0, 10:], ids[1, 40], ids[1, 41:] = 49406, 49407, 0, 49407, 0
    error = float((ours(ids) - theirs(ids)[1]).abs().max())
    told("sd21", "text", "open_clip", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize(("kind", "prediction"), [("sd15", "eps"), ("sd21", "v")])
def test_from_a_file_to_a_picture(kind: str, prediction: str, tmp_path: Path) -> None:
    """4 GB in the original's names: read, sampled, converted, and the same picture drawn by diffusers."""
    import diffusers as library

    file = save(tmp_path / f"{kind}.safetensors", single_file(kind))
    ours = Pipeline.load(file, device="cpu", prediction=prediction)
    prompt, options = "a photograph of an astronaut riding a horse", {"steps": 3, "guidance": 5.0}
    mine = ours.txt2img(prompt, seed=5, size=(256, 256), **options)
    folder = convert(open_checkpoint(file, prediction=prediction), tmp_path / "folder", "diffusers")
    pipe = library.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=ours.noise(ours.latent_shape((256, 256)), (5, "image", 0)),
        height=256,
        width=256,
        output_type="pt",
    ).images
    error = float((mine - (2 * picture - 1)).abs().max())
    told(kind, "file -> picture, 3 guided steps", "StableDiffusionPipeline", error)
    assert float(mine.std()) > 0.01
    assert error <= TOLERANCE
