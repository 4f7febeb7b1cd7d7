"""A tiny random model: 32 px pictures, 8x8 latents, a text tower of one layer; every weight counts."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from sample.pipeline import Pipeline


def tiny(diffusion: DiffusionConfig | None = None, text: bool = True) -> Pipeline:
    """A pipeline on the CPU, the same each time."""
    torch.manual_seed(0)
    unet = UNetConfig(
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=2,
        context_dim=16 if text else None,
        norm_groups=4,
        sample_size=8,
    )
    first_stage = AutoencoderConfig(
        base_channels=8,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        norm_groups=4,
        scale_factor=0.9,
        shift_factor=0.1,
    )
    tower = TextConfig(width=16, layers=1, heads=2, mlp_width=32)
    modules = (UNet(unet), AutoencoderKL(first_stage), TextEncoder(tower) if text else None)
    for module in modules:
        if module is not None:
            module.requires_grad_(False).eval()
            for parameter in module.parameters():
                if (
                    not parameter.any()
                ):  # zero-initialised: without this the network ignores half of its input
                    nn.init.normal_(parameter, std=0.1)
    return Pipeline(*modules, diffusion or DiffusionConfig(), device="cpu")


@pytest.fixture
def build() -> Callable[..., Pipeline]:
    """Builds a tiny model of its own for a test: `build(DiffusionConfig(...), text=False)`."""
    return tiny


@pytest.fixture(scope="session")
def kept() -> Callable[..., Pipeline]:
    """As `build`, but the same model for the same arguments. Tests must not change it."""
    return functools.cache(tiny)


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """The tiny model, live. Tests must not change it."""
    return tiny()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder in float32, with a space and letters beyond ASCII in the path. Tests must not change it."""
    folder = tmp_path_factory.mktemp("möd els") / "tiny 🍎"
    tiny().save(folder, torch.float32)
    return folder
