"""Names of the original latent diffusion code ("CompVis" names, a single-file checkpoint), in both
directions.

The UNet's blocks are numbered there in one flat list each for the way down and up, `input_blocks.7.1` being
the second sub-module of the eighth; the autoencoder numbers its decoder's levels from the finest; the text
encoder comes in the names of transformers' CLIPTextModel (Stable Diffusion 1) or of OpenCLIP (Stable
Diffusion 2), a class embedder as one table. A ControlNet has the UNet's names in its copy of the way down.
`to_ours` and `to_compvis` are exact inverses.
"""

import torch
from torch import Tensor

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.class_embedder import ClassEmbedderConfig
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights import bert
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

# Where the parts stand in a single-file checkpoint
UNET_PREFIX = "model.diffusion_model."
CONTROL_PREFIX = "control_model."
AUTOENCODER_PREFIX = "first_stage_model."
TRANSFORMERS_PREFIX = "cond_stage_model.transformer.text_model."  # Stable Diffusion 1
OPENCLIP_PREFIX = "cond_stage_model.model."  # Stable Diffusion 2
CONDITIONER_PREFIX = "cond_stage_model."  # the BERT text tower, or the table of a class-conditional model

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
TRANSFORMER_BLOCK = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.to_{x}": f"attn{i}.to_{x}" for i in (1, 2) for x in "qkv"},
    "attn1.to_out": "attn1.to_out.0",
    "attn2.to_out": "attn2.to_out.0",
    "ff.proj_in": "ff.net.0.proj",
    "ff.proj_out": "ff.net.2",
}
ADM_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "proj_out"}

