"""Settings of every test: shapes and types checked on each call, nothing read from the user's home.

Two processes with one thread each share the tests out by files (`-n 0`: one process with two threads).

With pytest's default import mode each test file's folder is on the path; `tests` itself is put there too, for the
helpers `checked`, `formula` and `terrain`.
"""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The longest files, in the order in which two processes begin with them
LONG = (
    "test_notebooks.py",
    "train/test_distributed.py",
    "test_benchmarks.py",
    "train/test_plan.py",
    "sample/test_shipped.py",
    "train/test_pieces.py",
    "sample/test_several_processes.py",
    "train/test_controlnet_task.py",
    "sample/test_again.py",
    "train/test_ablate.py",
)

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle libraries must not look for anything on the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start, too
sys.path.insert(0, str(HERE))

import checked  # noqa: E402

checked.install()  # before any of the packages is imported


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    config.option.loadscopereorder = False  # not by the number of tests, but as below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:  # the long files first, then those of many tests
        first = {HERE / name: place for place, name in enumerate(LONG)}
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (first.get(item.path, len(LONG)), -tests[item.path], str(item.path)))


def pytest_collection_finish() -> None:
    """Takes what the libraries hold out of the collector's rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, so that no test depends on the user's files or leaves any there."""
    folder = tmp_path_factory.getbasetemp() / "home"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever ran before it."""
    import torch

    torch.manual_seed(0)
