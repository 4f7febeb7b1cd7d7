"""Our models as diffusers': the same configuration and the same weights in its classes.

Configurations go through `ldm/weights/diffusers_config.py`, weights through the tables of
`ldm/weights/diffusers.py`, as in `ldm-weights convert`; ValueError where diffusers has no counterpart.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.diffusers import to_diffusers
from ldm.weights.diffusers_config import autoencoder_json, scheduler_json, unet_json
from ldm.weights.diffusers_controlnet import controlnet_json


def unet_of(config: UNetConfig) -> Any:
    """A UNet2DConditionModel: a text-conditioned UNet of this configuration, freshly initialised."""
    extras = (config.num_classes, config.vector_dim)
    if config.attention != "transformer" or config.context_dim is None or any(extras):
        raise ValueError(f"only text-conditioned UNets are compared with diffusers, not {config}")
    if config.pooled_context:  # there a vector that the caller hands over, see `predict`
        config = replace(config, pooled_context=False, vector_dim=config.context_dim)
    return UNet2DConditionModel.from_config(unet_json(config))


def predict(unet: Any, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """What diffusers' UNet makes of the same inputs; the pooled context is an argument of its own there."""
    pooled = context[:, -1] if unet.class_embedding is not None else None
    return unet(x, t, encoder_hidden_states=context, class_labels=pooled, return_dict=False)[0]


def unet(ours: UNet, share: bool = False) -> Any:
    """`ours` as UNet2DConditionModel, in the same mode, on a copy of the weights unless they are shared."""
    with torch.device("meta"):
        theirs = unet_of(ours.config)
    return equal(theirs, ours, share)


def autoencoder(ours: AutoencoderKL) -> Any:
    """`ours` as diffusers' AutoencoderKL, with its own copy of the weights, in the same mode."""
    with torch.device("meta"):
        theirs = DiffusersAutoencoder.from_config(autoencoder_json(ours.config))
    return equal(theirs, ours)


def controlnet(ours: ControlNet, share: bool = False) -> Any:
    """`ours` as diffusers' ControlNetModel, likewise."""
    with torch.device("meta"):
        theirs = ControlNetModel.from_config(controlnet_json(ours.config))
    return equal(theirs, ours, share)


def equal(theirs: Any, ours: UNet | AutoencoderKL | ControlNet, share: bool = False) -> Any:
    """The weights of `ours` in `theirs`, strictly, copied unless shared; its mode and what it trains too."""
    tensors = {name: tensor if share else tensor.clone() for name, tensor in ours.state_dict().items()}
    translated = to_diffusers(tensors, ours.config)
    theirs.load_state_dict(translated, strict=True, assign=True)
    theirs.requires_grad_(next(ours.parameters()).requires_grad)
    return theirs.train(ours.training)


def scheduler(config: DiffusionConfig, sampler: str = "ddim") -> Any:
    """DDIM on the timesteps and with the last step of the original, our sampler "ddim" by other hands; or
    DPM++ 2M ("dpmpp_2m")."""
    if sampler == "ddim":
        return DDIMScheduler.from_config(scheduler_json(config))
    return DPMSolverMultistepScheduler.from_config({**scheduler_json(config), "timestep_spacing": "linspace"})
