"""`ldm-train personalise CONFIG`: textual inversion, DreamBooth and LoRA side by side, on one subject.

Every arm learns the same few pictures with the same budget, counted in pictures of the subject that it sees,
with several seeds; a run is `OUT/ARM/seed-S`, by the loop of `ldm-train`. Then all models are asked the same
(`judging.py`): how like the subject their pictures are, and what became of the rest. A study that was
stopped goes on where it was.
"""

import argparse
import shlex
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.config import find_config, from_dict, load_config
from ldm.weights.io import write_atomically
from train.ablate import TASKS, Run, check_unchanged, complete, read_log
from train.ablation_table import Arm, Result, csv_text, figure, read_json
from train.judging import JUDGED, Asked, Judge, judged
from train.loop import Interrupted
from train.statistics import MOST, estimate

WAYS = ("textual-inversion", "dreambooth", "lora")
BASE = "base"
OURS = ("run.out", "run.seed", "run.steps", "data.path", "model")  # set by the study
MEANING = """\
Mean over the seeds ± half of its 95 % confidence interval (Student's t). similarity: mean cosine of features
between pictures drawn of the subject's name, with seeds and prompts not seen in training, and {likeness};
rise: over the base, which is asked for the class instead. fidelity: share of pictures of
other known captions that show them. drift: 1 - cosine between pictures of the class's prompts, equal seeds,
of the base and of the trained model. parameters: those that are trained. s: wall clock of all steps, by the
median speed of the log. file: what is written for sampling."""

LEARNED = "the pictures that were learned"
PAIRED = "the learned picture of the same thing"
UNLEARNED = " unlearned: the same of things of which no picture was learned, with theirs in the same style."


@dataclass(frozen=True)
class Study:
    """The YAML. pictures: the folder of the subject; noun: of its class. images: the budget, pictures of the
    subject that each run sees. common: overrides for all arms. arms: name -> {task, config, overrides}.
    """

    pictures: str
    noun: str
    arms: dict[str, Any]
    evaluate: Asked
    model: str = "emoji"
    images: int = 1200
    common: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not 1 <= len(self.seeds) <= MOST or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be 1 to {MOST} different numbers, got {list(self.seeds)}")
        if not self.arms or BASE in self.arms:
            raise ValueError(f"arms: at least one, and none is called {BASE!r}, got {list(self.arms)}")


@dataclass(frozen=True)
class Method:
    """One arm of a study."""

    task: str
    config: str
    overrides: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.task not in WAYS:
            raise ValueError(f"task must be one of {', '.join(WAYS)}, got {self.task!r}")


def personalise(args: argparse.Namespace) -> int:
    """The command: run what is missing, write the table after each run; returns the exit status.

    Raises ValueError and OSError in one line.
    """
    study = load_config(Study, find_config(args.config), args.overrides)
    out = Path(args.out or Path("runs/personalise") / Path(args.config).stem)
    runs = plan(study, out)
    for run in runs:
        check_unchanged(run)
    command = shlex.join(["ldm-train", "personalise", args.config, *args.overrides])
    if args.out:
        command += f" --out {shlex.quote(str(args.out))}"
    column = runs[0].config.data.caption_column
    judge = Judge(study.model, study.pictures, study.noun, study.evaluate, column)
    if not args.table_only and not judged(out / BASE, study.evaluate):
        judge.base(out / BASE)
    for number, run in enumerate([] if args.table_only else runs, start=1):
        print(f"{run.arm}, seed {run.seed} ({number} of {len(runs)})", file=sys.stderr)
        try:
            complete(run, None, command)
        except Interrupted as stop:
            at = str(stop).split(";")[0]
            print(f"{run.arm}, seed {run.seed}: {at}; go on with: {command}", file=sys.stderr)
            return 128 + stop.signum
        if not judged(run.folder, study.evaluate):
            judge.trained(run.folder, run.config)
        report(study, runs, out, judge.extractor.title, Path(args.config).stem, command)
    table = report(study, runs, out, judge.extractor.title, Path(args.config).stem, command)
    if not table:
        raise ValueError(f"{out} holds no finished run of this study; leave --table-only out to make them")
    print(table, end="")
    print(out / "table.md")
    return 0


