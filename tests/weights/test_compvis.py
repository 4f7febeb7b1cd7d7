"""The tables of foreign names: equal to real checkpoints' manifests, and exact in both directions."""

import pytest
import torch
from formula import manifest, original_shapes
from torch import Tensor
from torch.testing import assert_close

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights import compvis, diffusers
from ldm.weights.io import load_strict
from ldm.weights.names import BUILD, Config, shapes

SMALL = {"model_channels": 8, "norm_groups": 4, "num_heads": 2, "context_dim": 6}
ADM = {"attention": "adm", "context_dim": None}
UNETS = {
    "default": {},
    "linear projection": {"linear_projection": True, "head_channels": 4},
    "two levels": {"channel_mult": (1, 2), "attention_resolutions": (2,), "num_res_blocks": 1},
    "three levels, no attention at the finest": {
        "channel_mult": (1, 2, 3),
        "attention_resolutions": (4, 2),
        "num_res_blocks": 3,
    },
    "one level": {"channel_mult": (2,), "attention_resolutions": ()},
    "two transformers deep": {"channel_mult": (1, 2), "transformer_depth": 2},
    "classes": {"channel_mult": (1, 2), "num_classes": 10},
    "vector": {"channel_mult": (1, 2), "vector_dim": 5},
    "adm": dict(channel_mult=(1, 2), **ADM),
    "adm, resampling inside residual blocks": dict(
        channel_mult=(1, 1, 2), resblock_updown=True, scale_shift_norm=True, qkv_order="qkv_first", **ADM
    ),
}
CONFIGS: dict[str, Config] = {name: UNetConfig(**{**SMALL, **values}) for name, values in UNETS.items()} | {
    "autoencoder": AutoencoderConfig(base_channels=4, norm_groups=2),
    "autoencoder with attention at two levels": AutoencoderConfig(
        base_channels=4, norm_groups=2, channel_mult=(1, 2, 2), attention_levels=(1, 2), num_res_blocks=1
    ),
    "autoencoder without attention": AutoencoderConfig(
        base_channels=4, norm_groups=2, channel_mult=(1, 2), mid_attention=False
    ),
    "autoencoder with latents of another width": AutoencoderConfig(
        base_channels=4, norm_groups=2, channel_mult=(1, 2), z_channels=5, embed_dim=3
    ),
    "vector-quantised autoencoder": AutoencoderConfig(
        base_channels=4, norm_groups=2, channel_mult=(1, 2), z_channels=5, embed_dim=3, codebook_size=7
    ),
    **{
        f"ControlNet, {name}": ControlNetConfig(UNetConfig(**{**SMALL, **values}), hint_widths=(2, 3, 4))
        for name, values in UNETS.items()
    },
    "ControlNet at the resolution of the hint": ControlNetConfig(UNetConfig(**SMALL), 1, (5,)),
    "text encoder": TextConfig(vocab_size=50, context_length=7, width=8, layers=3, heads=2, mlp_width=16),
}


@pytest.mark.parametrize(
    ("name", "config", "prefix"),
    [
        ("sd15-unet", UNetConfig(), compvis.UNET_PREFIX),
        ("sd15-autoencoder", AutoencoderConfig(), compvis.AUTOENCODER_PREFIX),
        ("sd15-text", TextConfig(), compvis.TRANSFORMERS_PREFIX),
        ("sd15-inpainting-unet", UNetConfig(in_channels=9), compvis.UNET_PREFIX),
        (
            "sd21-unet",
            UNetConfig(context_dim=1024, head_channels=64, linear_projection=True),
            compvis.UNET_PREFIX,
        ),
        ("controlnet-sd15", ControlNetConfig(), compvis.CONTROL_PREFIX),
    ],
)
def test_names_and_shapes_are_those_of_real_checkpoints(name: str, config: Config, prefix: str) -> None:
    assert original_shapes(config, prefix) == manifest(name)


def test_manifests_count() -> None:
    """The numbers known of real files guard the manifests themselves."""
    assert len(manifest("sd15-unet")) + len(manifest("sd15-autoencoder")) == 934
    assert len(manifest("sd15-text")) == 196
    assert sum(torch.Size(shape).numel() for shape in manifest("sd15-unet").values()) == 859_520_964
    assert sum(torch.Size(shape).numel() for shape in manifest("sd15-autoencoder").values()) == 83_653_863
    assert sum(torch.Size(shape).numel() for shape in manifest("sd21-unet").values()) == 865_910_724
    assert len(manifest("controlnet-sd15")) == 340
    assert sum(torch.Size(shape).numel() for shape in manifest("controlnet-sd15").values()) == 361_279_120


def random_tensors(config: Config) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes(config).items()}


