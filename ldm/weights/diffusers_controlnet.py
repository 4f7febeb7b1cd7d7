"""The `config.json` of diffusers' `ControlNetModel` as our configuration and back."""

from typing import Any

from ldm.models.controlnet import HINT_WIDTHS, ControlNetConfig
from ldm.weights.diffusers_config import Json, require, unet_config, unet_json

CONTROL_BUILT_IN = {
    "controlnet_conditioning_channel_order": "rgb",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "encoder_hid_dim_type": None,
}


def controlnet_config(data: Json, source: str) -> ControlNetConfig:
    """Of a `ControlNetModel`."""
    require(data, CONTROL_BUILT_IN, source)
    unet = unet_config({**data, "out_channels": data.get("in_channels", 4)}, source)
    return ControlNetConfig(
        unet=unet,
        hint_channels=data.get("conditioning_channels", 3),
        hint_widths=tuple(data.get("conditioning_embedding_out_channels") or HINT_WIDTHS),
        global_pool=data.get("global_pool_conditions", False),
    )


def controlnet_json(config: ControlNetConfig) -> dict[str, Any]:
    """The `config.json` of a ControlNet. Raises ValueError for what diffusers cannot express."""
    unet = unet_json(config.unet)
    if unet["_class_name"] != "UNet2DConditionModel":
        raise ValueError("a ControlNet without a context has no counterpart in diffusers")
    for name in ("out_channels", "up_block_types", "sample_size", "dropout"):
        unet.pop(name)
    return unet | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
        "global_pool_conditions": config.global_pool,
    }
