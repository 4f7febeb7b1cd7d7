"""A model as a folder: one safetensors file a part, each with its configuration in the header.

    unet.safetensors             header: "config" (UNetConfig) and "diffusion" (DiffusionConfig)
    autoencoder.safetensors      header: "config" (AutoencoderConfig)
    text_encoder.safetensors     header: "config" (TextConfig); absent where the UNet reads no text
    bert, class_embedder, controlnet.safetensors   likewise

`ldm-train` and `ldm-weights convert` write this form, `checkpoint.py` reads it as it reads foreign ones.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import to_dict
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.class_embedder import ClassEmbedderConfig
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights.io import save_weights

UNET, AUTOENCODER, TEXT_ENCODER = "unet.safetensors", "autoencoder.safetensors", "text_encoder.safetensors"
PART_FILES = {
    "unet": (UNET, UNetConfig),
    "autoencoder": (AUTOENCODER, AutoencoderConfig),
    "text": (TEXT_ENCODER, TextConfig),
    "bert": ("bert.safetensors", BertTextConfig),
    "classes": ("class_embedder.safetensors", ClassEmbedderConfig),
    "control": ("controlnet.safetensors", ControlNetConfig),
}
FILES = tuple(file for file, _ in PART_FILES.values())


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


def weights_hash(files: Iterable[Path]) -> str:
    """12 hexadecimal digits, from SHA-256, that change with any byte of a model's files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
