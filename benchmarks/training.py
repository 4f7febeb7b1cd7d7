"""Training beside diffusers: images a second of whole steps, and peak memory.

    python -m benchmarks.training                 13 M parameters, batches of 64 latents of 16x16
    python -m benchmarks.training --compile       with run.compile=true, and diffusers' UNet compiled
    python -m benchmarks.training --size sd15     Stable Diffusion 1.5's UNet, each side alone; not in 24 GiB

Ours is a step of train/loop.py (`move` and the moving average) on a DiffusionTask: from moments of the
autoencoder on disk to new weights. Theirs, written here anew, are the steps of diffusers' text-to-image
training script with its defaults (AdamW and EMAModel without foreach, no worker processes), twice: `end to
end` as the script does it, which reads pictures and runs the autoencoder in each step, and `step only` on
latents in memory. Both sides train a UNet and a text tower of the same sizes, from the same weights, on
made pictures. `difference` is that of the two UNets' outputs for the same inputs, relative in norm. What
encoding the set once costs ours is `prepared_seconds`. `loader` is our step with the networks left out: it
must be several times as fast as the step. `of matmul` is the matrix products' share of the time if they ran
as fast as one large product. Memory is the peak of a process of its own, less what it held before.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Row,
    Timing,
    add_kinds,
    alternate,
    execute,
    in_fresh_process,
    machine,
    make_parser,
    memory_of,
    randomise,
    ratio,
    report,
)
from benchmarks.training_theirs import Script
from ldm.config import to_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.io import save_weights
from train.data import METADATA, DataConfig
from train.ema import EMA
from train.loop import RunConfig, make_optimizer, move
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

BAR, LOADER_BAR = 1.3, 5.0  # times as fast as diffusers end to end; loader against step
# A parameter: weight, gradient, two of the optimiser, average, bfloat16 copies, and what is computed besides
BYTES = 28
OURS, COMPILED = "ours", "ours, compiled"
STEP, END_TO_END, THEIRS_COMPILED = (
    "diffusers, step only",
    "diffusers, end to end",
    "diffusers, step only, compiled",
)
LOADER = "loader"
Step = Callable[[], Any]


class Size(NamedTuple):
    """The networks, and how many pictures are in a batch and in the set."""

    unet: UNetConfig
    text: TextConfig
    autoencoder: AutoencoderConfig
    batch: int
    pictures: int


SIZES = {
    "13m": Size(
        UNetConfig(
            model_channels=72,
            channel_mult=(1, 2, 3),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_heads=4,
            norm_groups=24,
            context_dim=128,
            sample_size=16,
        ),
        TextConfig(width=128, layers=3, heads=4, mlp_width=512),
        AutoencoderConfig(base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8),
        64,
        256,
    ),
    "sd15": Size(UNetConfig(), TextConfig(layers=1), AutoencoderConfig(), 1, 4),
    "tiny": Size(
        UNetConfig(
            model_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_heads=2,
            norm_groups=8,
            context_dim=16,
            sample_size=8,
        ),
        TextConfig(width=16, layers=1, heads=2, mlp_width=32),
        AutoencoderConfig(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
        4,
        8,
    ),
}


def measure(args: argparse.Namespace) -> None:
    """Every side in every number format, one row each."""
    if args.quick:
        args.size, args.precision = "tiny", ["bfloat16"]
    described = machine(args.quick)  # before the load is our own
    size, rows = SIZES[args.size], []
    require_memory(args.size, size)
    sides = [END_TO_END, STEP, OURS, *([COMPILED, THEIRS_COMPILED] if args.compile else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_set(folder, size)
        for precision in args.precision:
            print(f"{args.size}, {precision}", file=sys.stderr)
            rows += measured(args, folder, precision, sides, described["matmul_gflops"])
    columns: dict[str, Callable[[Row], str]] = {
        f"{args.size}, batch {size.batch}": lambda row: row["what"],
        "precision": lambda row: row["precision"],
        "images/s": lambda row: f"{row['images_per_second']:.1f}",
        "times as fast, end to end": lambda row: f"{row['times_end_to_end']:.2f}",
        "times as fast, step only": lambda row: f"{row['times_step_only']:.2f}",
        "of matmul": lambda row: f"{row['of_matmul']:.0%}" if "of_matmul" in row else "-",
        "MiB": lambda row: f"{row['mib']:.0f}" if "mib" in row else "-",
    }
    report(f"training-{args.size}", args, described, rows, columns)
    for row in rows:
        if row["what"] in (OURS, COMPILED):
            print(
                f"{row['what']}, {row['precision']}: {verdict(row['times_end_to_end'], BAR)} end to end, "
                f"{verdict(row['times_step_only'], BAR)} step only",
                file=sys.stderr,
            )
        elif row["what"] == LOADER:
            share = verdict(row["times_the_step"], LOADER_BAR)
            print(f"loader, {row['precision']}: {share} of the step's rate", file=sys.stderr)


def verdict(value: float, bar: float) -> str:
    return f"{value:.2f}x (bar {bar:g}: {'met' if value >= bar else 'missed'})"


def measured(
    args: argparse.Namespace, folder: Path, precision: str, sides: list[str], gflops: float
) -> list[Row]:
    """The rows of one number format: sides in turns in this process, or where they are large each alone."""
    size = SIZES[args.size]
    common: Row = {"size": args.size, "precision": precision, "batch": size.batch}
    memory: dict[str, Row] = {}
    if args.size == "sd15":
        memory = {side: alone_of(args, folder, precision, side, args.rounds) for side in sides}
        timings = {side: Timing(found["seconds"], None, found["cpu"]) for side, found in memory.items()}
        operations = memory[OURS]["operations"]
    else:
        if args.memory:
            chosen = [OURS] if args.quick else sides
            memory = {side: alone_of(args, folder, precision, side, 0) for side in chosen}
        began = time.perf_counter()
        task = DiffusionTask(config_of(folder, args.size, precision))
        assert len(task.data) == size.pictures
        common["prepared_seconds"] = time.perf_counter() - began
        randomise(task.networks)
        common["difference"] = difference(task)
        operations = operations_of(task)
        steps = {side: build(side, task) for side in sides}
        timings = alternate({**steps, LOADER: build(LOADER, task)}, args.rounds, args.warmup)
        with torch.device("meta"):
            common["unet_parameters"] = count(UNet(size.unet))
        common["parameters"] = count(task.networks)
    rows = []
    for side, timing in timings.items():
        row: Row = {"what": side, **common, "images_per_second": size.batch / timing.median}
        row |= {"rounds": timing.seconds, "cpu_rounds": timing.cpu, "operations": operations}
        row["times_end_to_end"] = ratio(timings[END_TO_END], timing)
        row["times_step_only"] = ratio(timings[STEP], timing)
        if side == LOADER:
            row["times_the_step"] = ratio(timings[COMPILED if COMPILED in sides else OURS], timing)
        else:
            row["of_matmul"] = 1e-9 * operations / timing.median / gflops
        if side in memory:
            row["mib"] = memory[side]["peak"] - memory[side]["before"]
        rows.append(row)
    return rows


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def require_memory(name: str, size: Size) -> None:
    """Raises ValueError where training would not fit: half an hour of swapping measures nothing."""
    with torch.device("meta"):
        parameters = count(UNet(size.unet)) + size.text.vocab_size * size.text.width
    info = Path("/proc/meminfo")
    if name != "sd15" or not info.is_file():
        return
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    available, needed = int(line.split()[1]) / 2**20, parameters * BYTES / 2**30
    if available < needed:
        raise ValueError(
            f"training {parameters:,} parameters needs {needed:.0f} GiB, of which {available:.0f} are free"
        )


# --- the set and the task -----------------------------------------------------------------------------------


def make_set(folder: Path, size: Size) -> None:
    """Pictures with captions, and an autoencoder of random weights."""
    rng, side = (
        np.random.default_rng(0),
        size.unet.sample_size * 2 ** (len(size.autoencoder.channel_mult) - 1),
    )
    (folder / "set").mkdir()
    rows = []
    for number in range(size.pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "set" / f"{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "text": "picture {number}", "split": "train"}}\n')
    (folder / "set" / METADATA).write_text("".join(rows))
    torch.manual_seed(0)
    tensors = AutoencoderKL(size.autoencoder).state_dict()
    save_weights(folder / "autoencoder.safetensors", tensors, {"config": to_dict(size.autoencoder)})


def config_of(folder: Path, name: str, precision: str, compiled: bool = False) -> DiffusionTaskConfig:
    size = SIZES[name]
    run = RunConfig(
        out=str(folder / f"run-{precision}"),
        batch=size.batch,
        precision=precision,
        device="cpu",
        compile=compiled,
    )
    pixels = size.unet.sample_size * 2 ** (len(size.autoencoder.channel_mult) - 1)
    return DiffusionTaskConfig(
        data=DataConfig(path=str(folder / "set"), size=pixels),
        run=run,
        autoencoder=str(folder / "autoencoder.safetensors"),
        unet=size.unet,
        text=size.text,
        diffusion=DiffusionConfig(prediction="v"),
    )


def build(side: str, task: DiffusionTask) -> Step:
    """The timed function of a side, on a copy of the task's weights."""
    if side == LOADER:
        return loader(task)
    if side in (OURS, COMPILED):
        return ours(twin(task, side == COMPILED))
    return Script(task, end_to_end=side == END_TO_END, compiled=side == THEIRS_COMPILED)


