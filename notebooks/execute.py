"""Run notebooks from a clean kernel and write their outputs and their stamp into them.

    python -m notebooks.execute            # all; or 01 04: those
    python -m notebooks.execute --check    # run nothing, tell what is stale or missing

Each runs in an empty temporary folder, with as many threads as OMP_NUM_THREADS says. A notebook in which a
cell fails, or whose outputs `checks.py` objects to, is left as it was.
"""

import argparse
import base64
import copy
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from notebooks import checks

CELL_SECONDS = 3600  # the training in notebook 8 takes minutes, and on a busy machine many
BACKEND = "module://matplotlib_inline.backend_inline"


def run(book: NotebookNode, quick: bool = False, solutions: bool = False) -> NotebookNode:
    """A copy of the notebook with the outputs of a clean kernel.

    quick: with LDM_QUICK=1. solutions: run those of the exercises too, in cells at the end.
    Raises ValueError for a cell that fails, with its source and error.
    """
    book = copy.deepcopy(book)
    if solutions:
        book.cells += [nbformat.v4.new_code_cell(code) for code in checks.solutions(book)]
    found = [str(checks.HERE), str(checks.ROOT), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found)), "IPYTHONDIR": folder}
        env |= {"LDM_QUICK": "1" if quick else "0", "MPLBACKEND": BACKEND}
        work = Path(folder) / "work"
        work.mkdir()
        # Sockets in the temporary folder: nothing listens on a port
        sockets = {"transport": "ipc", "connection_file": str(Path(folder) / "kernel.json")}
        client = NotebookClient(
            book,
            config=Config(KernelManager=sockets),
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(work)}},
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            client.execute(env=env)
        except CellExecutionError as error:
            raise ValueError(f"a cell failed: {error}") from error
    for output in checks.outputs(book):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata["language_info"] = {"name": "python"}
    return book


def smaller(png: str) -> str:
    """A PNG in base64 with 256 colours, a third of the bytes."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def write(book: NotebookNode, path: Path) -> None:
    """Write a notebook under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        nbformat.write(book, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refresh(path: Path) -> list[str]:
    """Run a notebook in full and write it with its stamp; where something is wrong, tell it and do not.

    Raises ValueError as `run` and `checks.stamp`.
    """
    book = run(checks.read(path))
    book.metadata.setdefault("course", {})["stamp"] = checks.stamp(book)
    found = checks.faults_of_form(book) + checks.faults_of_outputs(book)
    size = len(nbformat.writes(book).encode())
    if size > checks.LARGEST:
        found.append(f"{size} bytes, at most {checks.LARGEST}")
    if not found:
        write(book, path)
    return found


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks whose file name begins with one of `names`; all where there are none.

    Raises ValueError for a name that no notebook has.
    """
    paths = checks.notebooks()
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths)
            raise ValueError(f"no notebook begins with {name!r}: {known}")
    return [path for path in paths if not names or any(path.name.startswith(name) for name in names)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for bad input and for notebooks that are not in order."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.execute", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="first characters of file names, such as 01; default: all")
    parser.add_argument("--check", action="store_true", help="run nothing, tell what is wrong")
    args = parser.parse_args(argv)
    status = 0
    try:
        for path in chosen(args.names):
            start = time.perf_counter()
            try:
                found = checks.faults(path) if args.check else refresh(path)
            except ValueError as error:
                found = [str(error)]
            if found:
                status = 2
                print("\n".join(f"{path.name}: {fault}" for fault in found), file=sys.stderr)
            else:
                print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size // 1000} kB")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