AUTOENCODER_RES_BLOCK = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "shortcut": "nin_shortcut",
}
CODEBOOK = "quantize.embedding.weight"
AUTOENCODER_ATTENTION = {"norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}

TRANSFORMERS_BLOCK = {
    "norm1": "layer_norm1",
    "to_q": "self_attn.q_proj",
    "to_k": "self_attn.k_proj",
    "to_v": "self_attn.v_proj",
    "to_out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
OPENCLIP_BLOCK = {
    "norm1": "ln_1",
    **{
        f"to_{x}.{kind}": f"attn.in_proj_{kind}[{i}]"
        for i, x in enumerate("qkv")
        for kind in ("weight", "bias")
    },
    "to_out": "attn.out_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


def part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def to_ours(tensors: Tensors, config: Config) -> dict[str, Tensor]:
    """One part of a checkpoint (names below its prefix) in our names and shapes, ready for `load_strict`.

    A text encoder may have either form's names, also with `text_model.` before them; its `position_ids`, a
    constant that old files hold, and OpenCLIP's `text_projection` and `logit_scale`, which conditioning does
    not use, are dropped. Names that are unknown stay as they are, so that strict loading names them.
    """
    if isinstance(config, UNetConfig):
        return fitted(into_ours(tensors, unet_names(config)), config)
    if isinstance(config, ControlNetConfig):
        return fitted(into_ours(tensors, controlnet_names(config)), config)
    if isinstance(config, AutoencoderConfig):
        return fitted(into_ours(tensors, autoencoder_names(config)), config)
    if isinstance(config, ClassEmbedderConfig):
        return into_ours(tensors, class_embedder_names(config))
    if isinstance(config, BertTextConfig):
        return bert.to_ours(tensors, config)
    unused = ("embeddings.position_ids", "text_projection", "logit_scale")
    plain = {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith(unused)
    }
    if any(".resblocks." in name for name in plain):
        return into_ours(split(plain, ".attn.in_proj_", lambda fused: fused.chunk(3)), openclip_names(config))
    return into_ours(plain, transformers_names(config))


def to_compvis(tensors: Tensors, config: Config, openclip: bool = False) -> dict[str, Tensor]:
    """Our tensors in the original's names and shapes, without the prefix of the part.

    `openclip` writes a text encoder in OpenCLIP's names instead of transformers'. Raises ValueError unless
    `tensors` are exactly those of the model that `config` describes.
    """
    if isinstance(config, UNetConfig):
        return into_theirs(tensors, unet_names(config))
    if isinstance(config, ControlNetConfig):
        return into_theirs(tensors, controlnet_names(config))
    if isinstance(config, AutoencoderConfig):
        renamed = into_theirs(tensors, autoencoder_names(config))
        return {  # every linear layer is a 1x1 convolution there; the codebook is a table here and there
            name: tensor[..., None, None] if tensor.ndim == 2 and name != CODEBOOK else tensor
            for name, tensor in renamed.items()
        }
    if isinstance(config, ClassEmbedderConfig):
        return into_theirs(tensors, class_embedder_names(config))
    if isinstance(config, BertTextConfig):
        return bert.to_compvis(tensors, config)
    if openclip:
        return fuse(into_theirs(tensors, openclip_names(config)), torch.cat)
    return into_theirs(tensors, transformers_names(config))


def unet_names(config: UNetConfig) -> Names:
    """The name of each of the UNet's tensors, ours -> theirs."""
    return tensor_names(config, _unet_modules(config))


def controlnet_names(config: ControlNetConfig) -> Names:
    """The name of each of the ControlNet's tensors, ours -> theirs."""
    modules = _unet_modules(config.unet)
    for i in range(2 * len(config.hint_widths)):  # the even ones, with SiLU between
        modules[f"hint_encoder.convs.{i}"] = f"input_hint_block.{2 * i}"
    skips = len(config.unet.skip_channels)
    for i in range(skips):
        modules[f"zero_convs.{i}"] = f"zero_convs.{i}.0"
    modules[f"zero_convs.{skips}"] = "middle_block_out.0"
    return tensor_names(config, modules)


def _unet_modules(config: UNetConfig) -> Names:
    """The name of each module of a UNet, and so of a ControlNet's copy of its way down, ours -> theirs."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",  # the table of a class-conditional model
        "class_embedding.linear_1": "label_emb.0.0",  # the MLP of a vector-conditional one
        "class_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    attention = ADM_ATTENTION
    if config.attention == "transformer":
        attention = {name: name for name in ("norm", "proj_in", "proj_out")}
        for k in range(config.transformer_depth):
            attention |= inside(f"blocks.{k}", f"transformer_blocks.{k}", TRANSFORMER_BLOCK)

    levels = len(config.channel_mult)
    index = 0
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for j in range(config.num_res_blocks):
            index += 1
            modules |= inside(f"{ours}.resnets.{j}", f"input_blocks.{index}.0", RES_BLOCK)
            modules |= inside(f"{ours}.attentions.{j}", f"input_blocks.{index}.1", attention)
        if level < levels - 1:
            index += 1
            modules |= inside(f"{ours}.downsample", f"input_blocks.{index}.0", RES_BLOCK | {"conv": "op"})

    modules |= inside("mid_block.resnets.0", "middle_block.0", RES_BLOCK)
    modules |= inside("mid_block.attention", "middle_block.1", attention)
    modules |= inside("mid_block.resnets.1", "middle_block.2", RES_BLOCK)

    index = -1
    for i, level in enumerate(reversed(range(levels))):  # up_blocks.0 is the coarsest level
        ours = f"up_blocks.{i}"
        for j in range(config.num_res_blocks + 1):
            index += 1
            modules |= inside(f"{ours}.resnets.{j}", f"output_blocks.{index}.0", RES_BLOCK)
            modules |= inside(f"{ours}.attentions.{j}", f"output_blocks.{index}.1", attention)
        last = (
            2 if 2**level in config.attention_resolutions else 1
        )  # behind the attention, where there is one
        modules |= inside(f"{ours}.upsample", f"output_blocks.{index}.{last}", RES_BLOCK | {"conv": "conv"})
    return modules


def autoencoder_names(config: AutoencoderConfig) -> Names:
    """The name of each of the autoencoder's tensors, ours -> theirs."""
    modules = {
        "quant_conv": "quant_conv",
        "quantizer.embedding.weight": CODEBOOK,
        "post_quant_conv": "post_quant_conv",
    }
    levels = len(config.channel_mult)
    for side, way, depth in (
        ("encoder", "down", config.num_res_blocks),
        ("decoder", "up", config.num_res_blocks + 1),
    ):
        modules |= inside(side, side, {name: name for name in ("conv_in", "norm_out", "conv_out")})
        modules |= inside(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", AUTOENCODER_RES_BLOCK)
        modules |= inside(f"{side}.mid_block.attention", f"{side}.mid.attn_1", AUTOENCODER_ATTENTION)
        modules |= inside(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", AUTOENCODER_RES_BLOCK)
        for i in range(levels):
            level = (
                i if way == "down" else levels - 1 - i
            )  # theirs counts from the finest, ours in running order
            ours, theirs = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{level}"
            modules[f"{ours}.resample.conv"] = f"{theirs}.{way}sample.conv"
            for j in range(depth):
                modules |= inside(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", AUTOENCODER_RES_BLOCK)
                modules |= inside(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}", AUTOENCODER_ATTENTION)
    return tensor_names(config, modules)


def class_embedder_names(config: ClassEmbedderConfig) -> Names:
    """The name of the class embedder's one tensor, ours -> theirs."""
    return tensor_names(config, {"embedding": "embedding"})


def transformers_names(config: TextConfig) -> Names:
    """The name of each of the text encoder's tensors, ours -> transformers', without `text_model.`."""
    modules = {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding",
        "final_norm": "final_layer_norm",
    }
    for i in range(config.layers):
        modules |= inside(f"blocks.{i}", f"encoder.layers.{i}", TRANSFORMERS_BLOCK)
    return tensor_names(config, modules)


def openclip_names(config: TextConfig) -> Names:
    """The name of each of the text encoder's tensors, ours -> OpenCLIP's, where q, k and v are one tensor."""
    modules = {
        "token_embedding": "token_embedding",
        "position_embedding.weight": "positional_embedding",
        "final_norm": "ln_final",
    }
    for i in range(config.layers):
        modules |= inside(f"blocks.{i}", f"transformer.resblocks.{i}", OPENCLIP_BLOCK)
    return tensor_names(config, modules)
