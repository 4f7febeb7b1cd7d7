"""Names of the diffusers library (a folder with one file a part), in both directions.

Our own names follow the same plan of levels, so the tables are short. A UNet with text conditioning is
diffusers' `UNet2DConditionModel`, one with the ADM attention block its `UNet2DModel`, which keeps q, k and v
apart where we, as the original, have one fused projection; a ControlNet is its `ControlNetModel`. Text
encoders are transformers' (`compvis.transformers_names`). `to_ours` and `to_diffusers` are exact inverses.
"""

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.class_embedder import ClassEmbedderConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights import bert, compvis
from ldm.weights.names import (
    Config,
    Names,
    Tensors,
    fitted,
    fuse,
    inside,
    into_ours,
    into_theirs,
    split,
    tensor_names,
)

RES_BLOCK = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "time_proj": "time_emb_proj",
    "shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", **{f"to_{x}": f"to_{x}" for x in "qkv"}, "to_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of old versions
ADM_ATTENTION = {
    "norm": "group_norm",
    **{f"qkv.{kind}[{i}]": f"to_{x}.{kind}" for i, x in enumerate("qkv") for kind in ("weight", "bias")},
    "proj_out": "to_out.0",
}
FUSED_LAYOUTS = {
    "heads_first": "(heads three d)",
    "qkv_first": "(three heads d)",
}  # as ldm.models.attention.QKV_LAYOUTS, channels behind


def to_ours(tensors: Tensors, config: Config) -> dict[str, Tensor]:
    """The tensors of one diffusers model in our names and shapes; unknown names stay as they are.

    Self-attention may have the names of old versions. Raises ValueError for a class embedder, which diffusers
    does not have.
    """
    tensors = {_current(name): tensor for name, tensor in tensors.items()}
    if isinstance(config, UNetConfig | ControlNetConfig):
        unet, names = _unet_part(config)
        fused = fuse(into_ours(tensors, names), lambda parts: _join(torch.stack(parts), unet))
        return fitted(fused, config)
    if isinstance(config, AutoencoderConfig):
        return fitted(into_ours(tensors, autoencoder_names(config)), config)
    _require_known(config)
    return compvis.to_ours(tensors, config)


def to_diffusers(tensors: Tensors, config: Config) -> dict[str, Tensor]:
    """Our tensors in diffusers' names and shapes. Raises ValueError unless they are all of `config`."""
    if isinstance(config, UNetConfig | ControlNetConfig):
        unet, names = _unet_part(config)
        apart = split(tensors, ".qkv.", lambda fused: _apart(fused, unet))
        renamed = into_theirs(apart, names)  # every 1-d convolution is a linear layer there
        return {name: tensor.squeeze(-1) if tensor.ndim == 3 else tensor for name, tensor in renamed.items()}
    if isinstance(config, BertTextConfig):
        return bert.to_diffusers(tensors, config)
    if isinstance(config, AutoencoderConfig):
        return into_theirs(tensors, autoencoder_names(config))
    _require_known(config)
    return compvis.to_compvis(tensors, config)


def unet_names(config: UNetConfig) -> Names:
    """The name of each of the UNet's tensors, ours -> theirs."""
    return tensor_names(config, _unet_modules(config), fused=".qkv.")


def controlnet_names(config: ControlNetConfig) -> Names:
    """The name of each of the ControlNet's tensors, ours -> theirs (`ControlNetModel`)."""
    modules = _unet_modules(config.unet)
    last = 2 * len(config.hint_widths) - 1
    places = {0: "conv_in", **{i: f"blocks.{i - 1}" for i in range(1, last)}, last: "conv_out"}
    for i, place in places.items():
        modules[f"hint_encoder.convs.{i}"] = f"controlnet_cond_embedding.{place}"
    skips = len(config.unet.skip_channels)
    for i in range(skips):
        modules[f"zero_convs.{i}"] = f"controlnet_down_blocks.{i}"
    modules[f"zero_convs.{skips}"] = "controlnet_mid_block"
    return tensor_names(config, modules, fused=".qkv.")


