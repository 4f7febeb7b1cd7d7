"""What diffusers and transformers write into their `config.json` files, as our configurations and back.

Their files are data: a class name in them is compared with the few that have a counterpart here, never
imported. Fields that change what a network computes and that we do not have are refused, by name. Used by
`checkpoint.py` (reading a folder) and `export.py` (writing one).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip import TextConfig
from ldm.models.unet import UNetConfig

Json = Mapping[str, Any]

# Values that every network of ours has built in. A file that says otherwise describes another network.
UNET_BUILT_IN = {
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "addition_embed_type": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "class_embeddings_concat": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "cross_attention_norm": None,
    "attention_type": "default",
    "reverse_transformer_layers_per_block": None,
    "add_attention": True,
}
VAE_BUILT_IN = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "latents_mean": None}
TEXT_BUILT_IN = {"layer_norm_eps": 1e-5}

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
FLOW = "FlowMatchEulerDiscreteScheduler"
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")


def unet_config(data: Json, source: str) -> UNetConfig:
    """Of a `UNet2DConditionModel` or `UNet2DModel`. Raises ValueError for what has no counterpart here."""
    require(data, UNET_BUILT_IN, source)
    conditional = data.get("_class_name", "UNet2DConditionModel") != "UNet2DModel"
    widths = list(data.get("block_out_channels", (320, 640, 1280, 1280)))
    kinds = list(data.get("down_block_types") or [])
    attends = tuple(2**level for level, kind in enumerate(kinds) if "Attn" in kind)
    values: dict[str, Any] = {
        "in_channels": data.get("in_channels", 4),
        "out_channels": data.get("out_channels", 4),
        "attention_resolutions": attends,
        "num_res_blocks": _one(data.get("layers_per_block", 2), "layers_per_block", source),
        "norm_groups": data.get("norm_num_groups", 32),
        "dropout": data.get("dropout", 0.0),
        "scale_shift_norm": data.get("resnet_time_scale_shift", "default") == "scale_shift",
        "sample_size": _one(data.get("sample_size") or 64, "sample_size", source),
        **_widths(widths, source),
    }
    values["cross_only"] = _cross_only(data, attends, source)
    if data.get("num_class_embeds") is not None:
        values["num_classes"] = data["num_class_embeds"]
    kind = data.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        values["vector_dim"] = data["projection_class_embeddings_input_dim"]
    elif kind is not None:
        raise ValueError(f"{source}: class_embed_type {kind!r} has no counterpart here")
    if not conditional:
        head = data.get("attention_head_dim", 8)
        one_head = {"head_channels": None, "num_heads": 1}
        updown = data.get("downsample_type", "conv") == "resnet"
        heads = one_head if head is None else {"head_channels": head}
        return UNetConfig(**values, **heads, attention="adm", context_dim=None, resblock_updown=updown)
    heads_of = data.get("num_attention_heads") or data.get("attention_head_dim", 8)  # its odd name for heads
    return UNetConfig(
        **values,
        **_heads(heads_of, widths, source),
        context_dim=_one(data.get("cross_attention_dim", 1280), "cross_attention_dim", source),
        transformer_depth=_one(
            data.get("transformer_layers_per_block", 1), "transformer_layers_per_block", source
        ),
        linear_projection=data.get("use_linear_projection", False),
    )


def _cross_only(data: Json, attends: tuple[int, ...], source: str) -> tuple[int, ...]:
    """The factors at which there is no self-attention; a single value of theirs is of the middle, too."""
    told = data.get("only_cross_attention") or False
    if told is True or data.get("mid_block_only_cross_attention"):
        raise ValueError(f"{source}: a middle block without self-attention has no counterpart here")
    return tuple(factor for factor in attends if told and told[factor.bit_length() - 1])


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` of a UNet. Raises ValueError for what diffusers cannot express."""
    if config.pooled_context:
        raise ValueError("a UNet with pooled_context has no counterpart in diffusers' pipelines")
    levels = len(config.channel_mult)
    widths = [config.model_channels * mult for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(levels)]
    conditional = config.attention == "transformer" and config.context_dim is not None
    if config.attention == "transformer" and config.context_dim is None:
        raise ValueError("a UNet with spatial transformers but no context has no counterpart in diffusers")
    prefix = "CrossAttn" if conditional else "Attn"
    data: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [f"{prefix if here else ''}DownBlock2D" for here in attends],
        "up_block_types": [f"{prefix if here else ''}UpBlock2D" for here in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }
    if conditional:
        if config.resblock_updown:
            raise ValueError("resblock_updown with a context has no counterpart in diffusers")
        data |= {
            "cross_attention_dim": config.context_dim,
            "attention_head_dim": [
                config.heads(width) for width in widths
            ],  # its name for the number of heads
            "transformer_layers_per_block": config.transformer_depth,
            "use_linear_projection": config.linear_projection,
            "only_cross_attention": [2**level in config.cross_only for level in range(levels)],
        }
        if config.vector_dim is not None:
            data |= {
                "class_embed_type": "projection",
                "projection_class_embeddings_input_dim": config.vector_dim,
            }
        return data
    if config.vector_dim is not None:
        raise ValueError("a UNet with a vector but no context has no counterpart in diffusers")
    if config.head_channels is None and config.num_heads != 1:
        raise ValueError(
            f"attention with {config.num_heads} heads at every width has no counterpart in diffusers' "
            "UNet2DModel, which fixes the channels of a head"
        )
    resample = "resnet" if config.resblock_updown else "conv"
    head = config.head_channels
    return data | {"attention_head_dim": head, "downsample_type": resample, "upsample_type": resample}


