"""The training loop, open from the top to the bottom, in the order things happen.

A task (`tasks/`) brings the players (a set of parameters and its loss: one for a diffusion model, two for
an autoencoder with a discriminator), a validation, a preview and what to export; the loop owns steps,
optimisers, the moving average, checkpoints, resuming and reporting. Randomness is a function of (seed,
step): a resumed run equals an uninterrupted one bit for bit, also where steps were skipped. Several processes
(`distributed.py`) share out the parts of a batch; rank 0 alone logs and writes.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.config import differences, to_dict, to_yaml
from ldm.device import DTYPES, pick_device
from ldm.distributed import agreed, first_then_others, highest, is_first, last_words, together, world_size
from ldm.seeding import derive
from ldm.weights.io import write_atomically
from train import distributed, sharded
from train.bad_steps import BadStep, require_skippable, require_sound, undone_if_bad
from train.checkpoint import restore, save
from train.distributed import LOST, own_parts, parts_of
from train.ema import EMA
from train.report import Quiet, Reporter
from train.state import held, states, sweep
from train.stopping import StopSignals

# What a run's folder may hold before its first state, hidden files aside; anything else is somebody's.
OWN = {"config.yaml", "log.jsonl", "states", "previews", "cache", "tensorboard", "report.html"}


@dataclass(frozen=True)
class RunConfig:
    """How to train, whatever is trained.

    out: the run folder. steps: optimiser steps.
    batch: images a step, of all processes together. accumulate: parts that each process computes one by one;
    the batch is split into `accumulate` times the number of processes equal parts. parallel: what several
    processes do, "ddp" (each has all weights) or "fsdp" (each has a piece, `sharded.py`).
    lr: peak learning rate, reached after `warmup` steps, then "constant" or "cosine" to zero.
    clip: largest norm of the gradient.
    precision: of the forward pass (autocast); weights and optimiser stay float32.
    log_every, validate_every, preview_every, checkpoint_every: in steps; 0 is never (the last step does all).
    keep: how many states stay on disk.
    on_nonfinite: a step whose loss or gradient is NaN or infinite "stop"s the run, or it is "skip"ped: it is
    logged, and weights, moving average and optimiser stay as they were; more than `max_skips` in a row stop
    the run. max_gradient: a larger norm of the gradient counts as such a step too; 0 is no limit.
    tensorboard: write the log for TensorBoard as well, into the run folder.
    compile: the blocks of the trained network by torch.compile, which only rounds otherwise (and has dropout
    of its own); takes a C++ compiler on the CPU, and minutes for a large model.
    activation_checkpointing: compute the inside of each block a second time for its gradient, to the bit the
    same, instead of keeping it: less memory, more time (`recompute.py`).
    """

    out: str
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    parallel: str = "ddp"
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
    compile: bool = False
    activation_checkpointing: bool = False

    # May change at --resume: they say how a run is watched and what becomes of a bad step, nothing else.
    FREE = (
        "run.out",
        "run.parallel",
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
        "run.compile",
        "run.activation_checkpointing",
        "validation_levels",
        "data.workers",
        "data.stream",
        "data.cache",
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.accumulate < 1 or self.keep < 1:
            raise ValueError(
                f"run.steps {self.steps}, run.batch {self.batch}, run.accumulate {self.accumulate} "
                f"and run.keep {self.keep} must be at least 1"
            )
        if self.batch % self.accumulate:
            raise ValueError(f"run.batch {self.batch} must be a multiple of run.accumulate {self.accumulate}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"run.parallel must be 'ddp' or 'fsdp', got {self.parallel!r}")
        if self.parallel == "fsdp" and self.compile:
            raise ValueError("run.parallel=fsdp does not go with run.compile=true; set one of them back")
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
    seen: `(step, parts) -> text`, which pictures these parts hold; asked for where a step went bad.
    written: parameters that the loss itself writes to. rates: by the first name of parameters, what their
    learning rate is of the run's; 1 where nothing is said.
    """

    module: nn.Module
    loss: Callable[[int, int], tuple[Tensor, dict[str, float]]]
    averaged: bool = True
    starts_at: int = 0
    seen: Callable[[int, Iterable[int]], str] | None = None
    written: tuple[Tensor, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.find_parameters()

    def find_parameters(self) -> None:
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
        if states(folder / "states"):
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
    distributed.require_same({**to_dict(task.config), "--resume": resume}, differences)
    with together():
        distributed.require_whole_parts(task.config.run.batch, task.config.run.accumulate)
        if resume and not (folder / "states").is_dir():
            raise FileNotFoundError(f"nothing to resume: no checkpoint in {folder / 'states'}")
    with last_words(LOST), ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(held(folder))
        return run_steps(task, resume, command)


def run_steps(task: Task, resume: bool, command: str) -> Path:
    """`train`, in a folder that is this job's alone."""
    run: RunConfig = task.config.run
    folder = Path(run.out)
    with together():
        if is_first():
            prepare_folder(task.config, resume)
    if world_size() > 1:
        first_then_others(getattr(task, "prepare", lambda: None))
        for player in task.players.values():
            distributed.share_weights(player.module)
        if run.parallel == "fsdp":
            sharded.shard_all(task)
    optimizers = {name: make_optimizer(player, run) for name, player in task.players.items()}
    averaged = {name: player for name, player in task.players.items() if player.averaged}
    emas = {name: EMA(player.parameters, run.ema_decay) for name, player in averaged.items()}
    skips = dict.fromkeys(task.players, 0)  # in a row, of each player
    with together():
        first, sums, notes = restore(task, optimizers, emas, skips, folder) if resume else (0, {}, [])
        reporter: Reporter | Quiet = Quiet()
        if is_first():
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
                    with undone_if_bad(written_by(task)):
                        metrics |= move(name, player, optimizers[name], run, step)
                except BadStep as bad:
                    skips[name] += 1
                    with together():
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
                with together(), for_use(task, emas):
                    if takes_part(run):
                        report.write({"step": done, **task.validate()})
            if last or due(done, run.preview_every):
                with together(), for_use(task, emas), distributed.own(folder) as written:
                    if takes_part(run):
                        task.preview(written / "previews" / f"step-{done:08d}.png")
            signum = highest(stop.signum)  # read once: one after the save waits for the next step
            if last or due(done, run.checkpoint_every) or signum:
                with together():
                    if takes_part(run):
                        save(task, optimizers, emas, folder, done, report.sums, skips)
            if signum and not last:
                message = f"stopped at step {done} of {run.steps}, saved; go on with: {command} --resume"
                raise Interrupted(signum, message)
    with together(), for_use(task, emas), distributed.own(folder) as written:
        if takes_part(run):
            task.export(written / "model")
    return folder / "model"


def takes_part(run: RunConfig) -> bool:
    """Whether this process computes what rank 0 writes: weights in pieces are only whole in all together."""
    return is_first() or run.parallel == "fsdp"


def make_optimizer(player: Player, run: RunConfig) -> Optimizer:
    betas, decay = (run.betas[0], run.betas[1]), run.weight_decay
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in player.parameters.items():
        rates.setdefault(player.rates.get(name.split(".")[0], 1.0), []).append(parameter)
    groups = [{"params": parameters, "rate": rate} for rate, parameters in rates.items()]
    return torch.optim.AdamW(groups, lr=run.lr, betas=betas, weight_decay=decay, fused=True)


def move(name: str, player: Player, optimizer: Optimizer, run: RunConfig, step: int) -> dict[str, float]:
    """One optimiser step of one player: gradients of every part of the batch, clipping, update.

    Returns the metrics; those of any player but "model" carry its name in front. Raises BadStep with
    weights and optimiser as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    metrics = distributed.means(gradients(name, player, run, step))
    if not sharded.is_sharded(player.module):  # there each backward pass has done so
        distributed.average_gradients(player.parameters.values())
        distributed.share_buffers(player.module)
    norm = nn.utils.clip_grad_norm_(player.parameters.values(), run.clip)
    metrics["gradient"] = sharded.whole(norm).item()
    limit = run.max_gradient or math.inf
    seen = partial(player.seen, step, range(parts_of(run.accumulate))) if player.seen else None
    require_sound(f"{name}: the norm of the gradient", metrics["gradient"], limit, step, seen)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run, step) * group["rate"]
    optimizer.step()
    return metrics if name == "model" else {f"{name}_{key}": value for key, value in metrics.items()}


def gradients(name: str, player: Player, run: RunConfig, step: int) -> dict[str, float]:
    """Leaves the mean gradient of this process's parts of the batch in the parameters; the mean metrics."""
    device = pick_device(run.device)
    metrics: dict[str, float] = {}
    for part in own_parts(run.accumulate):
        torch.manual_seed(derive(run.seed, "dropout", step, part))
        with torch.autocast(device.type, dtype=DTYPES[run.precision], enabled=run.precision != "float32"):
            loss, values = player.loss(step, part)
        values = {"loss": loss.item(), **values}
        seen = partial(player.seen, step, [part]) if player.seen else None
        with agreed(BadStep):
            require_sound(f"{name}: the loss", values["loss"], math.inf, step, seen)
        (loss / run.accumulate).backward()
        for key, value in values.items():
            metrics[key] = metrics.get(key, 0.0) + value / run.accumulate
    return metrics


def written_by(task: Task) -> list[Tensor]:
    """What the passes of all players write to: buffers (statistics of a normalisation) and `written`."""
    players = task.players.values()
    return [tensor for each in players for tensor in (*each.module.buffers(), *each.written)]


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


def command_line(task: str, config: str, overrides: list[str]) -> str:
    """The command that started this run, to be shown."""
    return shlex.join(["ldm-train", task, config, *overrides])
