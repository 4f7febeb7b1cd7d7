"""`ldm-train ablate CONFIG`: what one choice of a training configuration does, and how sure that is.

A study is a YAML file: a training configuration, some arms (overrides of it) and some seeds. Every pair of
arm and seed is a run of its own, `OUT/ARM/seed-S`, by the loop of `ldm-train`. Whatever is drawn there is a
function of the seed (`ldm/seeding.py`), so runs of one seed share initialisation, order of the data, noise
and timesteps, and arms are compared pair by pair (`statistics.py`). That two arms differ in the named factor
alone is checked before anything runs.

The values of losses cannot be compared between arms whose losses are different things (of eps and v, say).
`evaluation.py` asks finished diffusion models what can be: the error of denoising at fixed noise levels, and
whether pictures show what their captions say (as `ldm-sample evaluate`).
"""

import argparse
import json
import re
import shlex
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config import differences, find_config, from_dict, load_config, to_dict
from ldm.device import pick_device
from train.ablation_table import Arm, Result, read_json, write_json, write_report
from train.evaluation import Evaluation, evaluate
from train.loop import Interrupted, RunConfig, Task, train
from train.plan import plan as dry_run
from train.statistics import MOST
from train.streaming import dry
from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig
from train.tasks.dreambooth import DreamBoothTask, DreamBoothTaskConfig
from train.tasks.lora import LoRATask, LoRATaskConfig
from train.tasks.textual_inversion import TextualInversionTask, TextualInversionTaskConfig

TASKS: dict[str, tuple[type, type]] = {
    "autoencoder": (AutoencoderTaskConfig, AutoencoderTask),
    "diffusion": (DiffusionTaskConfig, DiffusionTask),
    "lora": (LoRATaskConfig, LoRATask),
    "dreambooth": (DreamBoothTaskConfig, DreamBoothTask),
    "textual-inversion": (TextualInversionTaskConfig, TextualInversionTask),
}
OURS = ("run.out", "run.seed")  # set for each run
TRAINED = "trained.json"  # in a run's folder: it is whole
EVALUATED = "evaluated.json"


@dataclass(frozen=True)
class Ablation:
    """A study's YAML.

    task, config: what is trained, and the training configuration. common: overrides of it for all arms.
    factor: the dotted keys that may differ between arms, also a whole section. arms: name -> overrides.
    metrics: names of values in log.jsonl, whose last ones are compared.
    """

    task: str
    config: str
    factor: tuple[str, ...]
    baseline: str
    arms: dict[str, Any]
    common: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[str, ...] = ()
    evaluate: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if len(self.arms) < 2:
            raise ValueError(f"arms: at least two are compared, got {len(self.arms)}")
        for name, changes in self.arms.items():
            if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
                raise ValueError(f"arms: {name!r} is a folder's name too: letters, digits and . _ + - only")
            if not isinstance(changes, list) or not all("=" in str(change) for change in changes):
                raise ValueError(f"arms.{name} must be a list of key=value, got {changes!r}")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms {', '.join(self.arms)}")
        if not 1 <= len(self.seeds) <= MOST or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be 1 to {MOST} different numbers, got {list(self.seeds)}")
        if not self.compared:
            raise ValueError("metrics: at least one is compared; validation_loss or heldout_psnr, say")
        if self.evaluate is not None and self.task != "diffusion":
            raise ValueError(f"evaluate is for diffusion models, not for task {self.task!r}")

    @property
    def compared(self) -> list[str]:
        """All metrics: of the log, then of the evaluation."""
        return [*self.metrics, *(self.evaluate.metrics if self.evaluate else ())]


@dataclass(frozen=True)
class Run:
    """One seed of one arm."""

    arm: str
    seed: int
    config: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)

    @property
    def done(self) -> bool:
        return (self.folder / TRAINED).is_file() and any((self.folder / "model").glob("*"))