def autoencoder_config(data: Json, source: str) -> AutoencoderConfig:
    """Of an `AutoencoderKL` or a `VQModel`."""
    require(data, VAE_BUILT_IN, source)
    kinds = list(data.get("down_block_types") or ["DownEncoderBlock2D"])
    vq = data.get("_class_name") == "VQModel"
    latent = data.get("latent_channels", 3 if vq else 4)
    return AutoencoderConfig(
        in_channels=data.get("in_channels", 3),
        z_channels=latent,
        embed_dim=(data.get("vq_embed_dim") or latent) if vq else None,
        codebook_size=data.get("num_vq_embeddings", 256) if vq else None,
        num_res_blocks=_one(data.get("layers_per_block", 1), "layers_per_block", source),
        attention_levels=tuple(i for i, kind in enumerate(kinds) if kind.startswith("Attn")),
        mid_attention=data.get("mid_block_add_attention", True),
        norm_groups=data.get("norm_num_groups", 32),
        scale_factor=data.get("scaling_factor", 1.0 if vq else 0.18215),  # diffusers' own default is KL's
        shift_factor=data.get("shift_factor") or 0.0,
        **_widths(list(data.get("block_out_channels", (64,))), source, base="base_channels"),
    )


def autoencoder_json(config: AutoencoderConfig) -> dict[str, Any]:
    kinds = ["Attn" if i in config.attention_levels else "" for i in range(len(config.channel_mult))]
    data: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mult],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": config.scale_factor,
        "act_fn": "silu",
    }
    if config.codebook_size is not None:
        if config.shift_factor:
            raise ValueError("a shift of quantised latents has no counterpart in diffusers")
        return data | {
            "_class_name": "VQModel",
            "num_vq_embeddings": config.codebook_size,
            "vq_embed_dim": config.embed_dim,
        }
    if config.embed_dim not in (None, config.z_channels):
        raise ValueError(
            f"embed_dim {config.embed_dim} other than z_channels {config.z_channels} has no counterpart in "
            "diffusers' AutoencoderKL"
        )
    return data | {"shift_factor": config.shift_factor or None}


def text_config(data: Json, source: str, padding: str | None = None) -> TextConfig:
    """Of a `CLIPTextModel`; `padding` as its tokenizer says, else as usual for the activation."""
    data = data.get("text_config") or data
    require(data, TEXT_BUILT_IN, source)
    activation = data.get("hidden_act", "quick_gelu")
    return TextConfig(
        vocab_size=data.get("vocab_size", 49408),
        context_length=data.get("max_position_embeddings", 77),
        width=data.get("hidden_size", 512),
        layers=data.get("num_hidden_layers", 12),
        heads=data.get("num_attention_heads", 8),
        mlp_width=data.get("intermediate_size", 2048),
        activation=activation,
        padding=padding or ("end" if activation == "quick_gelu" else "zero"),
    )


