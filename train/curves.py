"""What was logged of runs, read from their folders and drawn as curves, for `report_page.py`.

Every number of `log.jsonl` gets a chart, as SVG, with the points as they were logged (faint) and a smoothed
line over them; runs keep one colour throughout. Reads `config.yaml`, `log.jsonl` and `previews/` of a run
folder, also while the run goes on.
"""

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from train.page_style import LIGHT

Point = tuple[float, float]
Points = list[Point]  # (step, value), steps ascending

SMOOTHED_FROM = 8  # points; fewer are joined as they are
DRAWN = 600  # points of a curve at most; of more, the lowest and the highest of each stretch
LOG_RATIO = 30.0  # a positive curve that spans more is drawn on a logarithmic axis, but for
LINEAR = ("lr", "images_per_second")
LEVEL = "validation_error@"  # before the noise level, in the name of a number (see `levels.py`)

DASHES = ("", "7 3", "2 3")  # of runs 1-8, 9-16, 17-24

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 10, 38  # margins


@dataclass(frozen=True)
class Run:
    """What the page shows of one run. config: flat, by dotted key. notes: what was odd, in a line each."""

    name: str
    folder: Path
    curves: dict[str, Points]
    skipped: int
    config: dict[str, Any]
    preview: Path | None
    notes: list[str] = field(default_factory=list)


# --- reading ------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs by the names of their folders; where those are not unique, with as much of the path as is."""
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Raises as `write_report`. A torn line of the log is passed over with a note."""
    config, log = folder / "config.yaml", folder / "log.jsonl"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    if not config.is_file() and not log.is_file():
        raise ValueError(f"{folder} is not a run folder: it has neither config.yaml nor log.jsonl")
    if not log.is_file():
        raise ValueError(f"{folder} has no log.jsonl: the run has logged nothing yet")
    curves, skipped, torn = read_log(log)
    if not curves:
        raise ValueError(f"{log} holds no row with a step and a number: the run has logged nothing yet")
    notes = [f"{log}: {torn} torn line{'s' * (torn > 1)} passed over"] if torn else []
    previews = sorted((folder / "previews").glob("*.png"))
    whole = [path for path in previews if is_png(path)]
    if len(whole) < len(previews):
        notes.append(f"{folder / 'previews'}: {len(previews) - len(whole)} of the files are no PNG")
    return Run(name, folder, curves, skipped, read_config(config), whole[-1] if whole else None, notes)


def read_log(path: Path) -> tuple[dict[str, Points], int, int]:
    """The curve of each number of a log, how many steps were skipped, and how many lines are torn."""
    curves: dict[str, dict[float, float]] = {}
    skipped = torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            torn += 1
            continue
        skipped += "skipped" in row
        for key, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "step" and number and math.isfinite(value):
                curves.setdefault(key, {})[float(row["step"])] = float(value)
    return {key: sorted(points.items()) for key, points in curves.items()}, skipped, torn


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return dict(flat(data)) if isinstance(data, dict) else {}


def flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of each leaf of a nested table."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


# --- curves -------------------------------------------------------------------------------------------------


def smooth(points: Points) -> Points:
    """A running mean with Gaussian weights, whose width is a sixtieth of the curve or the distance of two
    points, whichever is more; at 200 places at most."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    span = steps[-1] - steps[0]
    if span == 0:
        return points
    width = max(span / 60, span / (len(points) - 1))
    places = steps if len(steps) <= 200 else [steps[0] + span * i / 199 for i in range(200)]
    result: Points = []
    for place in places:
        near = range(bisect_left(steps, place - 3 * width), bisect_right(steps, place + 3 * width))
        weights = [math.exp(-0.5 * ((steps[i] - place) / width) ** 2) for i in near]
        total = sum(weight * values[i] for weight, i in zip(weights, near, strict=True))
        result.append((place, total / sum(weights)))
    return result


def thinned(points: Points) -> Points:
    """At most about `DRAWN` points, among them the highest and the lowest of every stretch."""
    if len(points) <= DRAWN:
        return points
    size = math.ceil(2 * len(points) / DRAWN)
    result: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        result.extend(sorted(ends))
    return result


