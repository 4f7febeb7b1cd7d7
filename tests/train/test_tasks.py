"""Both training tasks end to end through the command line, on a made set: train, export, sample, resume,
refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.weights.io import load_weights
from sample.__main__ import main as sample
from sample.pipeline import Pipeline
from train.__main__ import main as train

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 170, 60)}
SHAPES = ("square", "circle")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """48 captioned pictures: three colours, two shapes, several sizes; six of them held out."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for number in range(48):
        colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 2]
        picture = Image.new("RGB", (32, 32), "white")
        inset = 4 + number // 6
        draw = ImageDraw.Draw(picture)
        (draw.rectangle if shape == "square" else draw.ellipse)(
            (inset, inset, 31 - inset, 31 - inset), COLOURS[colour]
        )
        picture.save(folder / f"{number:02}.png")
        split = "heldout_image" if number >= 42 else "train"
        concept = f"{colour} {shape}"
        rows.append(
            {
                "file_name": f"{number:02}.png",
                "text": f"a {concept}",
                "concept": concept,
                "style": "flat",
                "split": split,
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory) -> Path:
    """The two `tiny` configurations, trained one on the other."""
    folder = tmp_path_factory.mktemp("runs")
    assert (
        train(["autoencoder", "configs/train/tiny_autoencoder.yaml", *places(shapes, folder, "autoencoder")])
        == 0
    )
    assert train(["diffusion", "configs/train/tiny.yaml", *places(shapes, folder, "diffusion")]) == 0
    return folder


def places(shapes: Path, folder: Path, task: str) -> list[str]:
    overrides = [f"data.path={shapes}", f"run.out={folder / task}", "run.device=cpu"]
    first_stage = f"autoencoder={folder}/autoencoder/model/autoencoder.safetensors"
    return (
        overrides
        if task == "autoencoder"
        else [*overrides, first_stage, "preview.prompts=[a red square,a blue circle]"]
    )


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_autoencoder_learns(runs):
    scores = [row["heldout_psnr"] for row in log(runs / "autoencoder") if "heldout_psnr" in row]
    assert scores[-1] > scores[0] > 5 and scores[-1] > 12


def test_autoencoder_export_measures_scale_and_shift(runs, shapes):
    """What the exported autoencoder encodes has zero mean and unit variance over the training images."""
    pipeline = Pipeline.load(runs / "diffusion", device="cpu")
    files = sorted(shapes.glob("*.png"))[:42]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    latents = pipeline.autoencoder.encode_latents(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(latents.mean(), torch.tensor(0.0), atol=2e-2, rtol=0)
    torch.testing.assert_close(latents.std(), torch.tensor(1.0), atol=2e-2, rtol=0)


def test_diffusion_learns(runs):
    rows = log(runs / "diffusion")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert [row["step"] for row in rows if "validation_loss" in row] == [30, 60]
    assert len(list((runs / "diffusion" / "previews").glob("*.png"))) == 2


def test_a_rectified_flow_trains_and_samples(runs, shapes, tmp_path):
    """The other way to make noise of pictures, by two values of the same configuration."""
    flow = ["diffusion.schedule=flow", "diffusion.prediction=flow", "diffusion.shift=2.0"]
    where = [*places(shapes, runs, "diffusion")[2:], f"data.path={shapes}", f"run.out={tmp_path / 'flow'}"]
    steps = ["run.steps=30", "run.log_every=5"]
    assert train(["diffusion", "configs/train/tiny.yaml", *where, *flow, *steps]) == 0
    losses = [row["loss"] for row in log(tmp_path / "flow") if "loss" in row]
    assert losses[-1] < losses[0]
    how = ["--model", str(tmp_path / "flow"), "--device", "cpu", "--sampler", "euler", "--steps", "4"]
    assert sample(["txt2img", "a red square", *how, "--out", str(tmp_path / "out")]) == 0
    assert np.array(Image.open(tmp_path / "out" / "00000.png")).std() > 1


def test_the_trained_model_samples_from_the_command_line(runs, tmp_path, capsys):
    command = [
        "txt2img",
        "a red square",
        "-n",
        "2",
        "--steps",
        "3",
        "--model",
        str(runs / "diffusion"),
        "--device",
        "cpu",
    ]
    assert sample([*command, "--out", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 3  # two pictures and their grid


def test_resumed_diffusion_equals_uninterrupted(runs, shapes, tmp_path):
    """A copy of the run, cut back to step 40 and resumed, ends in the same weights, bit for bit."""
    shutil.copytree(runs / "diffusion", tmp_path / "diffusion")
    (tmp_path / "diffusion" / "states" / "step-00000060.safetensors").unlink()
    (tmp_path / "diffusion" / "model" / "unet.safetensors").unlink()
    shutil.copytree(runs / "autoencoder", tmp_path / "autoencoder")
    overrides = places(shapes, runs, "diffusion")
    overrides[1] = f"run.out={tmp_path / 'diffusion'}"
    assert train(["diffusion", "configs/train/tiny.yaml", *overrides, "--resume"]) == 0
    for name in ("unet", "text_encoder"):
        expected, _ = load_weights(runs / "diffusion" / "model" / f"{name}.safetensors")
        resumed, _ = load_weights(tmp_path / "diffusion" / "model" / f"{name}.safetensors")
        assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def one_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ldm-train: error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["run.stesp=3"], "run.stesp"),
        (["run.steps=many"], "run.steps"),
        (["run.batch=0"], "run.batch"),
        (["data.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["autoencoder=/nowhere/ae.safetensors"], "/nowhere/ae.safetensors"),
        (["data.size=64"], "data.size"),
        (["text.width=64"], "context"),
        (["caption_dropout=2"], "caption_dropout"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(runs, shapes, tmp_path, capsys, overrides, told):
    good = places(shapes, runs, "diffusion")
    good[1] = f"run.out={tmp_path / 'new'}"
    assert train(["diffusion", "configs/train/tiny.yaml", *good, *overrides]) == 2
    assert told in one_error(capsys)
    assert not (tmp_path / "new" / "states").exists()


def test_resume_with_changed_values_says_what_differs(runs, shapes, capsys):
    command = ["diffusion", "configs/train/tiny.yaml", *places(shapes, runs, "diffusion")]
    assert train([*command, "run.lr=0.5", "--resume"]) == 2
    assert "run.lr: 0.002 -> 0.5" in one_error(capsys)


def test_a_used_run_folder_is_refused(runs, shapes, capsys):
    assert train(["diffusion", "configs/train/tiny.yaml", *places(shapes, runs, "diffusion")]) == 2
    assert "--resume" in one_error(capsys)


def test_truncated_autoencoder_is_named(runs, shapes, tmp_path, capsys):
    whole = (runs / "autoencoder/model/autoencoder.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    overrides = [
        *places(shapes, runs, "diffusion"),
        f"autoencoder={tmp_path / 'cut.safetensors'}",
        f"run.out={tmp_path / 'x'}",
    ]
    assert train(["diffusion", "configs/train/tiny.yaml", *overrides]) == 2
    assert "cut.safetensors" in one_error(capsys)


@pytest.mark.parametrize("task", ["autoencoder", "diffusion"])
def test_dry_run_writes_nothing(runs, shapes, tmp_path, capsys, task):
    config = {"autoencoder": "tiny_autoencoder", "diffusion": "tiny"}[task]
    overrides = places(shapes, runs, task)
    overrides[1] = f"run.out={tmp_path / 'new'}"
    assert train([task, f"configs/train/{config}.yaml", *overrides, "--dry-run"]) == 0
    assert "60 steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def codes(shapes, tmp_path_factory) -> Path:
    """A first stage with a codebook, by the shipped configuration."""
    folder = tmp_path_factory.mktemp("codes") / "run"
    config = "configs/train/tiny_vq_autoencoder.yaml"
    where = [f"data.path={shapes}", f"run.out={folder}", "run.device=cpu", "run.steps=40"]
    assert train(["autoencoder", config, *where]) == 0
    return folder


def test_a_vq_autoencoder_learns(codes):
    rows = log(codes)
    scores = [row["heldout_psnr"] for row in rows if "heldout_psnr" in row]
    assert scores[-1] > 12
    used = [row["perplexity"] for row in rows if "perplexity" in row]
    assert used[-1] > 2 and sum(row.get("revived", 0) for row in rows) > 0


def test_a_vq_autoencoder_reconstructs_from_the_command_line(codes, shapes, tmp_path, capsys):
    command = ["reconstruct", "--model", str(codes), "--device", "cpu", "--out", str(tmp_path)]
    assert sample([*command, str(shapes / "42.png"), str(shapes / "43.png")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert float(last.split(" dB")[0]) > 10 and "SSIM" in last
    assert len(list(tmp_path.glob("reconstruct-*.png"))) == 2


def test_diffusion_trains_on_a_vq_autoencoder(codes, shapes, tmp_path, capsys):
    first_stage = f"autoencoder={codes}/model/autoencoder.safetensors"
    where = [f"data.path={shapes}", f"run.out={tmp_path / 'run'}", "run.device=cpu", "run.steps=5"]
    preview = ["preview.prompts=[a red square]", "preview.steps=2"]
    assert train(["diffusion", "configs/train/tiny.yaml", *where, first_stage, *preview]) == 0
    how = ["--model", str(tmp_path / "run"), "--device", "cpu", "--steps", "2"]
    assert sample(["txt2img", "a red square", *how, "--out", str(tmp_path / "out")]) == 0
    stage = Pipeline.load(tmp_path / "run", device="cpu").autoencoder
    assert stage.config.codebook_size == 64 and stage.config.scale_factor == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["loss.revive_after=5"], "loss.revive_after 5 needs codes: set autoencoder.codebook_size"),
        (["autoencoder.codebook_size=8", "loss.beta=0"], "loss.beta must be positive"),
        (["autoencoder.codebook_size=0"], "codebook_size must be at least 1"),
        (["data.size=30"], "data.size 30 is not a multiple of the autoencoder's factor 4"),
    ],
)
def test_bad_input_of_a_first_stage_is_one_line(shapes, tmp_path, capsys, overrides, told):
    good = [f"data.path={shapes}", f"run.out={tmp_path / 'new'}", "run.device=cpu"]
    assert train(["autoencoder", "configs/train/tiny_autoencoder.yaml", *good, *overrides]) == 2
    assert told in one_error(capsys)
    assert not (tmp_path / "new").exists()
