"""A LoRA with class pictures, trained by one process and by two: `personal_ranks.py FOLDER`, as `ranks.py`."""

import sys
from pathlib import Path

import torch
from personal import PRIOR, make, task_of
from ranks import job

from ldm.distributed import world_size
from train.loop import train


def lora(folder):
    """A batch of 4 in two parts, however many processes compute them."""
    more = [*PRIOR, "prior.count=12", f"run.accumulate={2 // world_size()}", "run.checkpoint_every=0"]
    train(task_of("lora", folder, folder / f"lora{world_size()}", *more), False, "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what children would load, each for itself
    place = make(Path(sys.argv[1]))
    for world in (1, 2):
        job(f"lora{world}", lora, place, world)
