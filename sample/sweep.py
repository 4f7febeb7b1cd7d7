"""`ldm-sample sweep CONFIG.yaml`: two or three options varied, one labelled grid of pictures and a table.

    command: txt2img
    prompts: [a red apple]
    options: {steps: 20, seed: 7}
    axes:                        columns, rows and, of a third, one grid a value
      guidance: [1, 4, 7.5]
      sampler: [ddim, euler, dpmpp_2m]

Every cell is the command itself with its options, so that its picture carries all that made it and `again`
makes it again. Writes the pictures, `grid-0000.png` (one for each value of the third axis) and `sweep.csv`.
"""

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ldm.config import find_config, load_config
from ldm.weights.io import write_atomically
from sample import commands as command_line
from sample.arguments import sampling_of, weaker_of
from sample.cli import Parser, load_pipeline
from sample.images import output_folder, save_new
from sample.parts import Parts
from sample.pipeline import Pipeline
from sample.recording import POSITIONAL, READING
from sample.txt2img import Repeated

MODEL = ("model", "device", "dtype", "fast_conv", *READING)  # what another model is loaded for
PROMPT = "prompt"  # an axis of this name varies the prompt itself
GAP, TEXT = 4, 14  # pixels: between pictures, and of the labels' letters


@dataclass(frozen=True)
class Sweep:
    """A sweep's YAML. files: the picture, and mask, of commands that take them. options: by name without the
    dashes, true for those without a value. axes: one to three, name -> values."""

    prompts: tuple[str, ...] = ()
    command: str = "txt2img"
    files: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.command not in command_line.MAKERS:
            raise ValueError(f"command must be one of {', '.join(command_line.MAKERS)}, got {self.command!r}")
        if not 1 <= len(self.axes) <= 3:
            raise ValueError(f"axes must be one to three options with their values, got {len(self.axes)}")
        for name, values in self.axes.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"axes.{name} must be a list of values, got {values!r}")
        if both := {named(name) for name in self.axes} & {named(name) for name in self.options}:
            raise ValueError(f"{min(both)} is an axis and a fixed option; keep one")
        if PROMPT in self.axes and self.prompts:
            raise ValueError("prompts and an axis prompt exclude each other")
        if {"out", "n"} & {*self.axes, *self.options}:
            raise ValueError("out and n are not for sweeps: a cell is one picture a prompt in --out")


def run(args: argparse.Namespace) -> None:
    """Make all cells, the grids and the table. Raises ValueError and OSError in one line."""
    sweep = read_sweep(args.config)
    out = output_folder(args.out)
    names = list(sweep.axes)
    cells = [dict(zip(names, values, strict=True)) for values in itertools.product(*sweep.axes.values())]
    parsed = [arguments(sweep, cell, out) for cell in cells]  # all, before any work is done
    models = [[getattr(each, name) for name in MODEL] for each in parsed]
    rows: dict[int, dict[str, Any]] = {}
    pictures: dict[int, list[Image.Image]] = {}
    loaded: tuple[Any, Pipeline, Weaker] | None = None
    # Cells of one model after the other, so that each is loaded once
    order = sorted(range(len(cells)), key=lambda i: models.index(models[i]))
    for i in tqdm(order, unit="cell", disable=None):
        if loaded is None or loaded[0] != models[i]:
            loaded = None  # the old model's memory first
            loaded = (models[i], load_pipeline(parsed[i]), Weaker())
            same = [parsed[j] for j in order if models[j] == models[i]]
            warnings = [line for each in same for line in make(sweep.command, each, *loaded[1:], dry=True)[1]]
            for line in dict.fromkeys(warnings):
                print(line, file=sys.stderr)
        begun = time.perf_counter()
        files, _ = make(sweep.command, parsed[i], *loaded[1:])
        seconds = time.perf_counter() - begun
        names_made = " ".join(file.name for file in files)
        rows[i] = {**cells[i], "seconds": f"{seconds:.2f}", "files": names_made}
        pictures[i] = [opened(file) for file in files]
        table = write_table(out / "sweep.csv", [rows[j] for j in sorted(rows)])  # CTRL-C keeps what is done
    print(table)
    for path in write_grids(sweep, [pictures[i] for i in range(len(cells))], out):
        print(path)


class Weaker:
    """The models of `--autoguide` beside one model, each loaded once for all cells."""

    def __init__(self) -> None:
        self.models: dict[str, Parts | None] = {}

    def __call__(self, args: argparse.Namespace) -> Parts | None:
        if args.autoguide is not None and args.autoguide not in self.models:
            self.models[args.autoguide] = weaker_of(args)
        return self.models.get(args.autoguide)


