"""Our models as diffusers': the same configuration and the same weights in its classes.

Raises ValueError for a configuration that these few lines do not cover. Weights go through the tables of
`ldm/weights/diffusers.py`.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.diffusers import to_diffusers

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def unet_of(config: UNetConfig) -> Any:
    """A UNet2DConditionModel: a text-conditioned UNet of this configuration, freshly initialised."""
    extras = (config.num_classes, config.vector_dim, config.resblock_updown)
    if config.attention != "transformer" or config.context_dim is None or any(extras):
        raise ValueError(f"only text-conditioned UNets are compared with diffusers, not {config}")
    pooled = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config.context_dim}
    widths = tuple(config.model_channels * mult for mult in config.channel_mult)
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        transformer_layers_per_block=config.transformer_depth,
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # its name for the number of heads
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        dropout=config.dropout,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        **(pooled if config.pooled_context else {}),
    )


def predict(unet: Any, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """What diffusers' UNet makes of the same inputs; the pooled context is an argument of its own there."""
    pooled = context[:, -1] if unet.class_embedding is not None else None
    return unet(x, t, encoder_hidden_states=context, class_labels=pooled, return_dict=False)[0]


def unet(ours: UNet) -> Any:
    """`ours` as UNet2DConditionModel, with its own copy of the weights, in the same mode."""
    with torch.device("meta"):
        theirs = unet_of(ours.config)
    return equal(theirs, ours)


def autoencoder(ours: AutoencoderKL) -> Any:
    """`ours` as diffusers' AutoencoderKL, with its own copy of the weights, in the same mode."""
    config = ours.config
    kinds = ["Attn" if i in config.attention_levels else "" for i in range(len(config.channel_mult))]
    with torch.device("meta"):
        theirs = DiffusersAutoencoder(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
            block_out_channels=tuple(config.base_channels * mult for mult in config.channel_mult),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.z_channels,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
            scaling_factor=config.scale_factor,
            shift_factor=config.shift_factor,
        )
    return equal(theirs, ours)


def equal(theirs: Any, ours: UNet | AutoencoderKL) -> Any:
    """Copies of the weights of `ours` in `theirs`, strictly; its mode and what it trains too."""
    translated = to_diffusers(
        {name: tensor.clone() for name, tensor in ours.state_dict().items()}, ours.config
    )
    theirs.load_state_dict(translated, strict=True, assign=True)
    theirs.requires_grad_(next(ours.parameters()).requires_grad)
    return theirs.train(ours.training)


def scheduler(config: DiffusionConfig) -> DDIMScheduler:
    """DDIM on the timesteps and with the last step of the original: our sampler "ddim" by other hands."""
    return DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_schedule=SCHEDULES[config.schedule],
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=PREDICTIONS[config.prediction],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