def _unet_part(config: UNetConfig | ControlNetConfig) -> tuple[UNetConfig, Names]:
    """The configuration of the UNet's blocks, and the table of all tensors."""
    if isinstance(config, ControlNetConfig):
        return config.unet, controlnet_names(config)
    return config, unet_names(config)


def _unet_modules(config: UNetConfig) -> Names:
    """The name of each module of a UNet, and so of a ControlNet's copy of its way down, ours -> theirs."""
    modules = {
        **{f"time_embedding.linear_{i}": f"time_embedding.linear_{i}" for i in (1, 2)},
        **{f"class_embedding.linear_{i}": f"class_embedding.linear_{i}" for i in (1, 2)},
        "class_embedding": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    attention = ADM_ATTENTION
    if config.attention == "transformer":
        attention = {name: name for name in ("norm", "proj_in", "proj_out")}
        for k in range(config.transformer_depth):
            attention |= inside(f"blocks.{k}", f"transformer_blocks.{k}", compvis.TRANSFORMER_BLOCK)

    modules |= inside("mid_block.attention", "mid_block.attentions.0", attention)
    for j in (0, 1):
        modules |= inside(f"mid_block.resnets.{j}", f"mid_block.resnets.{j}", RES_BLOCK)
    for i in range(len(config.channel_mult)):
        for way in ("down", "up"):
            block = f"{way}_blocks.{i}"
            modules |= inside(
                f"{block}.{way}sample", f"{block}.{way}samplers.0", RES_BLOCK | {"conv": "conv"}
            )
            for j in range(config.num_res_blocks + 1):  # one more on the way up
                modules |= inside(f"{block}.resnets.{j}", f"{block}.resnets.{j}", RES_BLOCK)
                modules |= inside(f"{block}.attentions.{j}", f"{block}.attentions.{j}", attention)
    return modules


def autoencoder_names(config: AutoencoderConfig) -> Names:
    """The name of each of the autoencoder's tensors, ours -> theirs."""
    modules = {
        "quant_conv": "quant_conv",
        "quantizer.embedding": "quantize.embedding",
        "post_quant_conv": "post_quant_conv",
    }
    for side, way, depth in (
        ("encoder", "down", config.num_res_blocks),
        ("decoder", "up", config.num_res_blocks + 1),
    ):
        modules |= inside(
            side, side, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        )
        modules |= inside(f"{side}.mid_block.attention", f"{side}.mid_block.attentions.0", ATTENTION)
        for j in (0, 1):
            modules |= inside(f"{side}.mid_block.resnets.{j}", f"{side}.mid_block.resnets.{j}", RES_BLOCK)
        for i in range(len(config.channel_mult)):
            block = f"{side}.{way}_blocks.{i}"
            modules[f"{block}.resample.conv"] = f"{block}.{way}samplers.0.conv"
            for j in range(depth):
                modules |= inside(f"{block}.resnets.{j}", f"{block}.resnets.{j}", RES_BLOCK)
                modules |= inside(f"{block}.attentions.{j}", f"{block}.attentions.{j}", ATTENTION)
    return tensor_names(config, modules)


def _current(name: str) -> str:
    """Today's name of a tensor, which may come from a file of an old version."""
    module, _, kind = name.rpartition(".")
    block, _, layer = module.rpartition(".")
    return f"{block}.{OLD_ATTENTION[layer]}.{kind}" if layer in OLD_ATTENTION else name


def _require_known(config: Config) -> None:
    if isinstance(config, ClassEmbedderConfig):
        raise ValueError("diffusers has no class embedder for latent diffusion; use the original's form")


def _apart(fused: Tensor, config: UNetConfig) -> Tensor:
    """Weight or bias (3C, ...) of a fused projection to those of q, k and v (3, C, ...)."""
    layout = f"{FUSED_LAYOUTS[config.qkv_order]} ... -> three (heads d) ..."
    return rearrange(fused, layout, three=3, heads=config.heads(len(fused) // 3))


def _join(parts: Tensor, config: UNetConfig) -> Tensor:
    """The inverse of `_apart`."""
    layout = f"three (heads d) ... -> {FUSED_LAYOUTS[config.qkv_order]} ..."
    return rearrange(parts, layout, heads=config.heads(parts.shape[1]))
