"""`ldm-sample` by torchrun: the pictures of an evaluation shared out, and the same results as of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import randomised
from PIL import Image

import ldm.distributed
from ldm.distributed import share
from ldm.models.controlnet import ControlNet
from ldm.weights.folder import save_part
from sample.__main__ import main
from sample.pipeline import Pipeline

ROOT = Path(ldm.distributed.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPT = "#!{}\nimport sys\nfrom {}.__main__ import main\nsys.exit(main())\n"  # as pip makes it


def script(folder: Path, package: str) -> Path:
    """The command that an installed package has."""
    path = folder / f"ldm-{package}"
    path.write_text(SCRIPT.format(sys.executable, package))
    path.chmod(0o755)
    return path


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, check=False, timeout=600
    )


def both(*arguments: object, cwd: Path) -> None:
    """Two processes that find each other as those of torchrun do, without its launcher, which takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command, processes = [sys.executable, *map(str, arguments)], []
    for rank in range(2):
        own = {key: str(value) for key, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(
            subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT | own, text=True, stderr=subprocess.PIPE)
        )
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 noise pictures: 13 concepts in two styles, of which one pair and 3 more pictures are held out."""
    folder = tmp_path_factory.mktemp("set")
    rng, rows = np.random.default_rng(0), []
    for i in range(13):
        pixels = rng.integers(10, 246, (32, 32, 3))
        for k, style in enumerate(("ink", "oil")):
            name, split = f"{style}{i:02d}.png", "heldout_pair" if k and i > 9 else "train"
            Image.fromarray((pixels + 5 * k).astype(np.uint8)).save(folder / name)
            rows.append([name, f"a thing {i}, {style}", f"thing {i}", style, split])
    rows += [[*rows[i][:4], "heldout_image"] for i in range(3)]
    names = ("file_name", "text", "concept", "style", "split")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    )
    return folder


def options(data: Path, model: Path, out: Path) -> list[str]:
    where = ["--data", data, "--model", model, "--out", out, "--device", "cpu"]
    how = "--captions 11 --batch 3 --steps 2 --features thumbnails --feature-size 4"
    return ["evaluate", *map(str, where), *how.split()]


def test_two_processes_measure_what_one_does(data: Path, model: Path, tmp_path: Path) -> None:
    """Every byte of the result file and of all sheets; by the command as it is installed."""
    pytest.importorskip("torchmetrics")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(options(data, model, tmp_path / "one")) == 0
    finally:
        torch.set_num_threads(threads)
    done = torchrun(
        "--no-python", script(tmp_path, "sample"), *options(data, model, tmp_path / "two"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training captions") == 1
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two")
    )
    assert len(one) == 4 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_shares_are_whole_batches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, batch, world in ((11, 3, 2), (12, 4, 3), (1, 16, 4), (0, 4, 2), (100, 1, 8)):
        monkeypatch.setattr(ldm.distributed, "world_size", lambda world=world: world)
        shares = []
        for number in range(world):
            monkeypatch.setattr(ldm.distributed, "rank", lambda number=number: number)
            shares.append(share(count, batch))
        assert [i for each in shares for i in each] == list(range(count))
        assert all(each.start % batch == 0 for each in shares if each)
        sizes = [-(-len(each) // batch) for each in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("command", [["txt2img", "a"], ["img2img", "a.png", "a"]])
def test_other_commands_say_that_they_run_in_one_process(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else every process would make the same pictures, and write them all."""
    monkeypatch.setattr(ldm.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(ldm.distributed, "gather", lambda value: [value, value])
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"ldm-sample: error: {command[0]} runs in one process, not in 2 by torchrun")
    assert "-n 500 --first 500" in told and told.count("\n") == 1


def test_two_processes_follow_hints_as_one_does(
    data: Path, model: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    pytest.importorskip("cv2")
    torch.manual_seed(0)
    controlnet = randomised(ControlNet.from_unet(pipe.unet, hint_widths=(4, 8, 8)))
    save_part(tmp_path / "controlnet.safetensors", controlnet, torch.float32)
    command = [*("evaluate", "--data", data, "--model", model, "--device", "cpu", "--annotator", "canny")]
    command += [
        "--control",
        tmp_path / "controlnet.safetensors",
        *["--captions", "3", "--batch", "2", "--steps", "2"],
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*map(str, command), "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    both("-m", "sample", *command, "--out", tmp_path / "two", cwd=tmp_path)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two")
    )
    assert sorted(one) == ["control-0000.png", "control.json"] and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
