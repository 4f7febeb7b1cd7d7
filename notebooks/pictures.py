"""The pictures of the main README, each made by one command of this repository.

    python -m notebooks.pictures               # all; or grid, attention, samplers: those

The commands stand in `COMMANDS`, and in the README beside their pictures. A figure of a notebook is taken
from its committed outputs, which `python -m notebooks.execute` writes. Pictures are kept with 256 colours.
"""

import argparse
import base64
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from notebooks import checks

FOLDER = checks.HERE / "pictures"
LARGEST = 150_000  # bytes
COMMANDS = {
    "grid": 'ldm-sample txt2img "__thing__, noto emoji" "__thing__, fluent 3d emoji" '
    '"__thing__, openmoji emoji" -n 6 --seed 4 --guidance 4 --steps 30 --sampler euler '
    "--wildcards configs/sample/wildcards",
    "attention": 'ldm-sample txt2img "a wine glass, noto emoji" --attention --seed 7 --guidance 4 --steps 20 '
    "--sampler euler",
}
MADE = {"grid": "grid-*.png", "attention": "*-attention.png"}  # the file of each command that is the picture
FIGURES = {"samplers": ("04_samplers", "## Order of convergence")}  # notebook, heading


def figure(notebook: Path, heading: str) -> bytes:
    """The first PNG figure that stands below a heading of a notebook.

    Raises ValueError where there is no such heading, or no figure before the next one.
    """
    reached = False
    for cell in checks.read(notebook).cells:
        if cell.cell_type == "markdown":
            headings = [line for line in cell.source.splitlines() if line.startswith("#")]
            if headings:
                reached = headings[-1] == heading
            continue
        for output in cell.outputs if reached else []:
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output.data["image/png"])
    raise ValueError(f"{notebook.name} has no figure below {heading!r}; python -m notebooks.execute makes it")


def made(name: str) -> bytes:
    """The picture that a command of `COMMANDS` makes, as a PNG. Raises ValueError where the command fails."""
    from sample.__main__ import main

    _, *words = shlex.split(COMMANDS[name])
    with tempfile.TemporaryDirectory() as folder:
        if main([*words, "--device", "cpu", "--out", folder]):
            raise ValueError(f"failed: {COMMANDS[name]}")
        [path] = Path(folder).glob(MADE[name])
        picture = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def make(name: str) -> Path:
    """Make one picture and write it, under a temporary name first. Raises ValueError for one too large."""
    if name in FIGURES:
        notebook, heading = FIGURES[name]
        data = figure(checks.HERE / f"{notebook}.ipynb", heading)
    else:
        data = made(name)
    if len(data) > LARGEST:
        raise ValueError(f"{name}: {len(data)} bytes, at most {LARGEST}")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.png"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for bad input and for what cannot be made."""
    known = [*COMMANDS, *FIGURES]
    parser = argparse.ArgumentParser(prog="python -m notebooks.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)}; default: all")
    names = parser.parse_args(argv).names
    try:
        for name in names:
            if name not in known:
                raise ValueError(f"no picture is called {name!r}: {', '.join(known)}")
        for name in names or known:
            path = make(name)
            print(f"{path.parent.name}/{path.name}: {path.stat().st_size // 1000} kB")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