def plan(study: Study, out: Path) -> list[Run]:
    """All runs, seed by seed, so that a study stopped early has compared all arms.

    Raises ValueError for an arm of another form, and overrides of what the study sets itself.
    """
    runs = []
    for seed in study.seeds:
        for arm, given in study.arms.items():
            method = from_dict(Method, given, f"arms.{arm}")
            changes = [*study.common, *method.overrides]
            if ours := [change for change in changes if change.partition("=")[0].strip() in OURS]:
                raise ValueError(f"arms.{arm}: {ours[0]}: the study sets {', '.join(OURS)} itself")
            where = [f"run.out={out / arm / f'seed-{seed}'}", f"data.path={study.pictures}"]
            config: Any = load_config(TASKS[method.task][0], find_config(method.config), [*changes, *where])
            steps = max(1, study.images // config.run.batch)
            config = replace(config, model=study.model, run=replace(config.run, seed=seed, steps=steps))
            runs.append(Run(arm, seed, config))
    return runs


# --- the report ---------------------------------------------------------------------------------------------


def report(study: Study, runs: list[Run], out: Path, features: str, name: str, command: str) -> str:
    """Write `table.md`, `runs.csv` and `figure.svg` of what is finished; returns the table.

    features: what they are, for the reader.
    """
    base, arms = results(study, runs, out)
    if base is None or not any(arm.results for arm in arms):
        return ""
    arms, metrics = [arm for arm in arms if arm.results], list(base)
    title = f"Ways to personalise: {name}"
    table = markdown(base, arms, file_sizes(study, runs))
    meaning = MEANING.format(likeness=PAIRED if study.evaluate.references else LEARNED)
    meaning = textwrap.fill(meaning + (UNLEARNED if study.evaluate.unlearned else ""), 110)
    page = f"# {title}\n\n`{command}`\n\n{table}\n{meaning} Features: {features}.\n\n![figure](figure.svg)\n"
    write_atomically(out / "table.md", page)
    rows = [
        {"arm": arm.name, "seed": seed, **result.metrics, "seconds": result.seconds}
        for arm in arms
        for seed, result in arm.results.items()
    ]
    write_atomically(out / "runs.csv", csv_text(rows))
    shown = [Arm(BASE, "", {0: Result(base, 0)}), *arms]
    write_atomically(out / "figure.svg", figure(title, shown, metrics))
    return table


def results(study: Study, runs: list[Run], out: Path) -> tuple[dict[str, float] | None, list[Arm]]:
    """The base's values, None where it was not asked, and the finished runs by arm."""
    asked, arms = study.evaluate, {name: Arm(name, "") for name in study.arms}
    if not judged(out / BASE, asked):
        return None, []
    for run in runs:
        if run.done and judged(run.folder, asked):
            rates, cost = read_log(run.folder / "log.jsonl")[1], read_json(run.folder / "trained.json")
            speed = sorted(rates)[len(rates) // 2] if rates else None
            seconds = run.config.run.steps * run.config.run.batch / speed if speed else None
            values = read_json(run.folder / JUDGED)["values"]
            arms[run.arm].results[run.seed] = Result(values, cost["parameters"], seconds)
    return read_json(out / BASE / JUDGED)["values"], list(arms.values())


def file_sizes(study: Study, runs: list[Run]) -> dict[str, int]:
    """By arm the bytes that a finished run of it wrote for sampling."""
    return {
        run.arm: sum(file.stat().st_size for file in (run.folder / "model").rglob("*") if file.is_file())
        for run in runs
        if run.done
    }


def markdown(base: dict[str, float], arms: list[Arm], sizes: dict[str, int]) -> str:
    metrics = list(base)
    heads = ["similarity", "rise", *(metric for metric in metrics if metric != "similarity")]
    rows = [["arm", "seeds", *heads, "parameters", "s", "file"]]
    first = [f"{base[metric]:.3f}" if metric in base else "" for metric in heads]
    rows.append([f"{BASE} (asked for the class)", "", *first, "0", "", ""])
    for arm in arms:
        cells = []
        for metric in heads:
            if metric == "rise":
                rise = estimate([*arm.values("similarity").values()]).mean - base["similarity"]
                share = f" ({rise / base['similarity']:+.0%})" if base["similarity"] > 0 else ""
                cells.append(f"{rise:+.3f}{share}")
            else:
                cells.append(str(estimate([*arm.values(metric).values()])))
        known = [result.seconds for result in arm.results.values() if result.seconds is not None]
        seconds = f"{estimate(known).mean:.0f}" if known else ""
        parameters = f"{next(iter(arm.results.values())).parameters:,}"
        rows.append(
            [arm.name, str(len(arm.results)), *cells, parameters, seconds, f"{sizes[arm.name] / 1e3:,.0f} kB"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
