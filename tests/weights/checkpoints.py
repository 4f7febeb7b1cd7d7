"""Small checkpoints in the original's names for the tests, filled by the formula of `formula.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from formula import named_weight
from safetensors.torch import save_file
from torch import Tensor

from ldm.models.clip import TextConfig
from ldm.weights import compvis
from ldm.weights.kinds import PARTS, ModelConfig, find_kind
from ldm.weights.names import shapes

PREFIXES = {
    "unet": compvis.UNET_PREFIX,
    "autoencoder": compvis.AUTOENCODER_PREFIX,
    "control": compvis.CONTROL_PREFIX,
    "bert": compvis.CONDITIONER_PREFIX,
    "classes": compvis.CONDITIONER_PREFIX,
}


def prefix_of(part: str, config: Any) -> str:
    if isinstance(config, TextConfig):
        return compvis.OPENCLIP_PREFIX if config.activation == "gelu" else compvis.TRANSFORMERS_PREFIX
    return PREFIXES[part]


def empty_single_file(config: ModelConfig, parts: Sequence[str] = PARTS) -> dict[str, Tensor]:
    """Every tensor of a single-file checkpoint, on the meta device."""
    tensors: dict[str, Tensor] = {}
    for part, each in config.parts.items():
        if part not in parts:
            continue
        openclip = isinstance(each, TextConfig) and each.activation == "gelu"
        ours = {name: torch.empty(shape, device="meta") for name, shape in shapes(each).items()}
        theirs = compvis.to_compvis(ours, each, openclip)
        tensors |= {prefix_of(part, each) + name: tensor for name, tensor in theirs.items()}
    return tensors


def single_file(
    kind: str, dtype: torch.dtype = torch.float32, parts: Sequence[str] = PARTS
) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `kind`, filled by the formula."""
    empty = empty_single_file(find_kind(kind).config, parts)
    return {name: named_weight(name, tuple(tensor.shape)).to(dtype) for name, tensor in empty.items()}


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
