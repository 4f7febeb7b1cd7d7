"""All that a run consists of, to and from a state on the disk (`state.py`), and what may differ at --resume.

A state does not tell how many processes wrote it. Weights in pieces are saved in pieces; any run goes on from
either kind.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.config import differences, from_dict, to_dict
from train import sharded
from train.distributed import parts_of
from train.ema import EMA
from train.given import require_given
from train.state import newest_state, optimizer_tensors, restore_optimizer, room_for_optimizer, save_state

if TYPE_CHECKING:
    from train.loop import Task


def save(
    task: "Task",
    optimizers: Mapping[str, Optimizer],
    emas: Mapping[str, EMA],
    folder: Path,
    step: int,
    sums: Mapping[str, tuple[float, int]],
    skips: Mapping[str, int],
) -> None:
    """Write everything the run consists of; `sums` are the metrics not logged yet.

    Raises OSError where there is no room for it (say); the states before it stay.
    """
    tensors = held_tensors(task, emas)
    for name, optimizer in optimizers.items():
        tensors |= optimizer_tensors(optimizer, f"optimizer/{name}")
    updates = {name: ema.updates for name, ema in emas.items()}
    config, parts = to_dict(task.config), parts_of(task.config.run.accumulate)
    header = {"config": config, "parts": parts, "updates": updates, "sums": sums, "skips": skips}
    header |= {"data": getattr(task, "data_key", None), "given": getattr(task, "given", {})}
    try:
        save_state(folder / "states", step, tensors, header, task.config.run.keep)
    except OSError as error:
        told = (
            f"{error.strerror or error}; the state of step {step} is not saved, those before it are whole; "
            "mend that and go on with --resume"
        )
        raise OSError(error.errno, told, str(folder / "states")) from error


def held_tensors(task: "Task", emas: Mapping[str, EMA]) -> dict[str, Tensor]:
    """Weights and moving averages as this process holds them, by their names in a state; to be written to."""
    held: dict[str, Tensor] = {}
    for name, player in task.players.items():
        held |= {f"weights/{name}/{key}": value for key, value in sharded.tensors(player.module).items()}
        if name in emas:
            held |= {f"ema/{name}/{key}": value for key, value in emas[name].shadow.items()}
    return held


def restore(
    task: "Task",
    optimizers: Mapping[str, Optimizer],
    emas: Mapping[str, EMA],
    skips: dict[str, int],
    folder: Path,
) -> tuple[int, dict[str, tuple[float, int]], list[str]]:
    """Load the newest state into everything.

    Returns the step to go on from, the metrics not logged yet, and lines to show.
    """
    saved, notes = newest_state(folder / "states")
    header = saved.header
    # Through the dataclass, so that a key which did not exist when the state was written has its default.
    before = to_dict(from_dict(type(task.config), header["config"], f"the state in {folder}"))
    lines = differences(before, to_dict(task.config))
    # How many processes compute the parts of a batch is free; how many parts there are is not.
    parts, told = parts_of(task.config.run.accumulate), header.get("parts", before["run"]["accumulate"])
    if parts != told:
        lines.append(f"parts of a batch (run.accumulate x processes): {told} -> {parts}")
    data, data_before = getattr(task, "data_key", None), header.get("data")
    if data != data_before and data_before is not None:
        lines.append(f"the training set: {data_before} -> {data}")
    require_given(header.get("given"), getattr(task, "given", {}), task.config)
    free = (*task.config.run.FREE, "run.accumulate")
    changed = "; ".join(line for line in lines if not line.startswith(free))
    if changed:
        raise ValueError(f"--resume with changed values: {changed}; restore them or start a new run.out=")

    tensors = held_tensors(task, emas)
    own = {key: tensor.shape for key, tensor in tensors.items()}
    theirs = {k: shape for k, (shape, _) in saved.shapes.items() if k.startswith(("weights/", "ema/"))}
    if other := [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]:
        raise ValueError(f"the state in {folder} has other weights: {', '.join(sorted(other)[:5])}")
    for name, optimizer in optimizers.items():
        tensors |= room_for_optimizer(optimizer, saved.shapes, f"optimizer/{name}")
    with torch.no_grad():
        saved.read(tensors)
    for key, tensor in tensors.items():
        if key.startswith("weights/") and not bool(sharded.own_piece(tensor).isfinite().all()):
            raise ValueError(f"the state in {folder} is damaged: {key} holds NaN or infinite values")
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, tensors, f"optimizer/{name}")
    for name, ema in emas.items():
        ema.updates = header["updates"][name]
    skips.update(header.get("skips", {}))
    sums = {name: (total, count) for name, (total, count) in header.get("sums", {}).items()}
    return int(header["step"]), sums, [*notes, f"resumed at step {header['step']}"]
