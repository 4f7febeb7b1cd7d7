"""The training state on disk: everything a run needs to go on as if it had never stopped.

One safetensors file a checkpoint, `states/step-00001200.safetensors`: weights, moving average, optimiser
moments, and in the header the step and the resolved configuration. Random states are absent on purpose:
every draw is a function of (seed, step).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.weights.io import load_weights, save_weights

PATTERN = "step-*.safetensors"


def save_state(
    folder: Path, step: int, tensors: dict[str, Tensor], header: dict[str, Any], keep: int
) -> Path:
    """Write the state of `step`, then delete all but the newest `keep`; old ones go once it is whole."""
    path = folder / f"step-{step:08d}.safetensors"
    save_weights(path, tensors, {"step": step, **header})
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def load_newest_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The newest whole state, its header, and a line for each torn file passed over.

    Raises FileNotFoundError where there is none: resuming never starts a new run silently.
    """
    notes: list[str] = []
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            return *load_weights(path), notes
        except ValueError as error:
            notes.append(f"passed over: {error}")
    raise FileNotFoundError(
        f"nothing to resume: no whole checkpoint in {folder}" + "".join(f"; {note}" for note in notes)
    )


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as `prefix/index/name`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `optimizer_tensors`; the groups (learning rate and so on) stay as configured."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}/"):
            _, index, name = key.rsplit("/", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            # The fused optimiser walks the memory of both without a look at the strides (channels-last, say).
            if value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