def text_json(config: TextConfig) -> dict[str, Any]:
    """Layers that are not read are not there: the penultimate layer of 24 is the last of 23."""
    if config.repeat_end:
        raise ValueError("a text encoder with repeat_end has no counterpart in transformers")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers - config.skip_layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": config.width,
        "bos_token_id": 0,  # as in the files of CLIP: with 2, transformers pools at the largest id
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def diffusion_config(data: Json, source: str) -> DiffusionConfig:
    """Of a scheduler's `scheduler_config.json`: only what concerns training, not its sampler."""
    if data.get("_class_name") == FLOW:
        if data.get("use_dynamic_shifting"):
            raise ValueError(f"{source}: a shift by size (use_dynamic_shifting) has no counterpart here")
        steps, shift = data.get("num_train_timesteps", 1000), data.get("shift", 1.0)
        return DiffusionConfig(schedule="flow", prediction="flow", num_timesteps=steps, shift=shift)
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    schedule, prediction = data.get("beta_schedule", "linear"), data.get("prediction_type", "epsilon")
    if data.get("trained_betas") is not None:
        raise ValueError(f"{source}: a table of betas (trained_betas) has no counterpart here")
    for value, known in ((schedule, schedules), (prediction, predictions)):
        if value not in known:
            raise ValueError(f"{source}: {value!r} has no counterpart here, known: {', '.join(known)}")
    return DiffusionConfig(
        schedule=schedules[schedule],
        beta_start=data.get("beta_start", 1e-4),
        beta_end=data.get("beta_end", 0.02),
        num_timesteps=data.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(data.get("rescale_betas_zero_snr", False)),
        prediction=predictions[prediction],
    )


def scheduler_json(config: DiffusionConfig) -> dict[str, Any]:
    """DDIM with the original's timesteps, or with "trailing" ones for a model trained down to pure noise;
    Euler for a flow. Raises ValueError for a prediction that DDIM does not know."""
    if config.schedule == "flow":
        return {"_class_name": FLOW, "num_train_timesteps": config.num_timesteps, "shift": config.shift}
    if config.prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction {config.prediction!r} has no counterpart in diffusers' DDIMScheduler, "
            f"which knows {', '.join(PREDICTIONS)}"
        )
    pure = config.zero_terminal_snr
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": SCHEDULES[config.schedule],
        "trained_betas": None,
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": pure,
        "timestep_spacing": "trailing" if pure else "leading",
        "steps_offset": 0 if pure else 1,
        "set_alpha_to_one": pure,
        "clip_sample": False,
    }


def require(data: Json, built_in: Json, source: str) -> None:
    """Raises ValueError where a file says otherwise than `built_in`."""
    for name, value in built_in.items():
        if data.get(name, value) != value:
            raise ValueError(f"{source}: {name} is {data[name]!r}, only {value!r} has a counterpart here")


def _one(value: Any, name: str, source: str) -> Any:
    """A number that may be given once for each level. Raises ValueError where the levels differ."""
    if not isinstance(value, Sequence):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{source}: {name} {list(value)} differs between levels, which we have no form for")
    return value[0]


def _widths(widths: list[int], source: str, base: str = "model_channels") -> dict[str, Any]:
    if not widths or any(width % widths[0] for width in widths):
        raise ValueError(f"{source}: block_out_channels {widths} must be multiples of the first")
    return {base: widths[0], "channel_mult": tuple(width // widths[0] for width in widths)}


def _heads(value: Any, widths: list[int], source: str) -> dict[str, Any]:
    heads = list(value) if isinstance(value, Sequence) else [value] * len(widths)
    if len(set(heads)) == 1:
        return {"num_heads": heads[0], "head_channels": None}
    each = {width // n for width, n in zip(widths, heads, strict=True)}
    if len(each) != 1:
        raise ValueError(f"{source}: heads {heads} for widths {widths}: neither one number nor one width")
    return {"head_channels": each.pop()}
