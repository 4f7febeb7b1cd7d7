"""The speed options through the command: each reaches the network that sampling evaluates, and does what it says."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.models.controlnet import ControlNet
from ldm.models.deep_cache import DeepCache
from ldm.models.fast_conv import WinogradConv2d, fast_convolutions, kernel_bytes
from ldm.models.token_merging import MergedAttention
from ldm.models.unet import UNet
from ldm.models.variants import sharing
from sample import speed, txt2img
from sample.__main__ import main
from sample.cli import load_pipeline
from sample.pipeline import Pipeline


def picture(folder: Path, *options: object) -> np.ndarray:
    """The one that the shipped model makes in a few steps, unless options say otherwise."""
    common = ["a red apple, noto emoji", "--steps", "4", "--guidance", "2", "--device", "cpu"]
    assert main(["txt2img", *common, *map(str, options), "--out", str(folder)]) == 0
    return np.array(Image.open(folder / "00000.png")).astype(int)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """The models that the commands load."""
    loaded: list[Pipeline] = []

    def load(args: Any) -> Pipeline:
        loaded.append(load_pipeline(args))
        return loaded[-1]

    monkeypatch.setattr(txt2img, "load_pipeline", load)
    return loaded


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast convolutions for every layer, also where they do not pay: in the shipped model, nowhere."""
    monkeypatch.setattr(speed, "fast_convolutions", partial(fast_convolutions, least=0.0))