def ablate(args: argparse.Namespace) -> int:
    """The command: run what is missing, write the table after each run; returns the exit status.

    Raises ValueError and OSError in one line.
    """
    study = read_study(args.config)
    out = Path(args.out or Path("runs/ablations") / Path(args.config).stem)
    runs = plan(study, args.overrides, out)
    lines = check_factor(study, {run.arm: run.config for run in runs})
    for run in runs:
        check_unchanged(run)
    if args.dry_run:
        print(plans(study, runs, lines, out))
        return 0
    command = shlex.join(["ldm-train", "ablate", args.config, *args.overrides])
    if args.out:
        command += f" --out {shlex.quote(str(args.out))}"
    for number, run in enumerate([] if args.table_only else runs, start=1):
        print(f"{run.arm}, seed {run.seed} ({number} of {len(runs)})", file=sys.stderr)
        try:
            complete(run, study.evaluate, command)
        except Interrupted as stop:
            at = str(stop).split(";")[0]
            print(f"{run.arm}, seed {run.seed}: {at}; go on with: {command}", file=sys.stderr)
            return 128 + stop.signum
        tell(study, runs, lines, out, Path(args.config).stem, command)
    table = tell(study, runs, lines, out, Path(args.config).stem, command)
    if not table:
        raise ValueError(f"{out} holds no finished run of this study; leave --table-only out to make them")
    missing = [f"{run.arm} seed {run.seed}" for run in runs if not ready(run, study.evaluate)]
    if missing:
        print(f"not finished, and not in the table: {', '.join(missing)}", file=sys.stderr)
    print(table, end="")
    print(out / "table.md")
    return 0


