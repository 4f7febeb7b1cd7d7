"""Bytes that passes of an autoencoder need at most besides its weights: `step_memory.py FOLDER [key=value ...]`.

Started by `test_rehearsal.py` as a process of its own, whose peak nothing else can be in.
"""

import sys
from pathlib import Path

from train.__main__ import build_task


def memory(name):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def main(folder, *options):
    config = "configs/train/tiny_autoencoder.yaml"
    task = build_task("autoencoder", config, [f"data.path={folder}", "run.device=cpu", *options])
    player = task.players["model"]
    whole = task.batch(0, 0)
    task.batch = lambda step, part: whole[:1]  # the libraries' own first: threads, code
    player.loss(0, 0)[0].backward()
    task.batch = lambda step, part: whole
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    player.loss(0, 0)[0].backward()
    print("bytes", memory("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