def test_fast_convolutions_only_where_they_pay(
    tmp_path: Path, used: list[Pipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path, "--fast-conv", 1, "-n", 4)
    assert "UNet: 0 of 26 3x3 convolutions" in capsys.readouterr().err


@pytest.mark.usefixtures("everywhere")
def test_fast_convolutions(tmp_path: Path, used: list[Pipeline], capsys: pytest.CaptureFixture[str]) -> None:
    """The layers in the other form, in UNet and decoder; the same picture but for rounding."""
    plain = picture(tmp_path / "a")
    assert used[0].network is used[0].unet
    fast = picture(tmp_path / "b", "--fast-conv", 1)
    replaced = re.search(r"UNet: (\d+) of (\d+) 3x3 convolutions", capsys.readouterr().err)
    assert replaced is not None
    assert 0 < int(replaced[1]) <= int(replaced[2])
    network = used[1].network
    assert isinstance(network, UNet)
    assert any(isinstance(module, WinogradConv2d) for module in network.modules())
    assert np.abs(fast - plain).max() <= 1
    assert not any(isinstance(module, WinogradConv2d) for module in used[1].unet.modules())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[UNet]:
    """What was compiled, by a stand-in: the annotations that tests check at each call are nothing to compile.

    What compiling makes of it is `tests/models/test_compiled.py`'s.
    """
    given: list[UNet] = []

    def stand_in(unet: UNet) -> UNet:
        given.append(unet)
        return sharing(unet)

    monkeypatch.setattr(speed, "compile_blocks", stand_in)
    return given


def test_compiled(tmp_path: Path, used: list[Pipeline], compiled: list[UNet]) -> None:
    picture(tmp_path, "--compile")
    assert compiled == [used[0].unet]
    assert used[0].network is not used[0].unet


# In a Python of its own, without the annotations; the eager backend traces all and translates nothing
CONTROLLED = """
import functools, json, sys
import numpy as np
import torch
from PIL import Image
from torch._dynamo.utils import counters
from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import ResBlock
from ldm.models.compiled import compile_blocks
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.weights.folder import save_part
from sample import speed
from sample.__main__ import main
from sample.pipeline import Pipeline

model, backend, given, pictures = *sys.argv[1:], [], []

def compiling(network):
    given.append(compile_blocks(network, backend))
    return given[-1]

speed.compile_blocks = compiling
torch.manual_seed(0)
net = ControlNet(ControlNetConfig(Pipeline.load(model, "cpu").unet.config, hint_widths=(4, 6, 8)))
for parameter in net.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
save_part("net.safetensors", net, torch.float32)
Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save("hint.png")
for more in ([], ["--control", "net.safetensors:hint.png"], ["--control", "net.safetensors:hint.png", "--compile"]):
    out = f"out{len(pictures)}"
    options = ["--model", model, "--steps", "2", "--device", "cpu", "--out", out]
    assert main(["txt2img", "an apple", *options, *more]) == 0
    pictures.append(np.array(Image.open(f"{out}/00000.png")).astype(int))
plain, slow, fast = pictures
blocks = [sum(isinstance(m, (ResBlock, SpatialTransformer)) for m in each.modules()) for each in given]
ready = [sum("forward" in vars(m) for m in each.modules()) for each in given]
kinds = [type(each).__name__ for each in given]
off = [int(abs(plain - slow).max()), int(abs(fast - slow).max())]
print(json.dumps([kinds, blocks, ready, off, dict(counters["graph_break"])]))
"""


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_a_controlnet(backend: str, model: Path, tmp_path: Path) -> None:
    """The blocks of both, and the picture is the same but for rounding."""
    root = Path(speed.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    line = [sys.executable, "-c", CONTROLLED, str(model), backend]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds, blocks, ready, off, breaks = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["UNet", "ControlNet"]
    assert blocks == ready == [12, 6]
    assert off[0] > 8
    assert off[1] <= 1
    assert breaks == {}


@pytest.mark.usefixtures("everywhere")
def test_fast_convolutions_of_controlnets(
    tmp_path: Path, used: list[Pipeline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the one budget, UNet and decoder first; the same picture but for rounding."""
    steered: list[ControlNet] = []
    forward = ControlNet.forward
    monkeypatch.setattr(
        ControlNet, "forward", lambda self, *given: (steered.append(self), forward(self, *given))[1]
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "hint.png"
    )
    control = ["--control", f"emoji_edges:{tmp_path / 'hint.png'}"]
    plain = picture(tmp_path / "plain", *control)
    steered.clear()
    capsys.readouterr()
    fast = picture(tmp_path / "fast", *control, "--fast-conv", 1)
    told = capsys.readouterr().err
    assert np.abs(fast - plain).max() <= 1
    assert steered
    assert kernel_bytes(steered[-1]) > 0
    network = used[1].network
    assert isinstance(network, UNet)
    taken = kernel_bytes(network) + kernel_bytes(used[1].autoencoder.decoder)
    assert re.search(r"ControlNet: [1-9]\d* of \d+ 3x3 convolutions", told)
    steered.clear()
    picture(tmp_path / "little", *control, "--fast-conv", taken / 1e9)  # nothing is left for a third
    assert kernel_bytes(steered[-1]) == 0


def test_deep_cache(tmp_path: Path, used: list[Pipeline]) -> None:
    plain, every = picture(tmp_path / "a"), picture(tmp_path / "b", "--deep-cache", "1")
    assert np.array_equal(plain, every)
    reused = picture(tmp_path / "c", "--deep-cache", "2:1")
    network = used[2].network
    assert isinstance(network, DeepCache)
    assert (network.every, network.branch) == (2, 1)
    assert 0 < np.abs(reused - plain).mean() < 25  # another picture, of the same apple


def test_token_merging(tmp_path: Path, used: list[Pipeline]) -> None:
    plain, merged = picture(tmp_path / "a"), picture(tmp_path / "b", "--token-merging", "0.5")
    assert used[1].network is not used[1].unet
    assert 0 < np.abs(merged - plain).mean() < 25


@pytest.mark.usefixtures("everywhere")
def test_all_at_once(tmp_path: Path, used: list[Pipeline], compiled: list[UNet]) -> None:
    options = ["--fast-conv", 1, "--compile", "--deep-cache", "2:1", "--token-merging", 0.5]
    assert np.abs(picture(tmp_path / "a", *options) - picture(tmp_path / "b")).mean() < 25
    assert isinstance(used[0].network, DeepCache)
    kinds = {type(module) for module in compiled[0].modules()}
    assert {WinogradConv2d, MergedAttention} <= kinds


@pytest.mark.parametrize(("options", "message"), [
    (["--fast-conv", "-1"], "the memory for fast convolutions must be 0 GB or more, got -1"),
    (["--fast-conv", "1", "--dtype", "bfloat16"], "--fast-conv is for float32 on the CPU, got torch.bfloat16"),
    (["--deep-cache", "often"], "--deep-cache must be like 3 or 3:1, got 'often'"),
    (["--deep-cache", "0"], "N at least 1, got 0"),
    (["--deep-cache", "2:9"], "DeepCache branch must be between 0 and num_res_blocks"),
    (["--token-merging", "1.5"], "1.5"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(
    model: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["txt2img", "a", *common, *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
