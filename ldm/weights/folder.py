"""A model as a folder: one safetensors file a part, each with its configuration in the header.

    unet.safetensors           header: "config" (UNetConfig) and "diffusion" (DiffusionConfig)
    autoencoder.safetensors    header: "config" (AutoencoderConfig)
    text_encoder.safetensors   header: "config" (TextConfig); absent where the UNet reads no text

`ldm-train` writes this form and `sample/pipeline.py` reads it. Parts come back in float32 on the CPU,
loaded strictly. Every reader here raises FileNotFoundError for a missing file, and ValueError for one that
is truncated or foreign, whose header does not say what it holds, whose tensors do not fit the header or are
not finite: each in one line.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.config import from_dict, to_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.io import load_strict, load_weights, save_weights

M = TypeVar("M", bound=nn.Module)

UNET, AUTOENCODER, TEXT_ENCODER = "unet.safetensors", "autoencoder.safetensors", "text_encoder.safetensors"
FILES = (UNET, AUTOENCODER, TEXT_ENCODER)


def load_unet(folder: Path) -> tuple[UNet, DiffusionConfig]:
    """The UNet and how it was trained to denoise."""
    unet, header = load_part(folder / UNET, UNet, UNetConfig)
    source = str(folder / UNET)
    return unet, from_dict(DiffusionConfig, section(header, "diffusion", source), source)


def load_autoencoder(path: Path) -> AutoencoderKL:
    """The first stage, from its file or its model folder."""
    return load_part(path / AUTOENCODER if path.is_dir() else path, AutoencoderKL, AutoencoderConfig)[0]


def load_text_encoder(folder: Path) -> TextEncoder:
    """The text tower."""
    return load_part(folder / TEXT_ENCODER, TextEncoder, TextConfig)[0]


def load_part(path: Path, module_class: Callable[[Any], M], config_class: type) -> tuple[M, dict[str, Any]]:
    """The module that `path` holds, built from the configuration in its header; and the header."""
    tensors, header = load_weights(path)
    module = module_class(from_dict(config_class, section(header, "config", str(path)), str(path)))
    load_strict(module, tensors, str(path))
    return module, header


def section(header: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """A part of a file's header. Raises ValueError where it is missing."""
    if not isinstance(header.get(name), dict):
        raise ValueError(f"{source}: its header has no {name!r}, so it is not part of a model folder of ours")
    return header[name]


def save_part(path: Path, module: nn.Module, dtype: torch.dtype, **extra: Any) -> None:
    """Write one part atomically; `extra` are further sections of the header.

    Raises ValueError where a weight overflows `dtype`.
    """
    tensors = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"{path.name}: {bad[0]} is not finite as {dtype}, so it is not saved; try float32")
    save_weights(path, tensors, {"config": to_dict(module.config), **extra})


def weights_hash(folder: Path) -> str:
    """12 hexadecimal digits, from SHA-256, that change with any byte of a model's files."""
    digest = hashlib.sha256()
    for path in (folder / name for name in FILES):
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
