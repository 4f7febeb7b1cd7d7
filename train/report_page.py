"""`ldm-train report RUN...`: the curves and newest previews of one or more runs as one HTML page.

The page is a single file that needs nothing else: curves are SVG (`curves.py`), pictures sit in it as base64,
and it follows the reader's light or dark theme.
"""

import base64
import json
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.weights.io import write_atomically
from train.curves import Run, chart, dash, level_chart, level_of, read_runs
from train.page_style import LIGHT, style

FIRST = ("loss", "validation", "gradient", "lr", "images_per_second")  # the order of charts; then by name


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page of the runs in `folders` to `out`; returns lines on what was odd.

    Raises FileNotFoundError or ValueError, in one line, for what is no run folder or has no log.
    """
    runs = read_runs(folders)
    write_atomically(out, page(runs))
    return [note for run in runs for note in run.notes]


def page(runs: Sequence[Run]) -> str:
    """The whole HTML text."""
    metrics = sorted({metric for run in runs for metric in run.curves}, key=order)
    charts = "".join([*(chart(metric, runs) for metric in metrics), level_chart(runs)])
    names = ", ".join(run.name for run in runs)
    notes = "".join(f"<li>{escape(note)}</li>" for run in runs for note in run.notes)
    sections = [
        f"<header><h1>Training report</h1><p>{escape(names)}</p></header>",
        section("Runs", overview(runs)),
        section(
            "Curves",
            f'{legend(runs)}<div class="charts">{charts}</div>'
            '<p class="note">Faint: as logged. Strong: smoothed by a running Gaussian mean.</p>',
        ),
        section("Newest previews", "".join(preview(index, run) for index, run in enumerate(runs))),
        section("Last values", last_values(runs, metrics)),
        section("Configuration", changed_values(runs)) if len(runs) > 1 else "",
        section("Notes", f"<ul>{notes}</ul>") if notes else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)} - training report</title>\n<style>{style()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body>\n</html>\n"
    )


def order(metric: str) -> tuple[int, str, float]:
    """Sorts the numbers of a log: those of `FIRST` (also as the start of a name), then the others by name;
    those of noise levels by level."""
    place = next((i for i, first in enumerate(FIRST) if metric.startswith(first)), len(FIRST))
    return place, metric.partition("@")[0], level_of(metric) or 0.0


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def swatch(index: int, name: str) -> str:
    """A run's name beside a stroke of its colour."""
    stroke = f'<svg class="swatch" viewBox="0 0 24 8"><polyline class="line" points="0,4 24,4"{dash(index)}/>'
    return f'<span class="run{index % len(LIGHT)}">{stroke}</svg></span> {escape(name)}'


def legend(runs: Sequence[Run]) -> str:
    items = "".join(f"<span>{swatch(index, run.name)}</span>" for index, run in enumerate(runs))
    return f'<p class="legend">{items}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def overview(runs: Sequence[Run]) -> str:
    rows = []
    for index, run in enumerate(runs):
        step = max(points[-1][0] for points in run.curves.values())
        steps, batch = run.config.get("run.steps"), run.config.get("run.batch")
        rate = run.curves.get("images_per_second")
        rows.append(
            [
                swatch(index, run.name),
                f"<code>{escape(str(run.folder))}</code>",
                f"{step:,.0f}" + (f" of {steps:,}" if isinstance(steps, int) else ""),
                f"{step * batch:,.0f}" if isinstance(batch, int) else "?",
                f"{statistics.median(value for _, value in rate):.4g}" if rate else "?",
                f"{run.skipped:,}",
            ]
        )
    return table(["run", "folder", "steps", "images seen", "images/s (median)", "steps skipped"], rows)


def preview(index: int, run: Run) -> str:
    if run.preview is None:
        return ""
    found = re.search(r"(\d+)", run.preview.stem)
    title = swatch(index, run.name) + (f", step {int(found[1]):,}" if found else "")
    data = base64.b64encode(run.preview.read_bytes()).decode()
    alt = f"preview of {escape(run.name)}"
    return (
        f'<figure class="preview"><figcaption>{title}</figcaption>'
        f'<img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
    )


def last_values(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    rows = [
        [escape(metric)]
        + [f"{run.curves[metric][-1][1]:.5g}" if metric in run.curves else "" for run in runs]
        for metric in metrics
    ]
    return table(["value", *heads(runs)], rows)


def changed_values(runs: Sequence[Run]) -> str:
    """The values of config.yaml that are not the same in all runs; the folder always differs."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if key != "run.out"]
    rows = []
    for key in keys:
        values = [told(run.config[key]) if key in run.config else "" for run in runs]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>", *map(cut, values)])
    if not rows:
        return "<p>The runs have the same configuration.</p>"
    return "<p>What differs between the runs.</p>" + table(["key", *heads(runs)], rows)


def heads(runs: Sequence[Run]) -> list[str]:
    return [swatch(index, run.name) for index, run in enumerate(runs)]


def told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str) -> str:
    """A cell for a value that may be long; the whole of it shows when pointed at."""
    if len(text) <= 60:
        return escape(text)
    return f'<span title="{escape(text)}">{escape(text[:60])}…</span>'
