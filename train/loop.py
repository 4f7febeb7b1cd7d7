"""The training loop, open from the top to the bottom, in the order things happen.

A task (`tasks/`) brings the players (a set of parameters and its loss: one for a diffusion model, two for
an autoencoder with a discriminator), a validation, a preview and what to export; the loop owns steps,
optimisers, the moving average, checkpoints, resuming and reporting. Randomness is a function of (seed,
step): a resumed run equals an uninterrupted one bit for bit, also where steps were skipped.
"""

import math
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.config import differences, from_dict, to_dict, to_yaml
from ldm.device import DTYPES, pick_device
from ldm.seeding import derive
from ldm.weights.io import load_strict, write_atomically
from train.ema import EMA
from train.report import Reporter
from train.state import (
    PATTERN,
    held,
    load_newest_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
    sweep,
)

# What a run's folder may hold before its first state, hidden files aside; anything else is somebody's.
OWN = {"config.yaml", "log.jsonl", "states", "previews", "cache", "tensorboard", "report.html"}


@dataclass(frozen=True)
class RunConfig:
    """How to train, whatever is trained.

    out: the run folder. steps: optimiser steps.
    batch: images a step; it is split into `accumulate` equal parts.
    lr: peak learning rate, reached after `warmup` steps, then "constant" or "cosine" to zero.
    clip: largest norm of the gradient.
    precision: of the forward pass (autocast); weights and optimiser stay float32.
    log_every, validate_every, preview_every, checkpoint_every: in steps; 0 is never (the last step does all).
    keep: how many states stay on disk.
    on_nonfinite: a step whose loss or gradient is NaN or infinite "stop"s the run, or it is "skip"ped: it is
    logged, and weights, moving average and optimiser stay as they were; more than `max_skips` in a row stop
    the run. max_gradient: a larger norm of the gradient counts as such a step too; 0 is no limit.
    tensorboard: write the log for TensorBoard as well, into the run folder.
    """

    out: str
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 100
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.9999
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    log_every: int = 50
    validate_every: int = 1000
    preview_every: int = 1000
    checkpoint_every: int = 500
    keep: int = 2
    on_nonfinite: str = "stop"
    max_skips: int = 10
    max_gradient: float = 0.0
    tensorboard: bool = False

    # May change at --resume: they say how a run is watched and what becomes of a bad step, nothing else.
    FREE = (
        "run.out",
        "run.log_every",
        "run.validate_every",
        "run.preview_every",
        "run.checkpoint_every",
        "run.keep",
        "run.device",
        "run.on_nonfinite",
        "run.max_skips",
        "run.max_gradient",
        "run.tensorboard",
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.accumulate < 1 or self.keep < 1:
            raise ValueError(
                f"run.steps {self.steps}, run.batch {self.batch}, run.accumulate {self.accumulate} "
                f"and run.keep {self.keep} must be at least 1"
            )
        if self.batch % self.accumulate:
            raise ValueError(f"run.batch {self.batch} must be a multiple of run.accumulate {self.accumulate}")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"run.lr_schedule must be 'constant' or 'cosine', got {self.lr_schedule!r}")
        if self.precision not in ("float32", "bfloat16"):  # float16 would need its gradients scaled
            raise ValueError(f"run.precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if not self.lr > 0 or not self.clip > 0:
            raise ValueError(f"run.lr {self.lr} and run.clip {self.clip} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"run.betas must be two numbers in [0, 1), got {self.betas}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"run.on_nonfinite must be 'stop' or 'skip', got {self.on_nonfinite!r}")
        if self.max_skips < 1 or not self.max_gradient >= 0:
            raise ValueError(
                f"run.max_skips {self.max_skips} must be at least 1, and run.max_gradient "
                f"{self.max_gradient} at least 0 (no limit)"
            )


@dataclass
class Player:
    """Parameters that one optimiser moves, and their loss.

    loss: `(step, part) -> (scalar, metrics)` of one part of the batch; steps are counted from 0.
    averaged: whether the weights have a moving average. starts_at: the first step in which they move.
    """

    module: nn.Module
    loss: Callable[[int, int], tuple[Tensor, dict[str, float]]]
    averaged: bool = True
    starts_at: int = 0
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}


@runtime_checkable
class Task(Protocol):
    """What the loop needs of a task; see `tasks/diffusion.py` for the plainest one."""

    config: Any

    @property
    def players(self) -> Mapping[str, Player]: ...
    def validate(self) -> dict[str, float]: ...
    def preview(self, path: Path) -> None: ...
    def export(self, folder: Path) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. `signum` says by which signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class BadStep(Exception):
    """The loss or the gradient of a step is not finite, or too large; nothing has moved."""


