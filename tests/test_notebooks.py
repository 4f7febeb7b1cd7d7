"""The course's notebooks run from a clean kernel, are in form, and their committed outputs are those of the code."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where the package `notebooks` is

from notebooks import checks, execute  # noqa: E402

NOTEBOOKS = checks.notebooks()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_in_order(path: Path) -> None:
    assert checks.faults(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_reduced_time_with_the_solutions(path: Path) -> None:
    """The same cells from a clean kernel, then the solutions of the exercises."""
    book = execute.run(checks.read(path), quick=True, solutions=True)
    own = len(checks.read(path).cells)
    assert len(book.cells) > own, "no solution has code"
    book.cells = book.cells[:own]  # figures of solutions do not count
    assert checks.faults_of_outputs(book) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_no_model_of_its_own(path: Path) -> None:
    code = "\n".join(cell.source for cell in checks.read(path).cells if cell.cell_type == "code")
    assert not re.search(r"\bnn\.Module\b|\bclass \w+|\bnn\.\w+\(", code)


def test_readme_lists_each_notebook() -> None:
    """Those that exist, and no other as if it did."""
    text = (checks.HERE / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text))
    assert linked == {path.name for path in NOTEBOOKS}


# --- the machinery ------------------------------------------------------------------------------------------

CLOSING = """## Where the code lives
- `ldm/diffusion/schedule.py`: `Schedule`, `make_betas` and `Schedule.sigma`

Papers: arXiv:2006.11239"""


def exercise(number: int) -> str:
    return f"### Exercise {number}\nAdd.\n<details><summary>Solution</summary>\n\n```python\nx += 1\n```\n</details>"


def small(code: str = "x = 1") -> NotebookNode:
    """A notebook with all that one needs, and one figure."""
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    texts = ["# Title\nAfter this notebook you can add.", *map(exercise, (1, 2, 3)), CLOSING]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    cells[1:1] = [nbformat.v4.new_code_cell(source) for source in (code, figure)]
    return nbformat.v4.new_notebook(cells=cells, metadata={"course": {"figures": 1}})


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The small notebook as `refresh` leaves it."""
    path = tmp_path_factory.mktemp("notebook") / "90_small.ipynb"
    execute.write(small(), path)
    assert execute.refresh(path) == []
    return checks.read(path)


def found(book: NotebookNode, folder: Path) -> str:
    """The faults of a notebook once it is written."""
    path = folder / "90_small.ipynb"
    execute.write(book, path)
    return "; ".join(checks.faults(path))


def altered(book: NotebookNode, change: Callable[[NotebookNode], object]) -> NotebookNode:
    book = nbformat.from_dict(book)
    book = nbformat.reads(nbformat.writes(book), as_version=4)
    change(book)
    return book


def output(book: NotebookNode, name: str, text: str) -> None:
    book.cells[1].outputs.append(nbformat.v4.new_output("stream", name=name, text=text))


CHANGES: dict[str, Callable[[NotebookNode], object]] = {
    "stale: run `python -m notebooks.execute 90`": lambda book: book.cells[1].update(source="x = 2"),
    "0 figures, the metadata say 1": lambda book: book.cells[2].update(outputs=[]),
    "how many figures": lambda book: book.metadata.course.pop("figures"),
    "the first cell is no title": lambda book: book.cells[0].update(source="# Title"),
    "the last cell is no '## Where": lambda book: book.cells[-1].update(source=CLOSING.replace("Papers", "")),
    "schedule.py has no make_gammas": lambda book: book.cells[-1].update(
        source=CLOSING.replace("betas", "gammas")
    ),
    "ldm/no.py, which does not exist": lambda book: book.cells[-1].update(
        source=CLOSING.replace("diffusion/schedule", "no")
    ),
    "names no source": lambda book: book.cells[-1].update(source=CLOSING.replace("`: `", "`, `")),
    "2 exercises, expected 3 to 6": lambda book: book.cells.pop(3),
    "no folded solution: ### Exercise 1": lambda book: book.cells[3].update(source="### Exercise 1\nAdd."),
    "a cell wrote to stderr: beware": lambda book: output(book, "stderr", "beware"),
    "holds the path /home/me/x.png": lambda book: output(book, "stdout", "saved /home/me/x.png"),
    "bytes, at most 600000": lambda book: output(book, "stdout", "x" * 600_000),
    "a cell was not executed": lambda book: book.cells[1].update(execution_count=None),
}


def test_a_fresh_notebook_is_in_order(fresh: NotebookNode, tmp_path: Path) -> None:
    assert found(altered(fresh, lambda book: None), tmp_path) == ""
    spaced = altered(fresh, lambda book: book.cells[0].update(source=book.cells[0].source + "\nMore text."))
    assert found(spaced, tmp_path) == "", "text is not code"


@pytest.mark.parametrize("fault", CHANGES)
def test_each_fault_is_told(fresh: NotebookNode, tmp_path: Path, fault: str) -> None:
    assert fault in found(altered(fresh, CHANGES[fault]), tmp_path)


def test_the_stamp_follows_code_and_not_remarks() -> None:
    source = '"""What."""\n\n\ndef f(x):\n    """How."""\n    # why\n    return x\n'
    same = 'def f(x):\n    """Otherwise\n    said."""\n\n    return x\n'
    assert checks.without_remarks(source) == checks.without_remarks(same) == "def f(x):\n    return x"
    assert checks.without_remarks(source.replace("return x", "return 2 * x")) != checks.without_remarks(
        source
    )


def test_the_stamp_follows_the_named_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = Path("ldm/diffusion/schedule.py")
    (tmp_path / named).parent.mkdir(parents=True)
    source, stamp = (ROOT / named).read_text(encoding="utf-8"), checks.stamp(small())
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / named).write_text("# A remark\n" + source, encoding="utf-8")
    assert checks.stamp(small()) == stamp
    (tmp_path / named).write_text(source.replace("SNAP = 1e-4", "SNAP = 1e-3"), encoding="utf-8")
    assert checks.stamp(small()) != stamp
    assert checks.stamp(small("x = 2")) != checks.stamp(small())


def test_a_failing_cell_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "90_small.ipynb"
    execute.write(small("1 / 0"), path)
    before = path.read_bytes()
    monkeypatch.setattr(checks, "HERE", tmp_path)
    assert execute.main(["90"]) == 2
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_notebook_with_a_fault_is_not_written(tmp_path: Path) -> None:
    book, path = small(), tmp_path / "90_small.ipynb"
    book.metadata.course.figures = 2
    execute.write(book, path)
    before = path.read_bytes()
    assert execute.refresh(path) == ["1 figures, the metadata say 2"]
    assert path.read_bytes() == before


def test_a_solution_that_fails_is_told() -> None:
    book = small("y = 1")
    with pytest.raises(ValueError, match="name 'x' is not defined"):
        execute.run(book, solutions=True)


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute.main(["nothing"]) == 2
    assert "no notebook begins with 'nothing'" in capsys.readouterr().err
