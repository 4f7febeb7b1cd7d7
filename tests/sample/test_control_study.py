"""`ldm-sample evaluate --control`: answers that are known beforehand, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.models.controlnet import ControlNet
from ldm.weights.folder import save_part
from sample import control_study
from sample.__main__ import main
from sample.control_error import control_errors, hints_of, reconstructed
from sample.images import read_rgb, to_tensor
from sample.pipeline import Pipeline

pytest.importorskip("cv2")
COUNT = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Boxes of a colour each; the last four are held out."""
    folder, rng, rows = tmp_path_factory.mktemp("boxes"), np.random.default_rng(0), []
    for number in range(COUNT):
        picture, low = Image.new("RGB", (32, 32), "white"), rng.integers(2, 12, 2)
        colour = tuple(rng.integers(0, 200, 3).tolist())
        ImageDraw.Draw(picture).rectangle([*low.tolist(), *(low + 14).tolist()], fill=colour)
        picture.save(folder / f"{number}.png")
        split = "heldout_image" if number >= COUNT - 4 else "train"
        concept = {"text": f"box {number}", "concept": f"box {number}", "style": "flat"}
        rows.append({"file_name": f"{number}.png", "split": split, **concept})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory, pipe) -> Path:
    """At the start of its training, when it changes nothing."""
    folder = tmp_path_factory.mktemp("controlnet")
    made = ControlNet.from_unet(pipe.unet, hint_widths=(4, 8, 8))
    about = {"annotators": ["canny:low=50,high=100", "canny"]}
    save_part(folder / "controlnet.safetensors", made, torch.float32, hints=about)
    return folder


def command(model: Path, data: Path, controlnet: Path, out: Path, *more: str) -> list[str]:
    sampled = ["--captions", "3", "--steps", "2", "--batch", "2", "--device", "cpu"]
    return [
        *["evaluate", "--model", str(model), "--data", str(data), "--control", str(controlnet)],
        *[*sampled, "--out", str(out), *more],
    ]


def results(out: Path) -> dict:
    return json.loads((out / "control.json").read_text())


def test_a_fresh_controlnet_changes_nothing(model, data, controlnet, tmp_path, capsys):
    assert main(command(model, data, controlnet, tmp_path)) == 0
    found = results(tmp_path)
    control = found["results"]["control"]
    assert control["0"] == control["0.5"] == control["1"] and control["0"]["error"] > 0
    assert found["results"]["train"]["0"] == found["results"]["train"]["1"]
    assert found["results"]["count"] == 4 and found["settings"]["annotator"] == "canny:low=50,high=100"
    assert found["settings"]["controlnet"] and found["settings"]["hints"] == 100
    told = capsys.readouterr().out
    assert "captions right" in told and str(tmp_path / "control.json") in told
    sheet = Image.open(next(tmp_path.glob("control-*.png")))
    assert sheet.width == 16 * 34 + 2 and sheet.height == 34 + 2  # hint and three scales, four times


def test_a_perfect_one_has_no_error(model, data, controlnet, tmp_path, monkeypatch):
    """In its place the real pictures, which follow their hints and show what the captions say; without control
    pictures of something else."""
    by_text = {f"box {n}": to_tensor(read_rgb(data / f"{n}.png")) for n in range(COUNT)}

    def sample(self, prompts, *, controls, first, **how):
        shift = 0 if controls[0].scale == 1 else 1
        assert len(controls[0].hint) == len(prompts)
        return torch.stack([by_text[f"box {(int(p.split()[1]) + shift) % COUNT}"] for p in prompts])

    monkeypatch.setattr(Pipeline, "txt2img", sample)
    assert main(command(model, data, controlnet, tmp_path, "--annotator", "canny", "--hints", "3")) == 0
    found = results(tmp_path)["results"]
    assert found["count"] == 3 and results(tmp_path)["settings"]["annotator"] == "canny"
    assert found["control"]["1"] == {"error": 0.0, "difference": 0.0}
    assert found["control"]["0"]["error"] > 1 and found["control"]["reconstructed"]["error"] > 0
    assert found["train"]["1"]["right"] == 1.0 and found["train"]["0"]["right"] < 1


def test_errors_are_of_each_picture(data):
    images = torch.stack([to_tensor(read_rgb(data / f"{n}.png")) for n in range(3)])
    hints = hints_of(images, "canny")
    assert hints.shape == (3, 3, 32, 32) and hints.dtype == torch.uint8
    moved = images.clone()
    moved[1] = moved[1].roll(2, dims=2)
    found = control_errors(hints, moved, "canny")
    assert found["error"][0] == found["error"][2] == 0 and 0.2 < found["error"][1] <= 2
    assert found["difference"][1] > 0 and hints_of(images[:0], "canny").shape == (0, 3, 32, 32)


def test_reconstruction_is_that_of_the_autoencoder(pipe, data):
    images = torch.stack([to_tensor(read_rgb(data / f"{n}.png")) for n in range(2)])
    expected = pipe.autoencoder.decode(pipe.autoencoder.encode(images).mode()).clamp(-1, 1)
    torch.testing.assert_close(reconstructed(pipe, images), expected.detach(), atol=1e-5, rtol=0)
    assert len(reconstructed(pipe, images[:0])) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hints", "0"], "--hints must be at least 1, got 0"),
        (["--annotator", "cany"], "no annotator 'cany'; did you mean canny?"),
        (["--control", "nowhere"], "ControlNet 'nowhere'"),
    ],
)
def test_mistakes_are_told_in_one_line(model, data, controlnet, tmp_path, capsys, more, message):
    assert main(command(model, data, controlnet, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0], told
    assert not (tmp_path / "out").exists()


def test_a_controlnet_of_others_needs_the_annotator(model, data, pipe, tmp_path, capsys):
    made = ControlNet.from_unet(pipe.unet, hint_widths=(4, 8, 8))
    save_part(tmp_path / "controlnet.safetensors", made, torch.float32)
    assert control_study.annotator_of(tmp_path / "controlnet.safetensors") is None
    assert main(command(model, data, tmp_path / "controlnet.safetensors", tmp_path / "out")) == 2
    assert "does not say what its hints are made by; give --annotator" in capsys.readouterr().err