def twin(task: DiffusionTask, compiled: bool) -> DiffusionTask:
    """Another task of the same weights."""
    run = replace(task.config.run, compile=compiled)
    other = DiffusionTask(replace(task.config, run=run))
    other.networks.load_state_dict(task.networks.state_dict())
    return other


def ours(task: DiffusionTask) -> Step:
    """The loop's step, from the choice of pictures to the moving average."""
    run, player = task.config.run, task.players["model"]
    optimizer, ema = make_optimizer(player, run), EMA(player.parameters, run.ema_decay)
    steps = itertools.count()

    def step() -> float:
        metrics = move("model", player, optimizer, run, next(steps))
        ema.update()
        return metrics["loss"]

    return step


def loader(task: DiffusionTask) -> Step:
    """A step's choice of pictures, latents, noise and captions, with networks that cost nothing."""
    bare = twin(task, compiled=False)
    size = (task.config.run.batch, 77, task.config.unet.context_dim)
    context = torch.zeros(size)
    bare.network = bare.trained = lambda x, t, context: x  # type: ignore[assignment]
    bare.text_encoder = lambda ids: context  # type: ignore[assignment]
    steps = itertools.count()

    def step() -> float:
        with torch.no_grad():
            return float(bare.loss(next(steps), 0)[0])

    return step


