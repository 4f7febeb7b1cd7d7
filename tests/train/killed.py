"""A tiny run that is killed again and again, and resumed each time: `killed.py FOLDER KILLS SEED`.

Started by `test_faults.py` as a process of its own, which forks a child for each stretch of the run; the child
is killed by SIGKILL at a random moment: while a step computes, at a random byte of a state being written, or
between the new state's arrival and the deletion of an old one. Prints how each child ended.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
from tiny_task import TinyTask, config_of

import ldm.weights.io as io
from train.loop import train

STEPS = 120
WAYS = ("any moment", "a byte", "renamed")


def settings(folder):
    """Of the run that is killed and of the one that is not; nothing happens seldom, so that all is hit."""
    return config_of(folder, steps=STEPS, checkpoint_every=3, validate_every=4, preview_every=10, log_every=5)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A file open for writing whose process dies at byte `left`, at the latest when all has been written."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        data = bytes(data)
        if len(data) >= self.left:
            self.file.write(data[: self.left])
            self.file.flush()
            die()
        self.left -= len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()
        die()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def doom(task, way, step, rng):
    """See to it that the process dies in or soon after `step`, in this way."""
    loss = task.loss

    def noticed(now, part):
        if now >= step and not armed.is_set():
            armed.set()
            if way == "any moment":
                threading.Timer(rng.uniform(0, 0.02), die).start()
        return loss(now, part)

    def opened(path, mode):
        file = open(path, mode)  # noqa: SIM115
        doomed = armed.is_set() and way == "a byte" and ".step-" in str(path)
        return Dying(file, rng.randrange(1, 8000)) if doomed else file

    def replaced(source, target):
        replace(source, target)
        if armed.is_set() and way == "renamed" and "step-" in str(target):
            die()

    armed, replace = threading.Event(), os.replace
    task.players["model"].loss = noticed
    io.open = opened  # stands before the built-in one for that module
    os.replace = replaced


def stretch(folder, way, step, rng):
    task = TinyTask(settings(folder))
    if way is not None:
        doom(task, way, step, rng)
    train(task, any((folder / "states").glob("*.safetensors")), "")
    if way is not None:
        die()  # the moment was after the end


def main(folder, kills, seed):
    torch.set_num_threads(1)  # no other threads yet, so that children may be forked
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what children would load, each for itself
    rng = random.Random(seed)
    room = (STEPS - 20) // kills
    for number in range(kills + 1):
        way = WAYS[number % len(WAYS)] if number < kills else None
        step = number * room + rng.randrange(room)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                stretch(folder, way, step, rng)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print("end:", way, step, "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