def read_study(path: str) -> Ablation:
    """Raises FileNotFoundError or ValueError, in one line, for a file that is no such YAML."""
    try:
        return load_config(Ablation, find_config(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def plan(study: Ablation, overrides: list[str], out: Path) -> list[Run]:
    """All runs, seed by seed, so that a study stopped early has compared all arms.

    Raises ValueError for overrides of what the study sets itself, and as `load_config`.
    """
    changed = [*study.common, *overrides, *(change for arm in study.arms.values() for change in arm)]
    for change in changed:
        if change.partition("=")[0].strip() in OURS:
            raise ValueError(f"{change}: an ablation sets {' and '.join(OURS)} itself; use seeds and --out")
    cls = TASKS[study.task][0]
    # run.out is replaced below, but a training configuration may have no value for it.
    common: Any = load_config(cls, find_config(study.config), [*study.common, *overrides, "run.out=out"])
    configs = {arm: with_changes(common, changes, f"arm {arm}") for arm, changes in study.arms.items()}
    runs = []
    for seed in study.seeds:
        for arm, config in configs.items():
            run = replace(config.run, out=str(out / arm / f"seed-{seed}"), seed=seed)
            runs.append(Run(arm, seed, replace(config, run=run)))
    return runs


def plans(study: Ablation, runs: list[Run], lines: dict[str, str], out: Path) -> str:
    """What the study would take: how each arm differs, and the dry run of its first seed."""
    told = []
    for run in runs[: len(study.arms)]:
        told.append(f"arm {run.arm}: {lines[run.arm] or 'the baseline'}")
        with dry():
            told += [f"  {line}" for line in dry_run(build(run.config)).splitlines()]
    done = sum(ready(run, study.evaluate) for run in runs)
    count = f"{len(runs)} runs ({len(study.arms)} arms, {len(study.seeds)} seeds), {done} of them finished"
    return "\n".join([*told, f"{count}; then table.md, table.csv and figure.svg into {out}"])


def with_changes(config: Any, changes: list[str], source: str) -> Any:
    """`config` with `key=value` overrides. Raises ValueError, which names `source`."""
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist(changes))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error
    return from_dict(type(config), merged(to_dict(config), tree), source)


def merged(values: Any, changes: Any) -> Any:
    """Nested dictionaries, those of `changes` winning."""
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    return values | {key: merged(values.get(key), change) for key, change in changes.items()}


def check_factor(study: Ablation, configs: dict[str, Any]) -> dict[str, str]:
    """How each arm differs from the baseline, in a line; configs: resolved, by arm.

    Raises ValueError where arms differ outside of the factor, not at all, or where a key of it is varied by
    no arm.
    """
    plain = {arm: comparable(config) for arm, config in configs.items()}
    lines = {arm: differences(plain[study.baseline], values) for arm, values in plain.items()}
    varied = set()
    for arm, changes in lines.items():
        for change in changes:
            key = change.partition(": ")[0]
            named = [factor for factor in study.factor if key == factor or key.startswith(f"{factor}.")]
            if not named:
                factor = ", ".join(study.factor)
                raise ValueError(f"arm {arm} differs from {study.baseline} in more than {factor}: {change}")
            varied.update(named)
    if idle := [factor for factor in study.factor if factor not in varied]:
        raise ValueError(f"factor {idle[0]}: no arm differs from {study.baseline} in it")
    arms = list(plain)
    for number, arm in enumerate(arms):
        for other in arms[:number]:
            if plain[arm] == plain[other]:
                raise ValueError(f"arms {other} and {arm} are the same configuration")
    return {arm: "; ".join(changes) for arm, changes in lines.items()}


def comparable(config: Any) -> dict[str, Any]:
    """A resolved configuration as plain data, without what the study sets for each run."""
    values = to_dict(config)
    for key in OURS:
        del values["run"][key.removeprefix("run.")]
    return values


def check_unchanged(run: Run) -> None:
    """Raises ValueError where the run's folder holds one of another configuration."""
    path = run.folder / "config.yaml"
    if not path.is_file() or not (
        (run.folder / TRAINED).is_file() or list((run.folder / "states").glob("*"))
    ):
        return  # nothing there that would be lost
    before = from_dict(type(run.config), yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    lines = differences(to_dict(before), to_dict(run.config))
    changed = "; ".join(line for line in lines if not line.startswith(RunConfig.FREE))
    if changed:
        raise ValueError(
            f"{run.folder} holds a run of another configuration: {changed}; remove it, or use another --out"
        )


def tell(study: Ablation, runs: list[Run], lines: dict[str, str], out: Path, name: str, command: str) -> str:
    """Write table and figure of the runs that are ready; returns the table."""
    results: dict[str, dict[int, Result]] = {arm: {} for arm in study.arms}
    for run in runs:
        if ready(run, study.evaluate):
            results[run.arm][run.seed] = result_of(run, study)
    arms = [Arm(arm, lines[arm], found) for arm, found in results.items()]
    return write_report(out, f"Ablation: {name}", arms, study.baseline, study.compared, command)


# --- one run ------------------------------------------------------------------------------------------------


def complete(run: Run, evaluation: Evaluation | None, command: str) -> None:
    """Train where that is not done, going on from the newest state if there is one; evaluate likewise."""
    if not run.done:
        device = pick_device(run.config.run.device)
        measured = reset_peak(device)
        task = build(run.config)
        resume = any((run.folder / "states").glob("*.safetensors"))
        train(task, resume, command)
        count = sum(p.numel() for player in task.players.values() for p in player.parameters.values())
        cost = {"parameters": count, "peak_mib": peak_mib(device) if measured else None}
        write_json(run.folder / TRAINED, cost)
    if evaluation is not None and not ready(run, evaluation):
        values = evaluate(run.folder, run.config, evaluation)
        write_json(run.folder / EVALUATED, {"settings": to_dict(evaluation), "values": values})


def build(config: Any) -> Task:
    return next(task(config) for of, task in TASKS.values() if type(config) is of)


def ready(run: Run, evaluation: Evaluation | None) -> bool:
    """Whether the run is trained and, where that is asked, evaluated with these settings."""
    if not run.done or evaluation is None:
        return run.done
    path = run.folder / EVALUATED
    return path.is_file() and read_json(path)["settings"] == to_dict(evaluation)


def result_of(run: Run, study: Ablation) -> Result:
    """What a run that is ready found. Raises ValueError for a metric that its log does not hold."""
    metrics, rates = read_log(run.folder / "log.jsonl")
    if study.evaluate is not None:
        metrics |= read_json(run.folder / EVALUATED)["values"]
    for name in study.compared:
        if not isinstance(metrics.get(name), int | float):
            known = ", ".join(name for name in metrics if name not in ("step", "lr", "images_per_second"))
            raise ValueError(f"metrics: {name!r} is not in {run.folder / 'log.jsonl'}, which has {known}")
    cost = read_json(run.folder / TRAINED)
    seconds = run.config.run.batch / statistics.median(rates) if rates else None
    chosen = {name: float(metrics[name]) for name in study.compared}
    return Result(chosen, cost["parameters"], seconds, cost["peak_mib"])


def read_log(path: Path) -> tuple[dict[str, Any], list[float]]:
    """The last value of each name, and all images per second."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rates = [rate for row in rows if (rate := row.get("images_per_second"))]
    return {name: value for row in rows for name, value in row.items()}, rates


def reset_peak(device: torch.device) -> bool:
    """Forget how much memory was needed so far; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # of Linux: resets VmHWM
        return True
    return False


def peak_mib(device: torch.device) -> float | None:
    """The most memory since `reset_peak`: of tensors on a GPU, of the resident process else (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) / 1024
    return None
