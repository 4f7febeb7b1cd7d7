"""Runs of several processes, for `test_distributed.py`: `ranks.py FOLDER`, started as a process of its own.

Imports torch once, then forks the processes of each job, which find each other as those of torchrun do. Prints
for each job one line of JSON: its name and, of each rank, how it ended and what it returned.
"""

import importlib
import json
import math
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
from test_vq_task import config_of as stage_config
from tiny_task import Duel, TinyTask, config_of, send

from ldm.config import from_dict
from ldm.distributed import collect, gather, launched, rank, rows_of_all, together, world_size
from ldm.seeding import generator
from sample.images import save_grid
from train.data import batch_indices
from train.distributed import own_parts, parts_of, share_buffers
from train.loop import train
from train.tasks.autoencoder import AutoencoderTask
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

PARTS = 4


def settings(folder, **values):
    """A batch of 8 in four parts, however many processes compute them."""
    return config_of(folder, **{"accumulate": PARTS // world_size(), **values})


# --- jobs: what each process does ---------------------------------------------------------------------------


def equal(folder):
    train(TinyTask(settings(folder / f"tiny{world_size()}")), False, "")
    train(Duel(settings(folder / f"duel{world_size()}")), False, "")


def stopped(folder):
    """The last rank gets a signal in step 7; all stop after it."""
    signals = [send(signal.SIGTERM)]  # in one part; a second would not wait for the end of the step
    at = {6: lambda loss: signals.pop()(loss) if signals else loss} if rank() == world_size() - 1 else {}
    train(TinyTask(settings(folder), at=at), False, "ldm-train x")


def resumed(folder):
    train(TinyTask(settings(folder)), True, "")


def other_parts(folder):
    train(TinyTask(settings(folder, accumulate=PARTS)), True, "")


def uneven(folder):
    train(TinyTask(settings(folder, batch=9, accumulate=1)), False, "")


def differing(folder):
    train(TinyTask(settings(folder, lr=0.05 * (1 + rank()))), False, "")


def poisoned(loss):
    return loss * math.nan


def nan(folder):
    at = {6: poisoned} if rank() == 1 else {}
    train(TinyTask(settings(folder), at=at), False, "")


def skipping(folder):
    at = {6: poisoned} if rank() == world_size() - 1 else {}
    train(TinyTask(settings(folder, on_nonfinite="skip"), at=at), False, "")


def no_room(folder):
    """Rank 0 cannot write its preview."""
    task = TinyTask(settings(folder))

    def preview(path):
        raise OSError(28, "No space left on device")

    task.preview = preview
    train(task, False, "")


def epoch(folder):
    """Rows of the data set, and noise, that each rank meets in an epoch of 40 images."""
    seen, noise = [], []
    for step in range(5):
        rows = batch_indices(40, 8, 0, step).chunk(parts_of(2))
        for part in own_parts(2):
            seen += rows[part].tolist()
            noise.append(torch.randn(1, generator=generator(0, "train", step, part)).item())
    return {"seen": seen, "noise": noise}


def buffers(folder):
    """Statistics of a normalisation are averaged, counters of disuse become the smallest."""
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("idle", torch.tensor([5, 3]) + rank() * torch.tensor([1, -1]))
    module.running_mean.fill_(rank())
    module.weight.data.fill_(rank())  # a parameter is left alone
    share_buffers(module)
    return [module.running_mean.tolist(), module.idle.tolist(), module.weight.tolist()]


def nested(folder):
    """Rank 1 fails inside of what all do together: its error is told, not that of those who heard of it."""
    with together(), together():
        if rank() == 1:
            raise ValueError("a torn picture")


def collected(folder):
    rows = torch.full((rank() + 1, 2), float(rank()))
    return [collect([rank(), "x"]), rows_of_all(rows).tolist()]


def killed(folder):
    def die(loss):
        os.kill(os.getpid(), signal.SIGKILL)

    at = {7: die} if rank() == 1 else {}
    train(TinyTask(settings(folder), at=at), False, "")


def watched(folder):
    """Which rank logs, validates and writes."""
    task = TinyTask(settings(folder))
    files = []
    task.preview = lambda path: files.append(path.name)
    train(task, False, "")
    weights = gather(task.model[3].weight.tolist())
    return {"validated": len(task.seen), "previews": files, "alike": all(w == weights[0] for w in weights)}


def first_stage(folder):
    """A codebook that is revived, a discriminator with normalisation over the batch, a learned variance."""
    options = {"steps": 6, "batch": 8, "lr": 1e-4, "checkpoint_every": 2, "log_every": 1, "preview_every": 0}
    config = stage_config(
        folder / "pictures",
        folder / f"stage{world_size()}",
        {
            "adversarial_weight": 0.5,
            "adversarial_start": 2,
            "discriminator": {"layers": 1, "features": 4},
            "revive_after": 2,
            "learned_logvar": True,
        },
        accumulate=2 // world_size(),
        **options,
    )
    train(AutoencoderTask(config), False, "")


def diffusion_task(folder, out, **values):
    """A UNet and a text tower on the latents of the first stage."""
    stage = folder / "stage1" / "model" / "autoencoder.safetensors"
    config = {
        "data": {"path": str(folder / "pictures"), "size": 16, "heldout": 0.2},
        "autoencoder": str(stage),
        "unet": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [],  # in the middle only: DTensor takes long for each new list of weights
            "context_dim": 8,
            "num_heads": 2,
            "norm_groups": 4,
            "dropout": 0.1,
            "sample_size": 8,
        },
        "text": {"width": 8, "layers": 1, "heads": 2},
        "preview": {"steps": 2},
        "caption_dropout": 0.3,
        "run": {
            "out": str(folder / out),
            "steps": 4,
            "batch": 8,
            "accumulate": PARTS // world_size(),
            "warmup": 0,
            "lr": 1e-4,
            "device": "cpu",
            "checkpoint_every": 2,
            **values,
        },
    }
    return DiffusionTask(from_dict(DiffusionTaskConfig, config))


def diffusion(folder):
    """Two processes compute activations twice."""
    options = {"activation_checkpointing": world_size() == 2}
    train(diffusion_task(folder, f"diffusion{world_size()}", **options), False, "")


def in_pieces(folder):
    train(diffusion_task(folder, "pieces", parallel="fsdp", activation_checkpointing=True), False, "")
    if rank() == 0:
        for name in ("pieces2", "pieces1"):  # as if it had been stopped after step 2
            shutil.copytree(folder / "pieces", folder / name)
            shutil.rmtree(folder / name / "states" / "step-00000004")
            shutil.rmtree(folder / name / "model")


def bfloat16(folder):
    """In pieces in two processes, and as ever in one."""
    values = {"parallel": "fsdp", "precision": "bfloat16", "preview_every": 0}
    train(diffusion_task(folder, f"bfloat16_{world_size()}", **values), False, "")


def in_pieces_resumed(folder):
    train(diffusion_task(folder, f"pieces{world_size()}", parallel="fsdp"), True, "")


# --- processes ----------------------------------------------------------------------------------------------


def process(action, folder, number, world, port, pipe):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world}
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, **place}
    os.environ |= {key: str(value) for key, value in told.items()}
    signal.alarm(200)  # on a busy machine
    with launched():
        try:
            end = ["", action(folder)]
        except Exception as error:
            end = [type(error).__name__, str(error)]
        with os.fdopen(pipe, "w") as file:
            json.dump(end, file)