def learning_rate(run: RunConfig, step: int) -> float:
    """Linear warm-up over `run.warmup` steps, then constant or half a cosine down to zero at `run.steps`."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    if run.lr_schedule == "constant":
        return run.lr
    done = (step - run.warmup) / max(run.steps - run.warmup, 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * done))


def prepare_folder(config: Any, resume: bool) -> Path:
    """The run folder, which the caller holds, with `config.yaml`; refuses to mix runs."""
    folder = Path(config.run.out)
    if not resume:
        if list((folder / "states").glob(PATTERN)):
            raise ValueError(f"{folder} already holds a run; go on with --resume, or choose another run.out=")
        if (folder / "model").exists():
            raise ValueError(f"{folder} already holds a finished model; choose another run.out=")
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        foreign = sorted(visible - OWN)
        if foreign and not (folder / "config.yaml").exists():
            raise ValueError(
                f"{folder} is not empty and no run folder (it holds {foreign[0]}); choose another run.out="
            )
        write_atomically(folder / "config.yaml", to_yaml(config))
    sweep(folder)
    return folder


def train(task: Task, resume: bool, command: str) -> Path:
    """Train `task` to the end; returns the folder of the exported model.

    Raises Interrupted after SIGINT or SIGTERM (state saved), ValueError for a loss or gradient that is not
    finite, a resume that does not fit or a folder that another process holds, FileNotFoundError where there
    is nothing to resume, OSError where a state cannot be written (the states before it stay).
    """
    folder = Path(task.config.run.out)
    if resume and not (folder / "states").is_dir():
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {folder / 'states'}")
    with held(folder):
        return run_steps(task, resume, command)


def run_steps(task: Task, resume: bool, command: str) -> Path:
    """`train`, in a folder that is this process's alone."""
    run: RunConfig = task.config.run
    folder = prepare_folder(task.config, resume)
    optimizers = {name: make_optimizer(player, run) for name, player in task.players.items()}
    averaged = {name: player for name, player in task.players.items() if player.averaged}
    emas = {name: EMA(player.parameters, run.ema_decay) for name, player in averaged.items()}
    skips = dict.fromkeys(task.players, 0)  # in a row, of each player
    first, sums, notes = restore(task, optimizers, emas, skips, folder) if resume else (0, {}, [])
    reporter = Reporter(folder, run.steps, first, run.batch, sums, run.tensorboard)
    with closing(reporter) as report, StopSignals() as stop:
        for note in notes:
            report.say(note)
        for step in range(first, run.steps):
            metrics: dict[str, float] = {}
            for name, player in task.players.items():
                if step < player.starts_at:
                    continue
                try:
                    with undone_if_bad(task):
                        metrics |= move(name, player, optimizers[name], run, step)
                except BadStep as bad:
                    skips[name] += 1
                    require_skippable(bad, skips[name], run)
                    report.skip(step + 1, str(bad))
                    continue
                skips[name] = 0
                if name in emas:
                    emas[name].update()
            report.step(metrics)

            # The state comes last: a run that goes on from it has the reports of this step behind it.
            done, last = step + 1, step + 1 == run.steps
            if last or due(done, run.log_every):
                report.log(done, lr=learning_rate(run, step))
            if last or due(done, run.validate_every):
                with for_use(task, emas):
                    report.write({"step": done, **task.validate()})
            if last or due(done, run.preview_every):
                with for_use(task, emas):
                    task.preview(folder / "previews" / f"step-{done:08d}.png")
            signum = stop.signum  # read once: a signal after the save waits for the next step
            if last or due(done, run.checkpoint_every) or signum:
                save(task, optimizers, emas, folder, done, report.sums, skips)
            if signum and not last:
                message = f"stopped at step {done} of {run.steps}, saved; go on with: {command} --resume"
                raise Interrupted(signum, message)
    with for_use(task, emas):
        task.export(folder / "model")
    return folder / "model"


def make_optimizer(player: Player, run: RunConfig) -> Optimizer:
    betas, decay = (run.betas[0], run.betas[1]), run.weight_decay
    return torch.optim.AdamW(
        player.parameters.values(), lr=run.lr, betas=betas, weight_decay=decay, fused=True
    )