@dataclass(frozen=True)
class Axis:
    """From a value to 0..1; `log`: by its logarithm."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Some five round numbers within the axis."""
        if not self.log:
            size = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(size))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= size)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [index * step for index in range(first, last + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = math.ceil(len(powers) / 6)
        factors = (1, 2, 5) if len(powers) <= 3 else (1, 3) if len(powers) <= 4 else (1,)
        marks = [factor * 10.0**power for power in powers[::every] for factor in factors]
        return [mark for mark in marks if self.low <= mark <= self.high]


def axis_of(values: Sequence[float], may_be_log: bool = True) -> Axis:
    """An axis on which all `values` lie; logarithmic where they are positive and far apart."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        return Axis(low, high, log=True)
    pad = 0.04 * (high - low) or 0.1 * abs(low) or 1.0
    return Axis(low - pad, high + pad)


def chart(metric: str, runs: Sequence[Run]) -> str:
    """The curves of one number of all runs that have it, as an SVG figure."""
    curves = {index: run.curves[metric] for index, run in enumerate(runs) if metric in run.curves}
    last = max(points[-1][0] for points in curves.values())
    y = axis_of([value for points in curves.values() for _, value in points], metric not in LINEAR)
    title = escape(metric.replace("_", " "))
    return drawing(title, f"{metric} by step", curves, runs, Axis(0.0, max(last, 1.0)), y)


def level_chart(runs: Sequence[Run]) -> str:
    """The newest `validation_error@SIGMA` of each run over sigma; nothing where no run has two of them."""
    curves = {}
    for index, run in enumerate(runs):
        named = {level_of(metric): metric for metric in run.curves if metric.startswith(LEVEL)}
        points = sorted((level, run.curves[metric][-1][1]) for level, metric in named.items() if level)
        if len(points) > 1:
            curves[index] = points
    if not curves:
        return ""
    x, y = (axis_of([point[i] for points in curves.values() for point in points]) for i in (0, 1))
    return drawing("newest validation error by noise level", "error by sigma", curves, runs, x, y, "sigma")


def level_of(metric: str) -> float | None:
    """The noise level at the end of a number's name, if there is one."""
    found = re.fullmatch(r".*@(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", metric)
    return float(found[1]) if found else None


def drawing(
    title: str,
    label: str,
    curves: dict[int, Points],
    runs: Sequence[Run],
    x: Axis,
    y: Axis,
    across: str = "step",
) -> str:
    """An SVG figure of the curves of some of the runs, by their index."""

    def place(point: Point) -> Point:
        return LEFT + (WIDTH - LEFT - RIGHT) * x(point[0]), TOP + (HEIGHT - TOP - BOTTOM) * (1 - y(point[1]))

    drawn = [strokes(index, runs[index].name, points, place, across) for index, points in curves.items()]
    title += " <small>(logarithmic)</small>" if y.log else ""
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{grid(x, y, across)}{''.join(drawn)}</svg>"
    )
    return f'<figure class="chart"><figcaption>{title}</figcaption>{svg}</figure>'


def strokes(
    index: int, name: str, points: Points, place: Callable[[Point], Point], across: str = "step"
) -> str:
    """One run's curve: its points, joined, and over steps a smoothed line on top where there are enough."""
    shown, many = thinned(points), across == "step" and len(points) >= SMOOTHED_FROM
    kind = "raw" if many else "line"

    def line(kind: str, of: Points) -> str:
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, of))
        return f'<polyline class="{kind}" points="{places}"{dash(index)}/>'

    parts = [line(kind, shown)]
    for point in shown if len(shown) <= 200 else ():
        a, b = place(point)
        told = f"<title>{escape(name)}, {across} {number(point[0])}: {point[1]:.5g}</title>"
        parts.append(f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="2.5">{told}</circle>')
    if many:
        parts.append(line("line", smooth(points)))
    return f'<g class="run{index % len(LIGHT)}">{"".join(parts)}</g>'


def grid(x: Axis, y: Axis, across: str) -> str:
    """Lines and numbers of both axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks():
        at = TOP + (bottom - TOP) * (1 - y(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{at + 4:.1f}">{value:.4g}</text>')
    for value in x.ticks():
        if value == int(value) or across != "step":
            at = LEFT + (right - LEFT) * x(value)
            parts.append(f'<text class="x" x="{at:.1f}" y="{bottom + 17}">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="x" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 4}">{across}</text>')
    return "".join(parts)


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def dash(index: int) -> str:
    pattern = DASHES[index // len(LIGHT) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""
