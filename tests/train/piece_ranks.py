"""Runs in pieces for `test_pieces.py`: `piece_ranks.py FOLDER`, as `ranks.py`, by whose means."""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from ranks import PARTS, job, poisoned
from tiny_task import TinyTask, config_of
from torch.distributed.tensor import DTensor

from ldm.distributed import rank, world_size
from train import loop
from train.loop import train
from train.sharded import own_piece, shard_all, tensors, whole


class Piecewise(TinyTask):
    """A tiny task whose network may be cut up."""

    def __post_init__(self):
        super().__post_init__()
        self.sharded = (self.model,)

    def preview(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def task(folder, at=(), **values):
    """A batch in four parts, however many processes compute them; a state every four of twelve steps."""
    how = {
        "accumulate": PARTS // world_size(),
        "parallel": "fsdp",
        "checkpoint_every": 4,
        "keep": 9,
        **values,
    }
    return Piecewise(config_of(folder, **how), at=dict(at))


def plain(folder):
    train(task(folder, parallel="ddp"), False, "")


def pieces(folder):
    """Says how many values of the state this process held; to ask for a whole tensor at a save is an error."""
    run, saves = task(folder), []

    def save(*given):
        full, DTensor.full_tensor = DTensor.full_tensor, None
        try:
            saves.append(sum(own_piece(tensor).numel() for tensor in tensors(run.model).values()))
            written(*given)
        finally:
            DTensor.full_tensor = full

    written, loop.save = loop.save, save
    train(run, False, "")
    cut, built = task(folder), task(folder).model.parameters()
    shard_all(cut)
    alike = [torch.equal(whole(a), b) for a, b in zip(cut.model.parameters(), built, strict=True)]
    return {"held": saves, "alike": alike}


def resumed(folder):
    train(task(folder), True, "")


def resumed_whole(folder):
    train(task(folder, parallel="ddp"), True, "")


def no_room(folder):
    """Rank 1 cannot flush what it writes in the second save."""
    flush, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if rank() == 1 and len(calls) > 1:
            raise OSError(28, "No space left on device")
        flush(file)

    os.fsync = fsync
    train(task(folder), False, "")


def killed(folder):
    """Rank 1 is gone when the second state is about to be written."""

    def save(*given):
        saves.append(written(*given) if not saves else None)
        if len(saves) == 2:
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            written(*given)

    saves, written, loop.save = [], loop.save, save
    train(task(folder), False, "")


def bad(folder):
    """The loss of step 7 is not finite in the last rank."""
    at = {6: poisoned} if rank() == world_size() - 1 else {}
    train(task(folder, at=at, on_nonfinite="skip"), False, "")


def until(step, folder, copy):
    """A copy of a run, as if it had been stopped after that step."""
    shutil.copytree(folder, copy)
    for path in (copy / "states").iterdir():
        if int(path.stem.removeprefix("step-")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(copy / "model")
    return copy


def main(folder):
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    importlib.import_module("torch.distributed.checkpoint")  # once, for all that are forked

    job("plain1", plain, folder / "plain", 1)
    job("pieces4", pieces, folder / "pieces4", 4)
    for name, action, world, start in (
        ("one", resumed_whole, 1, "pieces4"),
        ("two", resumed, 2, "pieces4"),
        ("copies", resumed_whole, 2, "pieces4"),
        ("from_plain", resumed, 4, "plain"),
    ):
        job(name, action, until(8, folder / start, folder / name), world)
    for world in (1, 2):
        job(f"bad{world}", bad, folder / f"bad{world}", world)
    job("no_room", no_room, folder / "no_room", 2)
    job("killed", killed, folder / "killed", 2)
    job("after", resumed, folder / "killed", 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
