"""Settings of every test: shapes and types checked on each call, nothing read from the user's home.

Two processes with one thread each share the tests out by files (`-n 0`: one process with two threads).

With pytest's default import mode each test file's folder is on the path; `tests` itself is put there too, for the
helpers `formula` and `terrain`.
"""

import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

HERE = Path(__file__).parent

os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle libraries must not look for anything on the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start, too
sys.path.insert(0, str(HERE))
install_import_hook(["ldm", "sample", "train"], "beartype.beartype")  # before any of them is imported


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
