"""LoRAs and whole checkpoints: one into the other for good, and what one checkpoint has over another.

    merged(checkpoint, [(lora, 0.8)])   a checkpoint whose weights are W + scale dW, computed when it is read
    difference(base, tuned, rank=16)    the LoRA of what a fine-tuned checkpoint adds to its base

Both know checkpoints as `reading.py` opens them, whatever their form; `writing.convert` and `write_lora`
write the result. Used by `ldm-weights lora`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.models.lora_combine import extracted
from ldm.models.lora_math import LoRAWeights, delta
from ldm.weights.checkpoint import TITLES, Checkpoint, Part
from ldm.weights.lora import CONFIGS, LoRAFile
from ldm.weights.lora_names import layers
from ldm.weights.names import Config


def configs_of(checkpoint: Checkpoint) -> dict[str, Config]:
    """Of the parts that a LoRA can be in."""
    return {name: part.config for name, part in checkpoint.parts.items() if name in CONFIGS}


def merged(checkpoint: Checkpoint, loras: Sequence[tuple[LoRAFile, float]]) -> Checkpoint:
    """The checkpoint with LoRAs added to its weights, in any order. Raises ValueError for a part it lacks."""
    parts = dict(checkpoint.parts)
    for lora, _ in loras:
        for name in lora.parts:
            if name not in parts:
                raise ValueError(f"{lora.path} is of a {TITLES[name]}, which {checkpoint.path} does not hold")
    for name, part in checkpoint.parts.items():
        changes = tuple((lora.parts[name], scale) for lora, scale in loras if name in lora.parts)
        if changes:
            parts[name] = Merged(part.config, part.source, part.names, part.to_ours, changes)
    return replace(checkpoint, parts=parts, foreign={})


@dataclass(frozen=True)
class Merged(Part):
    """A part whose layers are changed by LoRAs."""

    changes: tuple[tuple[LoRAWeights, float], ...]

    def tensors(self, dtype: torch.dtype | None = None, allow_nan: bool = False) -> dict[str, Tensor]:
        """As of every part; changed in float32, then in `dtype` or that of the file."""
        tensors = super().tensors(None, allow_nan)
        result = {}
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight")
            changes = [scale * delta(w[layer]) for w, scale in self.changes if name != layer and layer in w]
            after = sum(changes, tensor.float()).to(dtype or tensor.dtype) if changes else tensor
            if changes and not (allow_nan or bool(torch.isfinite(after).all())):
                raise ValueError(f"{name} is not finite as {after.dtype} with the LoRA; try --dtype float32")
            result[name] = after if dtype is None else after.to(dtype)
        return result


def difference(
    base: Checkpoint, tuned: Checkpoint, rank: int | None = None, energy: float | None = None
) -> dict[str, LoRAWeights]:
    """The LoRA nearest to tuned - base, of the UNet and, where both hold one, the text tower.

    Raises ValueError where the two are not of one kind or do not differ, and as `lora_combine.kept`.
    """
    found: dict[str, LoRAWeights] = {}
    for name in ("unet", "text"):
        if name == "text" and name not in base.parts.keys() & tuned.parts.keys():
            continue
        old, new = base.require(name), tuned.require(name)
        if old.config != new.config:
            raise ValueError(f"{base.path} and {tuned.path} differ in the kind of their {TITLES[name]}")
        weights = [part.tensors(None) for part in (old, new)]
        by_layer = [{layer: each[f"{layer}.weight"] for layer in layers(old.config)} for each in weights]
        if any(not torch.equal(by_layer[0][layer], by_layer[1][layer]) for layer in by_layer[0]):
            found[name] = extracted(by_layer[0], by_layer[1], rank, energy)
    if not found:
        raise ValueError(f"{base.path} and {tuned.path} do not differ in any layer")
    return found
