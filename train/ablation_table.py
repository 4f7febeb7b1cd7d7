"""What an ablation found: a table in Markdown and CSV, and a figure of its intervals in SVG.

`ablate.py` runs the arms and hands over an `Arm` each. Files are written atomically, over older ones.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from ldm.weights.io import write_atomically
from train.statistics import Estimate, estimate, paired

MEANING = """\
Mean over the seeds ± half of its 95 % confidence interval (Student's t). Δ: mean difference to the baseline
over equal seeds, which share initialisation (where the shapes are equal), order of the data, noise and
timesteps; its interval is of the pairs, and one that holds 0 shows no difference. s/step: wall clock, median
over the intervals of the log, then mean over the seeds. parameters: those that are trained. peak MiB: of a
run on the CPU the resident memory of the whole process at its highest (libraries, data and what earlier
runs left included), on a GPU what tensors took; evaluation not included."""


@dataclass(frozen=True)
class Result:
    """One finished run. seconds: a step; memory: peak in MiB; both None where unknown."""

    metrics: dict[str, float]
    parameters: int
    seconds: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Arm:
    """One arm: in what it differs from the baseline, and its finished runs by seed."""

    name: str
    difference: str
    results: dict[int, Result] = field(default_factory=dict)

    def values(self, metric: str) -> dict[int, float]:
        return {seed: result.metrics[metric] for seed, result in self.results.items()}


def write_report(
    folder: Path, title: str, arms: Sequence[Arm], baseline: str, metrics: Sequence[str], command: str
) -> str:
    """Write `table.md`, `table.csv`, `runs.csv` and `figure.svg`; returns the table in Markdown.

    Arms without a finished run are left out; where there is no run at all, nothing is written.
    """
    arms = [arm for arm in arms if arm.results]
    if not arms:
        return ""
    table = markdown(arms, baseline, metrics)
    page = f"# {title}\n\n`{command}`\n\n{table}\n{MEANING}\n\n![intervals](figure.svg)\n"
    write_atomically(folder / "table.md", page)
    write_atomically(folder / "table.csv", table_csv(arms, baseline, metrics))
    write_atomically(folder / "runs.csv", runs_csv(arms, metrics))
    write_atomically(folder / "figure.svg", figure(title, arms, metrics))
    return table


def baseline_of(arms: Sequence[Arm], name: str) -> Arm:
    """The arm of that name, without runs where it has none yet."""
    return next((arm for arm in arms if arm.name == name), Arm(name, ""))


def difference_to(base: Arm, arm: Arm, metric: str) -> Estimate | None:
    return None if arm.name == base.name else paired(arm.values(metric), base.values(metric))


def mean_cost(arm: Arm, name: str) -> float | None:
    """Mean of `seconds` or `memory` over the runs in which it is known."""
    known = [value for result in arm.results.values() if (value := getattr(result, name)) is not None]
    return statistics.fmean(known) if known else None


def parameters(arm: Arm) -> int:
    return next(iter(arm.results.values())).parameters


def markdown(arms: Sequence[Arm], baseline: str, metrics: Sequence[str]) -> str:
    base = baseline_of(arms, baseline)
    heads = [text for metric in metrics for text in (metric, f"Δ {metric}")]
    rows = [["arm", "difference", "seeds", *heads, "s/step", "parameters", "peak MiB"]]
    for arm in arms:
        row = [arm.name, arm.difference or "(baseline)", str(len(arm.results))]
        for metric in metrics:
            row.append(str(estimate([*arm.values(metric).values()])))
            row.append(shown(difference_to(base, arm, metric)))
        seconds, memory = mean_cost(arm, "seconds"), mean_cost(arm, "memory")
        row.append("" if seconds is None else f"{seconds:.3g}")
        row.append(f"{parameters(arm):,}")
        row.append("" if memory is None else f"{memory:.0f}")
        rows.append(row)
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def shown(value: Estimate | None) -> str:
    return "" if value is None else str(value)


def table_csv(arms: Sequence[Arm], baseline: str, metrics: Sequence[str]) -> str:
    """The same with a column a number; `_half` is half of an interval."""
    base = baseline_of(arms, baseline)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "difference": arm.difference, "seeds": len(arm.results)}
        for metric in metrics:
            for name, value in (
                (metric, estimate([*arm.values(metric).values()])),
                (f"{metric}_difference", difference_to(base, arm, metric)),
            ):
                row |= {name: value and value.mean, f"{name}_half": value and value.half}
        row |= {"seconds_a_step": mean_cost(arm, "seconds"), "parameters": parameters(arm)}
        rows.append({**row, "peak_mib": mean_cost(arm, "memory")})
    return csv_text(rows)


def runs_csv(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """A line a run: its own values."""
    return csv_text(
        {
            "arm": arm.name,
            "seed": seed,
            **{metric: result.metrics[metric] for metric in metrics},
            "seconds_a_step": result.seconds,
            "parameters": result.parameters,
            "peak_mib": result.memory,
        }
        for arm in arms
        for seed, result in arm.results.items()
    )


def csv_text(rows: Iterable[dict[str, Any]]) -> str:
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the figure ---------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 640, 170, 30, 26, 34, 34  # pixels, of a panel
MARGIN = 0.06  # of the range of values, left and right of it


def figure(title: str, arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """A panel a metric: small rings are runs, a dot is their mean, a line its 95 % confidence interval."""
    panel = TOP + ROW * len(arms) + BOTTOM
    height = 30 + panel * len(metrics)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        words(10, 20, title, weight="bold"),
    ]
    for number, metric in enumerate(metrics):
        parts += panel_of(arms, metric, 30 + number * panel)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel_of(arms: Sequence[Arm], metric: str, top: int) -> list[str]:
    """The elements of one metric's panel, whose upper edge is at `top`."""
    estimates = [estimate([*arm.values(metric).values()]) for arm in arms]
    ends = [value for arm in arms for value in arm.values(metric).values()]
    ends += [each.mean + sign * (each.half or 0) for each in estimates for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    pad = MARGIN * (high - low) or 0.5 * abs(high) or 0.5  # all values equal: some room around them
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    first, bottom = top + TOP, top + TOP + ROW * len(arms)
    parts = [words(LEFT, top + 18, metric, weight="bold")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(line(x(value), first, x(value), bottom, "#dddddd"))
        parts.append(words(x(value), bottom + 16, f"{value:.4g}", anchor="middle"))
    for number, (arm, mean) in enumerate(zip(arms, estimates, strict=True)):
        y = first + ROW * (number + 0.5)
        parts.append(words(LEFT - 10, y + 4, arm.name, anchor="end"))
        if mean.half is not None:
            parts.append(line(x(mean.mean - mean.half), y, x(mean.mean + mean.half), y, "#1f5fa8", 2))
        for value in arm.values(metric).values():
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3" fill="none" stroke="#888888"/>')
        parts.append(f'<circle cx="{x(mean.mean):.1f}" cy="{y:.1f}" r="4.5" fill="#1f5fa8"/>')
    return parts


def words(x: float | int, y: float | int, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def line(x1: float, y1: float | int, x2: float, y2: float | int, colour: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'
