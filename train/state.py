"""The training state on disk: everything a run needs to go on as if it had never stopped.

One safetensors file a checkpoint, `states/step-00001200.safetensors`: weights, moving average, optimiser
moments, and in the header the step and the resolved configuration; or a folder `states/step-00001200` of what
each of several processes holds of that (`pieces.py`). Any run goes on from either. Random states are absent
on purpose: every draw is a function of (seed, step).

A run folder belongs to one process at a time (`held`); the lock is the kernel's, so a killed process leaves
none behind.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.weights.io import load_weights, save_weights
from train.sharded import piece_like, whole

PATTERN = "step-*.safetensors"
LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside the block the run folder (made if it is not there) is this process's alone.

    Raises ValueError with the id of the process that holds it, if one does. The kernel takes the lock back
    when its process ends, however it ends; the file that stays means nothing by itself. Without effect on a
    system or a file system that has no such locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {holder}, which is still running; wait for it or stop it, or choose "
                "another run.out="
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def sweep(folder: Path) -> None:
    """Delete weights that a killed process left half written; for the process that holds the run folder."""
    for part in folder.glob("*/.*.safetensors.*.part"):
        part.unlink(missing_ok=True)


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
        f"{prefix}/{index}/{name}": whole(value) if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `optimizer_tensors`; the groups (learning rate and so on) stay as configured."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}/"):
            _, index, name = key.rsplit("/", 2)
            state.setdefault(int(index), {})[name] = piece_like(parameters[int(index)], value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            # The fused optimiser walks the memory of both without a look at the strides (channels-last, say).
            if value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
