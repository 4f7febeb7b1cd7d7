"""Runs on shards, streamed and with workers: equal to a run in memory bit for bit, whatever becomes of the files."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from ldm.weights.io import load_weights
from train.__main__ import main
from train.tasks.autoencoder import AutoencoderTask
from train.tasks.diffusion import DiffusionTask

STEPS = 7  # 22 pictures in batches of 8: two epochs and a half


def shape(number):
    picture = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(picture).ellipse((4, 4, 12 + number, 28), ["red", "blue", "green"][number % 3])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two shards of twelve pictures, two of them bad, and with it an autoencoder's and a diffusion model's run."""
    root = tmp_path_factory.mktemp("streamed")
    (root / "set").mkdir()
    for shard in range(2):
        with tarfile.open(root / "set" / f"{shard}.tar", "w") as tar:
            for number in range(12 * shard, 12 * shard + 12):
                content = b"bad" if number % 12 == 5 else shape(number)
                split = "heldout_image" if number % 12 == 0 else "train"
                row = json.dumps({"text": f"shape {number}", "split": split}).encode()
                for name, data in ((f"{number:03}.png", content), (f"{number:03}.json", row)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for task in ("autoencoder", "diffusion"):
        assert run(task, root, root / task) == 0
    return root


def run(task, root, out, *more, data=None):
    config = {"autoencoder": "tiny_autoencoder", "diffusion": "tiny"}[task]
    of_task = [f"autoencoder={root}/autoencoder/model/autoencoder.safetensors", "preview.steps=2"]
    every = ["run.log_every=1", "run.validate_every=3", "run.preview_every=0", "run.checkpoint_every=4"]
    size = ["run.device=cpu", f"run.steps={STEPS}", "run.batch=8", "run.accumulate=2", "run.keep=5"]
    where = [f"data.path={data or root / 'set'}", f"run.out={out}", f"data.cache={root / 'cache'}"]
    extra = of_task if task == "diffusion" else []
    resume = [word for word in more if word == "--resume"]
    overrides = [word for word in more if word not in resume]
    return main([task, f"configs/train/{config}.yaml", *where, *every, *size, *extra, *overrides, *resume])


def assert_equal(a, b):
    rows = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    for row in (*rows[0], *rows[1]):
        row.pop("images_per_second", None)
        for name in [name for name in row if "memory" in name or "second" in name]:
            del row[name]
    assert rows[0] == rows[1] and len([row for row in rows[0] if "loss" in row]) == STEPS
    for file in (a / "model").glob("*.safetensors"):
        x, y = load_weights(file), load_weights(b / "model" / file.name)
        assert all(torch.equal(x[0][name], y[0][name]) for name in x[0]) and x[1] == y[1]
    name = f"states/step-{STEPS:08d}.safetensors"
    x, y = load_weights(a / name)[0], load_weights(b / name)[0]
    assert all(torch.equal(x[name], y[name]) for name in x) and x.keys() == y.keys()


@pytest.mark.parametrize("task", ["autoencoder", "diffusion"])
def test_streamed_and_with_workers_is_the_same_run(root, tmp_path, task):
    assert run(task, root, tmp_path / "run", "data.stream=true", "data.workers=2") == 0
    assert_equal(root / task, tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "way"),
    [("autoencoder", ["data.stream=true", "data.workers=1"]), ("diffusion", ["data.workers=2"])],
)
def test_resumed_in_mid_epoch_with_other_workers(root, tmp_path, task, way):
    out = tmp_path / "run"
    shutil.copytree(root / task, out, ignore=shutil.ignore_patterns("model", f"step-*{STEPS}.safetensors"))
    assert run(task, root, out, "--resume", *way) == 0
    assert_equal(root / task, out)


def one_error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ldm-train: error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def when(monkeypatch, task, step, action):
    """Have `action` happen in this step, before its pictures are looked up."""
    kind = {"autoencoder": AutoencoderTask, "diffusion": DiffusionTask}[task]
    loss = kind.loss

    def noticed(self, now, part):
        if (now, part) == (step, 0):
            action()
        return loss(self, now, part)

    monkeypatch.setattr(kind, "loss", noticed)


@pytest.mark.parametrize("task", ["autoencoder", "diffusion"])
def test_a_cut_cache_ends_the_run_and_loses_nothing(root, tmp_path, task, capsys, monkeypatch):
    out, cache = tmp_path / "run", tmp_path / "cache"
    stream = ("data.stream=true", f"data.cache={cache}")

    def cut():
        files = {"autoencoder": cache.iterdir(), "diffusion": (out / "cache").glob("train*")}[task]
        for file in files:
            file.write_bytes(file.read_bytes()[:-100])

    with monkeypatch.context() as patch:
        when(patch, task, 5, cut)
        assert run(task, root, out, *stream) == 2
    told = one_error(capsys)
    assert ".safetensors has" in told and "go on with --resume" in told
    assert [file.name for file in (out / "states").iterdir()] == ["step-00000004.safetensors"]
    assert run(task, root, out, *stream, "--resume") == 0
    assert_equal(root / task, out)


def test_a_set_that_vanishes_in_mid_run(root, tmp_path, capsys, monkeypatch):
    """The run goes on; one that is resumed names what is missing, keeps its states, and goes on when it is back."""
    data, out, task = tmp_path / "set", tmp_path / "run", "autoencoder"
    shutil.copytree(root / "set", data)
    with monkeypatch.context() as patch:
        when(patch, task, 5, lambda: data.rename(tmp_path / "away"))
        assert run(task, root, out, "data.stream=true", data=data) == 0
    assert_equal(root / task, out)
    (out / "states" / f"step-{STEPS:08d}.safetensors").unlink()
    shutil.rmtree(out / "model")
    assert run(task, root, out, "data.stream=true", "--resume", data=data) == 2
    assert f"{data}: no such" in one_error(capsys)
    (tmp_path / "away").rename(data)
    shard = data / "1.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000])
    assert run(task, root, out, "data.stream=true", "--resume", data=data) == 2
    one_error(capsys)
    assert (out / "states" / "step-00000004.safetensors").is_file()
    shard.write_bytes(whole)
    assert run(task, root, out, "data.stream=true", "--resume", data=data) == 0
    assert_equal(root / task, out)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_stream_needs_less_memory_than_the_set(tmp_path):
    """5,000 pictures, 184 MB of pixels and moments, with 60 MiB more than what imports take; in memory they fail."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        for number in range(5000):
            content = shape(number % 12)
            info = tarfile.TarInfo(f"{number:05}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    script, root = Path(__file__).parent / "streamed_memory.py", Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    told = {}
    for stream in ("true", "false"):
        command = [sys.executable, str(script), str(tmp_path / "set"), "60", stream]
        told[stream] = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert told["true"].returncode == 0, told["true"].stderr[-1500:]
    assert int(told["true"].stdout.split()[-1]) == 5000 * (3 * 64 * 64 + 2 * 4 * 3 * 32 * 32)
    assert told["false"].returncode != 0
    assert "memory" in told["false"].stderr.lower()
