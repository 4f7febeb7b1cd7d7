"""Names of the diffusers library (a folder with one file a part), in both directions.

Our own names follow the same plan of levels, so the tables are short. A UNet with text conditioning is
diffusers' `UNet2DConditionModel`, one with the ADM attention block its `UNet2DModel`, which keeps q, k and v
apart where we, as the original, have one fused projection. Text encoders are transformers'
(`compvis.transformers_names`). `to_ours` and `to_diffusers` are exact inverses.
"""

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig
from ldm.weights import compvis
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
    """The tensors of one diffusers model in our names and shapes; unknown names stay as they are."""
    if isinstance(config, UNetConfig):
        renamed = into_ours(tensors, unet_names(config))
        return fitted(fuse(renamed, lambda parts: _join(torch.stack(parts), config)), config)
    if isinstance(config, AutoencoderConfig):
        return fitted(into_ours(tensors, autoencoder_names(config)), config)
    return compvis.to_ours(tensors, config)


def to_diffusers(tensors: Tensors, config: Config) -> dict[str, Tensor]:
    """Our tensors in diffusers' names and shapes. Raises ValueError unless they are all of `config`."""
    if isinstance(config, UNetConfig):
        apart = split(tensors, ".qkv.", lambda fused: _apart(fused, config))
        renamed = into_theirs(apart, unet_names(config))  # every 1-d convolution is a linear layer there
        return {name: tensor.squeeze(-1) if tensor.ndim == 3 else tensor for name, tensor in renamed.items()}
    if isinstance(config, AutoencoderConfig):
        return into_theirs(tensors, autoencoder_names(config))
    return compvis.to_compvis(tensors, config)


def unet_names(config: UNetConfig) -> Names:
    """The name of each of the UNet's tensors, ours -> theirs."""
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
    return tensor_names(config, modules, fused=".qkv.")


def autoencoder_names(config: AutoencoderConfig) -> Names:
    """The name of each of the autoencoder's tensors, ours -> theirs."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
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


def _apart(fused: Tensor, config: UNetConfig) -> Tensor:
    """Weight or bias (3C, ...) of a fused projection to those of q, k and v (3, C, ...)."""
    layout = f"{FUSED_LAYOUTS[config.qkv_order]} ... -> three (heads d) ..."
    return rearrange(fused, layout, three=3, heads=config.heads(len(fused) // 3))


def _join(parts: Tensor, config: UNetConfig) -> Tensor:
    """The inverse of `_apart`."""
    layout = f"three (heads d) ... -> {FUSED_LAYOUTS[config.qkv_order]} ..."
    return rearrange(parts, layout, heads=config.heads(parts.shape[1]))
