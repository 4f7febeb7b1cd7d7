"""What a step keeps for its gradients: counted by hand, beside the peak of a process that makes one, and shown."""

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_plan import pictures  # noqa: F401  (the fixture)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.config import find_config
from train.__main__ import build_task, main
from train.plan import plan
from train.rehearsal import Live, activations, faked

MEASURED = Path(__file__).with_name("step_memory.py")


def peak_of(layers, images):
    """Peak of a pass and of its gradients, in numbers."""
    with FakeTensorMode() as mode, faked([layers], mode) as weights, Live(weights) as live:
        layers(torch.zeros(images, 10)).sum().backward()
        gradients = sum(p.grad.numel() for p in layers.parameters())
    return live.peak / 4, gradients, live.now / 4


def test_layers_by_hand():
    """ReLUs of a 10-wide network keep their outputs (10 each an image), which the next layer multiplies its
    gradient with; in the backward pass one gradient of a layer's output is there besides."""
    layers = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(10, 10), nn.ReLU())))
    peak, gradients, left = peak_of(layers, images=1000)
    assert gradients == 8 * 110
    assert 8 * 10_000 + 10_000 <= peak <= 8 * 10_000 + 4 * 10_000 + gradients
    assert left == gradients  # all else was let go
    assert peak_of(layers, images=2000)[0] > 1.8 * peak
    assert all(type(p) is nn.Parameter and p.grad is None for p in layers.parameters())


def test_the_networks_are_left_as_they_were():
    layers = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    layers[0].bias = layers[1].bias  # tied
    before = {name: id(tensor) for name, tensor in (*layers.named_parameters(), *layers.named_buffers())}
    with FakeTensorMode() as mode, suppress(KeyError), faked([layers], mode):
        assert layers[0].bias is layers[1].bias and id(layers[0].bias) not in before.values()
        raise KeyError("in the middle")
    after = {name: id(tensor) for name, tensor in (*layers.named_parameters(), *layers.named_buffers())}
    assert before == after


def task(pictures, tmp_path, *options):  # noqa: F811
    """The shipped tiny first stage."""
    options = [f"data.path={pictures}", "run.device=cpu", f"run.out={tmp_path / 'new'}", *options]
    return build_task("autoencoder", "configs/train/tiny_autoencoder.yaml", options)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux tells it")
@pytest.mark.parametrize("options", [[], ["run.activation_checkpointing=true"]])
def test_beside_the_peak_of_a_real_step(pictures, tmp_path, options):  # noqa: F811
    """A first stage at a batch whose activations outweigh all else. Told is between 65 % and 105 % of the measured:
    workspaces of the libraries inside of an operation are not counted."""
    sizes = ["autoencoder.base_channels=32", "run.batch=64", "run.accumulate=1", *options]
    told = activations(task(pictures, tmp_path, *sizes), 64)
    command = [sys.executable, str(MEASURED), str(pictures), *sizes]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    measured = int(done.stdout.split()[-1])
    print(f"told {told / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.65 * measured < told < 1.05 * measured


@pytest.mark.parametrize(("options", "change"), [
    (["run.batch=16"], 2),
    (["run.accumulate=4"], 0.25),
    (["run.precision=bfloat16"], 0.6),
    (["run.activation_checkpointing=true"], 0.6),
])  # fmt: skip
def test_settings_that_take_more_or_less(pictures, tmp_path, options, change):  # noqa: F811
    made = [task(pictures, tmp_path, "run.batch=8", *more) for more in ([], options)]
    before, after = (activations(each, each.config.run.batch // each.config.run.accumulate) for each in made)
    assert after / before == pytest.approx(change, rel=0.35)


@pytest.mark.parametrize("options", [[], ["loss.adversarial_weight=0.5"]])
def test_players_of_a_first_stage(pictures, tmp_path, options):  # noqa: F811
    """They pass one after the other: the largest counts."""
    made = task(pictures, tmp_path, *options)
    both = [activations(made, 8)]
    made.players = {"model": made.players["model"]}
    both.append(activations(made, 8))
    assert both[0] >= both[1] > 8 * 4 * 3 * 32 * 32
    assert options or both[0] == both[1]
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert (tmp_path / "new").exists() is False


def test_the_plan_adds_them_up(pictures, tmp_path):  # noqa: F811
    text = plan(task(pictures, tmp_path))
    line = re.search(r"memory: ([\d.]+) MB = (.*); Python, libraries and pictures on top", text)
    parts = [float(number) for number in re.findall(r"([\d.]+) MB", line[2])]
    assert sum(parts) == pytest.approx(float(line[1]), abs=0.3)
    assert re.search(r"activations of 8 images [\d.]+ MB$", line[2])


def test_a_dry_run_writes_no_pixels(pictures, tmp_path, capsys):  # noqa: F811
    config = str(find_config("configs/train/tiny_autoencoder.yaml"))
    options = [f"data.path={pictures}", "run.device=cpu", f"run.out={tmp_path / 'new'}"]
    stream = ["data.stream=true", f"data.cache={tmp_path / 'cache'}"]
    assert main(["autoencoder", config, *options, "--dry-run"]) == 0
    in_memory = capsys.readouterr().out
    assert main(["autoencoder", config, *options, *stream, "--dry-run"]) == 0
    assert capsys.readouterr().out == in_memory
    assert list(tmp_path.iterdir()) == []