def move(name: str, player: Player, optimizer: Optimizer, run: RunConfig, step: int) -> dict[str, float]:
    """One optimiser step of one player: gradients of every part of the batch, clipping, update.

    Returns the metrics; those of any player but "model" carry its name in front. Raises BadStep with
    weights and optimiser as they were.
    """
    device = pick_device(run.device)
    metrics: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for part in range(run.accumulate):
        torch.manual_seed(derive(run.seed, "dropout", step, part))
        with torch.autocast(device.type, dtype=DTYPES[run.precision], enabled=run.precision != "float32"):
            loss, values = player.loss(step, part)
        values = {"loss": loss.item(), **values}
        require_sound(f"{name}: the loss", values["loss"], math.inf, step)
        (loss / run.accumulate).backward()
        for key, value in values.items():
            metrics[key] = metrics.get(key, 0.0) + value / run.accumulate
    metrics["gradient"] = nn.utils.clip_grad_norm_(player.parameters.values(), run.clip).item()
    limit = run.max_gradient or math.inf
    require_sound(f"{name}: the norm of the gradient", metrics["gradient"], limit, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run, step)
    optimizer.step()
    return metrics if name == "model" else {f"{name}_{key}": value for key, value in metrics.items()}


def require_sound(what: str, value: float, limit: float, step: int) -> None:
    if not math.isfinite(value):
        raise BadStep(f"{what} is {value} in step {step + 1}")
    if value > limit:
        raise BadStep(f"{what} is {value:.4g} in step {step + 1}, above run.max_gradient {limit:g}")


def require_skippable(bad: BadStep, in_a_row: int, run: RunConfig) -> None:
    if run.on_nonfinite == "skip" and in_a_row <= run.max_skips:
        return
    stop = run.on_nonfinite == "stop"
    way_out = "run.on_nonfinite=skip" if stop else f"a higher run.max_skips (bad step {in_a_row} in a row)"
    raise ValueError(
        f"{bad}; the state saved last is untouched, but goes the same way again: start a new run with a "
        f"lower run.lr or run.clip, or go on with --resume and {way_out}"
    ) from bad


@contextmanager
def undone_if_bad(task: Task) -> Iterator[None]:
    """A bad step leaves the buffers of all players (statistics of a normalisation) as they were, too."""
    buffers = [buffer for player in task.players.values() for buffer in player.module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BadStep:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def for_use(task: Task, emas: Mapping[str, EMA]) -> Iterator[None]:
    """Inside the block the models hold their averaged weights, in evaluation mode and without gradients."""
    modules = [module for player in task.players.values() for module in player.module.modules()]
    modes = [(module, module.training) for module in modules]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for ema in emas.values():
            stack.enter_context(ema.averaged())
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def save(
    task: Task,
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
            tensors |= {f"ema/{name}/{key}": value for key, value in emas[name].shadow.items()}
    updates = {name: ema.updates for name, ema in emas.items()}
    header = {"config": to_dict(task.config), "updates": updates, "sums": sums, "skips": skips}
    try:
        save_state(folder / "states", step, tensors, header, task.config.run.keep)
    except OSError as error:
        told = (
            f"{error.strerror or error}; the state of step {step} is not saved, those before it are whole; "
            "mend that and go on with --resume"
        )
        raise OSError(error.errno, told, str(folder / "states")) from error


def restore(
    task: Task,
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
    changed = "; ".join(line for line in lines if not line.startswith(RunConfig.FREE))
    if changed:
        raise ValueError(f"--resume with changed values: {changed}; restore them or start a new run.out=")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    for name, player in task.players.items():
        load_strict(player.module, part(f"weights/{name}/"), f"the state in {folder}")
        restore_optimizer(optimizers[name], tensors, f"optimizer/{name}")
        if name in emas:
            for key, value in part(f"ema/{name}/").items():
                emas[name].shadow[key].copy_(value)
            emas[name].updates = header["updates"][name]
    skips.update(header.get("skips", {}))
    sums = {name: (total, count) for name, (total, count) in header.get("sums", {}).items()}
    return int(header["step"]), sums, [*notes, f"resumed at step {header['step']}"]


class StopSignals:
    """Inside the block, SIGINT and SIGTERM only set `signum`; the loop saves and stops after its step.

    A second one acts as if this block were not there.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.previous[signum] = signal.signal(signum, self._caught)
        return self

    def _caught(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self.previous[signum])

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


def command_line(task: str, config: str, overrides: list[str]) -> str:
    """The command that started this run, to be shown."""
    return shlex.join(["ldm-train", task, config, *overrides])
