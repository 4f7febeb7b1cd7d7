"""What a notebook of the course must be: its form, its stamp, its figures, its outputs. Runs nothing.

The stamp in a notebook's metadata is a hash of what its outputs follow from: its code cells and the source
files that its closing cell names. Comments, docstrings and blank lines of sources do not count.
"""

import ast
import hashlib
import importlib
import re
import socket
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).parent
ROOT = HERE.parent
PATTERN = "[0-9][0-9]_*.ipynb"
LARGEST = 600_000  # bytes
OPENING = "After this notebook you can"
CLOSING = "## Where the code lives"
EXERCISES = range(3, 7)
FONTS = "Matplotlib is building the font cache"  # which it says on stderr when first used on a slow machine

# `ldm/diffusion/schedule.py`: `Schedule`, `make_betas`
NAMED = re.compile(r"`((?:ldm|sample|train)/[\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)")
EXERCISE = re.compile(r"^### Exercise \d+", re.MULTILINE)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>(.+?)</details>", re.DOTALL)
CODE = re.compile(r"^```python\n(.+?)^```", re.DOTALL | re.MULTILINE)
FOLDERS = "bin|data|home|mnt|opt|private|root|tmp|usr|Users|var|work"
PATHS = re.compile(rf"(?<![\w.:/])/(?:{FOLDERS})/\S*|\b[A-Z]:\\\S*")


def notebooks() -> list[Path]:
    """The notebooks of the course, in order."""
    return sorted(HERE.glob(PATTERN))


def read(path: Path) -> NotebookNode:
    """A notebook of format 4."""
    return nbformat.read(path, as_version=4)


def named(book: NotebookNode) -> dict[str, list[str]]:
    """What the closing cell names: source file -> functions and classes."""
    closing = book.cells[-1].source if book.cells else ""
    return {path: re.findall(r"`([\w.]+)`", names) for path, names in NAMED.findall(closing)}


def without_remarks(source: str) -> str:
    """Source lines that are code: no docstring, no line that is a comment or blank."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not node.body:
            continue
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None:
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def stamp(book: NotebookNode) -> str:
    """The hash of what the outputs follow from. Raises ValueError where a named source is missing."""
    digest = hashlib.sha256()
    for cell in book.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.strip().encode() + b"\0")
    for name in sorted(named(book)):
        if not (ROOT / name).is_file():
            raise ValueError(f"the closing cell names {name}, which does not exist")
        digest.update(without_remarks((ROOT / name).read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()[:16]


def outputs(book: NotebookNode) -> list[Any]:
    """All outputs of all code cells."""
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def figures(book: NotebookNode) -> int:
    """How many PNG figures the outputs hold."""
    return sum("image/png" in output.get("data", {}) for output in outputs(book))


def texts(book: NotebookNode) -> list[str]:
    """The outputs that are text, as a reader sees them."""
    found = [output.get("text", "") for output in outputs(book)]
    for output in outputs(book):
        found += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def exercises(book: NotebookNode) -> list[str]:
    """The markdown cells that set an exercise."""
    return [
        cell.source for cell in book.cells if cell.cell_type == "markdown" and EXERCISE.search(cell.source)
    ]


def solutions(book: NotebookNode) -> list[str]:
    """The Python code in the folded solutions, one string an exercise that has any."""
    folded = ["\n".join(SOLUTION.findall(text)) for text in exercises(book)]
    return ["\n".join(CODE.findall(text)) for text in folded if CODE.search(text)]


def faults_of_form(book: NotebookNode) -> list[str]:
    """What is missing in the notebook's text: opening, exercises with solutions, closing cell, names."""
    found, first, last = [], book.cells[0].source, book.cells[-1].source
    if not first.startswith("# ") or OPENING not in first:
        found.append(f"the first cell is no title with {OPENING!r}")
    if CLOSING not in last or "Papers" not in last or "arXiv" not in last:
        found.append(f"the last cell is no {CLOSING!r} with Papers")
    if not named(book):
        found.append("the last cell names no source as `path.py`: `name`")
    for path, names in named(book).items():
        found += [f"{path} has no {name}" for name in names if not exists(path, name)]
    if len(exercises(book)) not in EXERCISES:
        found.append(f"{len(exercises(book))} exercises, expected 3 to 6")
    found += [
        f"no folded solution: {text.splitlines()[0]}" for text in exercises(book) if not SOLUTION.search(text)
    ]
    if not isinstance(book.metadata.get("course", {}).get("figures"), int):
        found.append("metadata course.figures does not tell how many figures there are")
    return found


def exists(path: str, name: str) -> bool:
    """Whether the module at `path` has `name` (dots: of a class), checked by import."""
    if not (ROOT / path).is_file():
        return False
    found: Any = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def faults_of_outputs(book: NotebookNode) -> list[str]:
    """What is wrong with the outputs: missing figures, errors, warnings, names of this machine."""
    found, wanted = [], book.metadata.get("course", {}).get("figures")
    if figures(book) != wanted:
        found.append(f"{figures(book)} figures, the metadata say {wanted}")
    if any(output.output_type == "error" for output in outputs(book)):
        found.append("a cell ended in an error")
    warned = [output.text for output in outputs(book) if output.get("name") == "stderr"]
    found += [f"a cell wrote to stderr: {text.strip()}" for text in warned if FONTS not in text]
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in book.cells):
        found.append("a cell was not executed")
    host = socket.gethostname()
    for text in texts(book):
        found += [f"an output holds the path {path}" for path in PATHS.findall(text)]
        if len(host) > 3 and re.search(rf"\b{re.escape(host)}\b", text):
            found.append("an output holds the name of this machine")
    return found


def faults(path: Path) -> list[str]:
    """All that is wrong with a committed notebook; nothing where it is in order."""
    book = read(path)
    found = faults_of_form(book) + faults_of_outputs(book)
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size} bytes, at most {LARGEST}")
    try:
        stale = book.metadata.get("course", {}).get("stamp") != stamp(book)
    except ValueError as error:
        return [*found, str(error)]
    return [*found, f"stale: run `python -m notebooks.execute {path.stem[:2]}`"] if stale else found
