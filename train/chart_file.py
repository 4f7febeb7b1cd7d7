"""`ldm-train report RUN... --chart NAME,NAME --out FILE.svg`: numbers of runs over steps, as one picture.

For pages that cannot hold the whole report (`report_page.py`), such as a README: one SVG file with its own
colours, light or dark as the reader's, and the curves' names above them.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from ldm.weights.io import write_atomically
from train.curves import HEIGHT, LEFT, WIDTH, Axis, Run, axis_of, drawing, read_runs
from train.page_style import LIGHT, style

LINE = 18  # height of a name above the curves


def write_chart(folders: Sequence[Path], metrics: Sequence[str], out: Path) -> list[str]:
    """Write the chart of `metrics`, all on one axis, to `out`; returns lines on what was odd.

    Raises FileNotFoundError or ValueError, in one line, for what is no run folder, and for a number that no
    run has logged.
    """
    if out.suffix != ".svg":
        raise ValueError(f"--out {out}: a chart is an SVG, give a name that ends in .svg")
    runs = read_runs(folders)
    write_atomically(out, picture(runs, metrics))
    return [note for run in runs for note in run.notes]


def picture(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """The SVG text."""
    known = sorted({metric for run in runs for metric in run.curves})
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"--chart {metric}: no run has logged it; {meant}logged are {', '.join(known)}")
    shown = [
        replace(run, name=name_of(run, metric, len(runs)), curves={metric: run.curves[metric]})
        for run in runs
        for metric in metrics
        if metric in run.curves
    ]
    curves = {index: next(iter(each.curves.values())) for index, each in enumerate(shown)}
    last = max(points[-1][0] for points in curves.values())
    y = axis_of([value for points in curves.values() for _, value in points])
    label = f"{', '.join(metrics)} by step"
    body = drawing("", label, curves, shown, Axis(0.0, max(last, 1.0)), y)
    inner = body[body.index(">", body.index("<svg")) + 1 : body.index("</svg>")]
    top = LINE * len(shown) + 6
    names = "".join(
        f'<text class="run{index % len(LIGHT)} name" x="{LEFT}" y="{LINE * (index + 1)}">'
        f"{escape(each.name.replace('_', ' '))}</text>"
        for index, each in enumerate(shown)
    )
    own = "text.name{fill:currentColor;font-weight:600}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + top}" role="img" '
        f'aria-label="{escape(label)}"><style>{style()}{own}</style>'
        f'<rect width="100%" height="100%" fill="var(--page)"/>{names}'
        f'<g transform="translate(0 {top})">{inner}</g></svg>\n'
    )


def name_of(run: Run, metric: str, runs: int) -> str:
    return metric if runs == 1 else f"{run.name}: {metric}"
