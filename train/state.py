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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.distributed import is_first
from ldm.weights.io import read_header, save_weights
from train.pieces import open_pieces, save_pieces
from train.sharded import piece_like

PATTERN = "step-*"
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
    for part in folder.glob("states/.step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def states(folder: Path) -> list[Path]:
    """All states of a run, oldest first; of one step the folder after the file, as it is the later format."""
    found = [path for path in folder.glob(PATTERN) if path.suffix == ".safetensors" or path.is_dir()]
    return sorted(found, key=lambda path: (path.stem, path.is_dir()))


def save_state(
    folder: Path, step: int, tensors: dict[str, Tensor], header: dict[str, Any], keep: int
) -> Path:
    """Write the state of `step`, then delete all but the newest `keep`; old ones go once it is whole.

    Where a tensor is in pieces, all processes call this together.
    """
    path = folder / f"step-{step:08d}"
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        save_pieces(path, tensors, {"step": step, **header})
    else:
        path = path.with_name(f"{path.name}.safetensors")
        save_weights(path, tensors, {"step": step, **header})
    if is_first():
        delete([other for other in states(folder) if other.stem == path.stem and other != path])
        delete(states(folder)[:-keep])
    return path


def delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass(frozen=True)
class Saved:
    """A state on the disk: shape and format of its tensors, and its header. `read` fills tensors in place."""

    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    header: dict[str, Any]
    read: Callable[[Mapping[str, Tensor]], None]


def open_state(path: Path) -> Saved:
    """Raises ValueError where the state is torn. What it holds is only read into tensors that are given."""
    if path.is_dir():
        return Saved(*open_pieces(path))
    shapes, header = read_header(path)

    def read(into: Mapping[str, Tensor]) -> None:
        with safe_open(path, framework="pt") as file:
            for name, tensor in into.items():
                tensor.copy_(piece_like(tensor, file.get_tensor(name)))

    return Saved(shapes, header, read)


def newest_state(folder: Path) -> tuple[Saved, list[str]]:
    """The newest whole state, and a line for each torn one passed over.

    Raises FileNotFoundError where there is none: resuming never starts a new run silently.
    """
    notes: list[str] = []
    for path in reversed(states(folder)):
        try:
            return open_state(path), notes
        except ValueError as error:
            notes.append(f"passed over: {error}")
    raise FileNotFoundError(
        f"nothing to resume: no whole checkpoint in {folder}" + "".join(f"; {note}" for note in notes)
    )


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a state, whole, and its header. Raises as `open_state`."""
    saved = open_state(path)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.shapes.items()}
    saved.read(tensors)
    return tensors, saved.header


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as `prefix/index/name`; in pieces where the parameters are."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def room_for_optimizer(
    optimizer: Optimizer, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], prefix: str
) -> dict[str, Tensor]:
    """Tensors to read what `optimizer_tensors` wrote into, in pieces where the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    room = {}
    for key, (shape, dtype) in shapes.items():
        if key.startswith(f"{prefix}/"):
            parameter = parameters[int(key.rsplit("/", 2)[1])]
            alike = parameter.shape == shape
            room[key] = torch.empty_like(parameter, dtype=dtype) if alike else torch.empty(shape, dtype=dtype)
    return room


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