def operations_of(task: DiffusionTask) -> int:
    """Of the matrix products and convolutions of a step, both ways: two a product."""
    with FlopCounterMode(display=False) as counter:
        task.loss(0, 0)[0].backward()
    task.networks.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def difference(task: DiffusionTask) -> float:
    """|ours - theirs| / |theirs| of the UNets' outputs for the inputs of our first batch, in float32."""
    from benchmarks import theirs

    seen: list[tuple[Any, Any, Tensor]] = []

    def note(_: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
        seen.append((inputs, named, output))

    hook = task.unet.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        task.loss(0, 0)
        hook.remove()
        (x, t), named, output = seen[0]
        expected = theirs.predict(theirs.unet(task.unet), x, t, named["context"])
    return float((output - expected).norm() / expected.norm())


# --- a side by itself ---------------------------------------------------------------------------------------


def alone_of(args: argparse.Namespace, folder: Path, precision: str, side: str, rounds: int) -> Row:
    """`alone` in a process of its own."""
    arguments = {"side": side, "size": args.size, "precision": precision, "folder": str(folder)}
    return in_fresh_process(
        "benchmarks.training", "alone", **arguments, rounds=rounds, threads=torch.get_num_threads()
    )


def alone(side: str, size: str, precision: str, folder: str, rounds: int, threads: int) -> Row:
    """MiB before building one side and at the peak of two steps; then the seconds of `rounds` more steps."""
    from benchmarks import theirs  # noqa: F401  its imports are no cost of a side

    torch.set_num_threads(threads)
    kept: list[Any] = []

    def start() -> Step:
        task = DiffusionTask(config_of(Path(folder), size, precision, side == COMPILED))
        _ = task.data  # encoded
        if side in (OURS, COMPILED):
            kept.extend([ours(task), task])
        else:
            kept.append(build(side, task))
            task.networks.to("meta")  # it has copies
            if side == END_TO_END:
                task.autoencoder.to("meta")
        return kept[0]

    found: Row = memory_of(start)
    if not rounds:
        return found
    timing = alternate({side: kept[0]}, rounds, 0)[side]
    found |= {"seconds": timing.seconds, "cpu": timing.cpu}
    if side == OURS:
        found["operations"] = operations_of(kept[1])
    return found


def options() -> argparse.ArgumentParser:
    parser = make_parser("training", "Training steps beside diffusers' script.", rounds=5)
    parser.add_argument("--size", default="13m", choices=["13m", "sd15"], help="which networks (%(default)s)")
    add_kinds(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
