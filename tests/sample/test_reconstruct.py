"""`ldm-sample reconstruct`: PSNR, SSIM, LPIPS and the latents' statistics that it prints."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.losses.perceptual import LPIPS, load_lpips
from ldm.metrics import psnr, ssim
from ldm.weights.io import save_weights
from sample.__main__ import main
from sample.images import read_parameters
from sample.pipeline import Pipeline


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptual network with random weights, under the usual name."""
    torch.manual_seed(5)
    network = LPIPS()
    heads = {name: torch.rand_like(value) for name, value in network.state_dict().items() if "heads" in name}
    path = tmp_path_factory.mktemp("lpips") / "lpips_vgg16.safetensors"
    save_weights(path, {**network.state_dict(), **heads}, {"lpips": {"trunk": "random numbers"}})
    return path


def picture(path: Path, width: int, height: int) -> Tensor:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1


def told(line: str, name: str) -> float:
    found = re.search(rf"\b{name} (\S+)", line)
    assert found is not None, line
    return float(found[1])


@torch.no_grad()
def test_what_it_tells(
    model: Path, pipe: Pipeline, tmp_path: Path, lpips_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = [picture(paths[0], 32, 24), picture(paths[1], 20, 16)]
    where = ["--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for lpips in (lpips_file, lpips_file.parent):  # the file, or its folder
        assert main(["reconstruct", *where, "--lpips", str(lpips), *map(str, paths)]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        network, expected, latents = load_lpips(lpips_file), [], []
        for image, line in zip(images, lines, strict=True):
            latents.append(pipe.autoencoder.encode_latents(image)[0].flatten(1))
            decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(image).mode()).clamp(-1, 1)
            values = [float(measure(image, decoded)) for measure in (psnr, ssim, network)]
            expected.append(values)
            assert float(line.split(" dB")[0]) == pytest.approx(values[0], abs=0.006)
            assert told(line, "SSIM") == pytest.approx(values[1], abs=6e-5)
            assert told(line, "LPIPS") == pytest.approx(values[2], abs=6e-5)
        means = np.array(expected).mean(axis=0)
        assert float(last.split(" dB")[0]) == pytest.approx(means[0], abs=0.006)
        assert "mean PSNR of 2" in last and "LPIPS on random numbers" in last
        assert told(last, "SSIM") == pytest.approx(means[1], abs=6e-5)
        assert told(last, "LPIPS") == pytest.approx(means[2], abs=6e-5)
        channels = torch.cat(latents, dim=1)  # (C, N), those of both pictures
        pairs = [pair.split("+-") for pair in re.findall(r"\S+\+-\S+", last)]
        assert len(pairs) == 4
        for channel, (mean, deviation) in zip(channels, pairs, strict=True):
            assert float(mean) == pytest.approx(float(channel.mean()), rel=6e-3, abs=1e-4)
            assert float(deviation) == pytest.approx(float(channel.std(correction=0)), rel=6e-3)
    parameters = read_parameters(tmp_path / "out" / "reconstruct-0000.png")
    assert [parameters[name] for name in ("psnr", "ssim", "lpips")] == pytest.approx(expected[0], rel=1e-4)


def test_pictures_too_small_for_a_measure(
    model: Path, tmp_path: Path, lpips_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 px are too few for SSIM, 12 for LPIPS: left out there, and from the means."""
    for side in (8, 12, 16):
        picture(tmp_path / f"{side}.png", side, side)
    files = [str(tmp_path / f"{side}.png") for side in (8, 12, 16)]
    where = ["--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["reconstruct", *where, "--lpips", str(lpips_file), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("SSIM" in line, "LPIPS" in line) for line in lines] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    assert told(lines[-1], "LPIPS") == told(lines[2], "LPIPS")
    mean = (told(lines[1], "SSIM") + told(lines[2], "SSIM")) / 2
    assert told(lines[-1], "SSIM") == pytest.approx(mean, abs=1.1e-4)


def test_a_bad_lpips_file_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png", 16, 16)
    where = ["--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["reconstruct", *where, "--lpips", str(tmp_path), str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "lpips_vgg16.safetensors does not exist" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_stand_in_is_told_under_its_own_name(
    model: Path, tmp_path: Path, lpips_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`--lpips hed` is a distance of VGG features, and must not be taken for LPIPS."""
    network = load_lpips(lpips_file)
    network.label, network.trunk = "VGG distance", "edges of photographs"
    asked: list[str] = []
    monkeypatch.setattr("sample.reconstruct.load_perceptual", lambda name: asked.append(name) or network)
    image = picture(tmp_path / "a.png", 16, 16)
    where = ["--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["reconstruct", *where, "--lpips", "hed:x.h5", str(tmp_path / "a.png")]) == 0
    line, last = capsys.readouterr().out.splitlines()
    assert asked == ["hed:x.h5"]
    assert "VGG distance " in line and "LPIPS" not in line + last
    assert last.endswith("(VGG distance on edges of photographs)")
    parameters = read_parameters(tmp_path / "out" / "reconstruct-0000.png")
    assert parameters["vgg_distance"] > 0 and parameters["trunk"] == "edges of photographs"
    assert "lpips" not in parameters and image.shape == (1, 3, 16, 16)
