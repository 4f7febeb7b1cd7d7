"""Notebook 13 with the path of a checkpoint: every cell works on that file, not on its stand-in."""

import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save, single_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where the package `notebooks` is

from notebooks import checks, execute  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prediction"), [("tiny_sd15", None), ("tiny_sd21", "v")])
def test_runs_on_a_given_checkpoint(
    kind: str, prediction: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path / f"{kind}_given.safetensors", single_file(kind, torch.float16))
    monkeypatch.setenv("LDM_CHECKPOINT", str(file))
    if prediction:
        monkeypatch.setenv("LDM_PREDICTION", prediction)
    (path,) = (path for path in checks.notebooks() if path.name.startswith("13"))
    book = execute.run(checks.read(path), quick=True, solutions=True)
    text = "\n".join(checks.texts(book))
    assert f"The checkpoint is {file.name}" in text
    assert "No checkpoint is given" not in text
    assert f"kind      {kind}" in text  # what inspect tells
    assert "UNet 9 million" in text  # of the file, not of Stable Diffusion
    assert f"in 2 steps from {file.name}" in text
    assert checks.figures(book) == book.metadata.course.figures
    assert not [output for output in checks.outputs(book) if output.get("name") == "stderr"]
