"""Weights and inputs without files: each tensor from its name, as in `reference/README.md`."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.weights.compvis import to_compvis, to_ours
from ldm.weights.names import Config, shapes

REFERENCE = Path(__file__).parent / "reference"


def named_input(name: str, *shape: int) -> Tensor:
    """The input tensor called `name`: standard normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def named_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight called `key` in the original single-file checkpoint."""
    r = named_input(key, *shape)
    if "token_embedding" in key or "position_embedding" in key:
        return 0.02 * r
    if len(shape) > 1:
        return r / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * r if key.endswith("weight") else 0.1 * r


def original_shapes(config: Config, prefix: str, openclip: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a part in a single-file checkpoint."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes(config).items()}
    return {
        prefix + name: tuple(tensor.shape) for name, tensor in to_compvis(empty, config, openclip).items()
    }


def filled(config: Config, prefix: str, openclip: bool = False) -> dict[str, Tensor]:
    """The state dict of our model of `config`, filled by the formula."""
    theirs = {
        name.removeprefix(prefix): named_weight(name, shape)
        for name, shape in original_shapes(config, prefix, openclip).items()
    }
    return to_ours(theirs, config)


def reference(file: str) -> dict[str, Tensor]:
    """The stored outputs of the original code."""
    return load_file(REFERENCE / file)


def manifest(name: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint; one may be stored as the changes to another."""
    entry = json.loads((REFERENCE / "manifests.json").read_text())[name]
    base = manifest(entry["like"]) if "like" in entry else {}
    return {**base, **{key: tuple(shape) for key, shape in entry["tensors"].items()}}