def make(
    command: str, args: argparse.Namespace, pipe: Pipeline, weak: Weaker, dry: bool = False
) -> tuple[list[Path], list[str]]:
    """Run a cell's command without a word: its files, its warnings. dry: only check, before it samples."""
    run = importlib.import_module(f"sample.{command}").run
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        files = run(args, Repeated({}, dry=dry, grid=False, weak=weak), pipe=pipe)
    return files, told.getvalue().splitlines()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def named(option: str) -> str:
    """The name of an option's value: `guidance-rescale` may be written, too."""
    return option.replace("-", "_")


def read_sweep(path: str) -> Sweep:
    """Raises FileNotFoundError or ValueError, in one line, for a file that is no such YAML."""
    try:
        return load_config(Sweep, find_config(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def arguments(sweep: Sweep, cell: dict[str, Any], out: Path) -> argparse.Namespace:
    """The command line of a cell, parsed. Raises ValueError for an option that the command does not have."""
    parser = Quiet(prog="ldm-sample sweep")
    command_line.MAKERS[sweep.command](parser)
    chosen = {**sweep.options, **{name: value for name, value in cell.items() if name != PROMPT}}
    known = vars(parser.parse_args(["x", "x"]))
    places = [name for name in POSITIONAL if name in known]
    if len(sweep.files) != len(places):
        raise ValueError(
            f"{sweep.command} takes {len(places)} files ({', '.join(places) or 'none'}), "
            f"got {len(sweep.files)}"
        )
    line = []
    for name, value in chosen.items():
        option = "--" + name.replace("_", "-")
        if named(name) not in known or named(name) in ("prompts", *places):
            raise ValueError(f"{sweep.command} has no option {option}")
        if isinstance(known[named(name)], bool) and isinstance(value, bool):
            if value is not known[named(name)]:
                line.append(option if value else "--no-" + option.removeprefix("--"))
        elif value is not None:  # null is as if it were not given
            line += [f"{option}={each}" for each in (value if isinstance(value, list) else [value])]
    parsed = parser.parse_intermixed_args([*line, f"--out={out}", *("x" for _ in places), "x"])
    for name, path in zip(places, sweep.files, strict=True):
        setattr(parsed, name, path)
    elsewhere = parsed.prompts_file is not None or parsed.study is not None
    parsed.prompts = [str(cell[PROMPT])] if PROMPT in cell else list(sweep.prompts)
    parsed.prompts = parsed.prompts or ([] if elsewhere else [""])
    parsed.command = sweep.command
    sampling_of(parsed)  # raises for much of what is out of range
    return parsed


class Quiet(Parser):
    """Raises ValueError where a command line would end the program."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


# --- what is written ----------------------------------------------------------------------------------------


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A line a cell: its values, the seconds it took, its files. Written atomically, over an older one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())
    return path


def write_grids(sweep: Sweep, pictures: Sequence[Sequence[Image.Image]], out: Path) -> list[Path]:
    """A grid for each value of the third axis; a cell of several prompts shows its pictures side by side."""
    names = [*sweep.axes, "", ""][:3]
    columns, rows, pages = ([*sweep.axes.get(name, [""])] for name in names)
    cells = [side_by_side(cell) for cell in pictures]
    paths = []
    for page, page_value in enumerate(pages):
        at = [
            [cells[(column * len(rows) + row) * len(pages) + page] for column in range(len(columns))]
            for row in range(len(rows))
        ]
        title = label(names[2], page_value)
        sheet = labelled(at, [label(names[0], v) for v in columns], [label(names[1], v) for v in rows], title)
        text = {"sweep": {"command": sweep.command, "prompts": list(sweep.prompts), "options": sweep.options}}
        text["sweep"]["axes"] = sweep.axes
        paths.append(save_new(sheet, out, "grid-", 4, text))
    return paths


def label(name: str, value: Any) -> str:
    return " ".join(f"{name} {value}".split()) if name else ""  # a line


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(each.width for each in pictures), max(each.height for each in pictures)))
    left = 0
    for each in pictures:
        sheet.paste(each, (left, 0))
        left += each.width
    return sheet


def labelled(
    cells: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str], title: str
) -> Image.Image:
    """Pictures in rows, values of the first axis above the columns, of the second left of the rows."""
    font = ImageFont.load_default(TEXT)
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row)
    width = max(width, *(round(font.getlength(text)) for text in columns))
    left = max(round(font.getlength(text)) for text in rows) + 2 * GAP
    top = (TEXT + 2 * GAP) * (2 if title else 1)
    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font)
    for i, text in enumerate(columns):
        draw.text((left + i * (width + GAP), top - TEXT - GAP), text, "black", font)
    for j, text in enumerate(rows):
        draw.text((GAP, top + j * (height + GAP) + height // 2 - TEXT // 2), text, "black", font)
        for i, cell in enumerate(cells[j]):
            sheet.paste(cell, (left + i * (width + GAP), top + j * (height + GAP)))
    return sheet