def job(name, action, folder, world):
    """Fork `world` processes that run `action`, and print how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(world):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            status = 1
            try:
                process(action, folder, number, world, port, writer)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        children.append((child, reader))
    ends = []
    for child, reader in children:
        with os.fdopen(reader) as file:
            told = file.read()
        _, status = os.waitpid(child, 0)
        ends.append(json.loads(told) if told else [f"status {status}", None])
    print(json.dumps([name, ends]), flush=True)


def paint(folder):
    """Ten pictures of a coloured ground with a gradient, no two alike."""
    folder.mkdir()
    for i in range(10):
        colours = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(i))
        picture = torch.lerp(*colours, torch.linspace(0, 1, 16)).expand(3, 16, 16) * 2 - 1
        save_grid(picture[None], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")


def main(folder):
    torch.set_num_threads(1)
    paint(folder / "pictures")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what children would load, each for itself
    importlib.import_module("torch._dynamo")
    for world in (1, 2, 4):
        job(f"equal{world}", equal, folder, world)
    for first, then in ((4, 1), (1, 2)):
        path = folder / f"from{first}to{then}"
        job(f"stopped{first}", stopped, path, first)
        if first == 4:
            job("other_parts", other_parts, path, 2)
        job(f"resumed{then}", resumed, path, then)
    job("killed", killed, folder / "killed", 2)
    job("resumed after kill", resumed, folder / "killed", 2)
    for action in (uneven, differing, nan, no_room, nested, collected, epoch, buffers, watched):
        job(action.__name__, action, folder / action.__name__, 2)
    for world in (1, 2):
        job(f"first_stage{world}", first_stage, folder, world)
        job(f"diffusion{world}", diffusion, folder, world)
        if world == 2:
            job("in_pieces", in_pieces, folder, 2)
            for then in (2, 1):
                job(f"in_pieces_resumed{then}", in_pieces_resumed, folder, then)
        job(f"bfloat16_{world}", bfloat16, folder, world)
        job(f"skipping{world}", skipping, folder / f"skipping{world}", world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