TABLES = {
    "compvis": (compvis.to_compvis, compvis.to_ours),
    "openclip": (lambda tensors, config: compvis.to_compvis(tensors, config, openclip=True), compvis.to_ours),
    "diffusers": (diffusers.to_diffusers, diffusers.to_ours),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(name: str, table: str) -> None:
    config, (to_theirs, to_ours) = CONFIGS[name], TABLES[table]
    ours = random_tensors(config)
    theirs = to_theirs(ours, config)
    back = to_ours(theirs, config)
    assert_close(back, ours, rtol=0, atol=0)
    load_strict(BUILD[type(config)](config), back, "the round trip")
    assert_close(to_theirs(back, config), theirs, rtol=0, atol=0)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(
        tensor.numel() for tensor in ours.values()
    )


def test_irregular_places_of_the_upsamplers() -> None:
    """Behind the attention, where there is one: the last sub-module of the last block of a level."""
    names = compvis.unet_names(UNetConfig())
    found = {theirs for ours, theirs in names.items() if "upsample.conv.weight" in ours}
    assert found == {f"output_blocks.{place}.conv.weight" for place in ("2.1", "5.2", "8.2")}


@pytest.mark.parametrize(
    "values", [{}, {"linear_projection": True, "head_channels": 4}, {"num_res_blocks": 1}]
)
def test_controlnet_tables_agree_with_the_conversion_of_diffusers(values: dict) -> None:
    """Names and shapes alone do not tell one zero convolution from the next."""
    library = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = ControlNetConfig(UNetConfig(**{**SMALL, **values}))
    ours = random_tensors(config)
    file = {compvis.CONTROL_PREFIX + k: v for k, v in compvis.to_compvis(ours, config).items()}
    converted = library.convert_controlnet_checkpoint(file, {"layers_per_block": config.unet.num_res_blocks})
    assert_close(converted, diffusers.to_diffusers(ours, config), rtol=0, atol=0)


def test_text_names_with_prefix_and_position_ids() -> None:
    config = CONFIGS["text encoder"]
    ours = random_tensors(config)
    theirs = {f"text_model.{name}": tensor for name, tensor in compvis.to_compvis(ours, config).items()}
    theirs["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    assert_close(compvis.to_ours(theirs, config), ours, rtol=0, atol=0)


def test_openclip_names_fuse_the_projections() -> None:
    config = CONFIGS["text encoder"]
    ours = random_tensors(config)
    theirs = compvis.to_compvis(ours, config, openclip=True)
    fused = torch.cat([ours[f"blocks.1.to_{x}.weight"] for x in "qkv"])
    assert_close(theirs["transformer.resblocks.1.attn.in_proj_weight"], fused, rtol=0, atol=0)
    theirs |= {"text_projection": torch.eye(8), "logit_scale": torch.tensor(4.6)}
    assert_close(compvis.to_ours(theirs, config), ours, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adm", "autoencoder with attention at two levels"])
def test_old_names_of_diffusers_are_read(name: str) -> None:
    """Its self-attention had others before 2023."""
    config = CONFIGS[name]
    ours = random_tensors(config)
    old = {}
    for key, tensor in diffusers.to_diffusers(ours, config).items():
        for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{former}.")
        old[key] = tensor
    assert {"mid_block.attentions.0.proj_attn.weight", "mid_block.attentions.0.query.bias"} <= {
        key.removeprefix("encoder.") for key in old
    }
    assert_close(diffusers.to_ours(old, config), ours, rtol=0, atol=0)


def test_unknown_missing_and_misshapen_tensors_reach_the_strict_loader() -> None:
    config = CONFIGS["autoencoder"]
    theirs = compvis.to_compvis(random_tensors(config), config)
    theirs["loss.logvar"] = theirs.pop("encoder.conv_in.bias")
    theirs["decoder.conv_out.weight"] = theirs["decoder.conv_out.weight"][:2]
    with pytest.raises(
        ValueError, match="1 missing: encoder.conv_in.bias; 1 unexpected: loss.logvar; 1 wrong shape"
    ):
        load_strict(AutoencoderKL(config), compvis.to_ours(theirs, config), "the file")


def test_writing_wants_every_tensor() -> None:
    config = CONFIGS["default"]
    ours = random_tensors(config)
    del ours["conv_in.bias"]
    with pytest.raises(ValueError, match="1 tensors are missing or unknown: conv_in.bias"):
        compvis.to_compvis(ours, config)


def test_part_takes_what_is_below_the_prefix() -> None:
    tensors = {"first_stage_model.quant_conv.bias": torch.zeros(2), "model_ema.decay": torch.zeros(1)}
    assert list(compvis.part(tensors, compvis.AUTOENCODER_PREFIX)) == ["quant_conv.bias"]
