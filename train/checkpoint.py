"""All that a run consists of, to and from a state on the disk (`state.py`), and what may differ at --resume.

The files do not tell how many processes wrote them, or whether those had the weights in pieces.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from ldm.config import differences, from_dict, to_dict
from ldm.distributed import is_first
from train import sharded
from train.distributed import parts_of
from train.ema import EMA
from train.state import load_newest_state, optimizer_tensors, restore_optimizer, save_state

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
    tensors: dict[str, Tensor] = {}
    for name, player in task.players.items():
        tensors |= {f"weights/{name}/{key}": value for key, value in player.module.state_dict().items()}
        tensors |= optimizer_tensors(optimizers[name], f"optimizer/{name}")
        if name in emas:
            tensors |= {f"ema/{name}/{key}": sharded.whole(value) for key, value in emas[name].shadow.items()}
    updates = {name: ema.updates for name, ema in emas.items()}
    config, parts = to_dict(task.config), parts_of(task.config.run.accumulate)
    header = {"config": config, "parts": parts, "updates": updates, "sums": sums, "skips": skips}
    header["data"] = getattr(task, "data_key", None)
    if not is_first():
        return
    try:
        save_state(folder / "states", step, tensors, header, task.config.run.keep)
    except OSError as error:
        told = (
            f"{error.strerror or error}; the state of step {step} is not saved, those before it are whole; "
            "mend that and go on with --resume"
        )
        raise OSError(error.errno, told, str(folder / "states")) from error


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
    tensors, header, notes = load_newest_state(folder / "states")
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
    free = (*task.config.run.FREE, "run.accumulate")
    changed = "; ".join(line for line in lines if not line.startswith(free))
    if changed:
        raise ValueError(f"--resume with changed values: {changed}; restore them or start a new run.out=")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    for name, player in task.players.items():
        sharded.load(player.module, part(f"weights/{name}/"), f"the state in {folder}")
        restore_optimizer(optimizers[name], tensors, f"optimizer/{name}")
        if name in emas:
            for key, value in part(f"ema/{name}/").items():
                emas[name].shadow[key].copy_(sharded.piece_like(emas[name].shadow[key], value))
            emas[name].updates = header["updates"][name]
    skips.update(header.get("skips", {}))
    sums = {name: (total, count) for name, (total, count) in header.get("sums", {}).items()}
    return int(header["step"]), sums, [*notes, f"resumed at step {header['step']}"]
