"""`ldm-sample txt2img` and `reconstruct`: files, parameters that remake a picture, one line an error."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.device import DTYPES
from sample.__main__ import main
from sample.images import read_parameters, to_pil
from sample.pipeline import Pipeline

ROOT = Path(ldm.__file__).parent.parent


def txt2img(model: Path, out: Path, *arguments: str) -> int:
    return main(
        ["txt2img", "--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "2", *arguments]
    )


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_pictures_and_a_grid(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new folder" / "é"
    assert txt2img(model, out, "a red apple", "", "-n", "2", "--batch", "3") == 0
    pictures = [f"0000{i}.png" for i in range(4)]
    assert names(out) == [*pictures, "grid-0000.png"]
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(out / name) for name in names(out)]
    assert told.err == ""
    assert [read_parameters(out / name)["prompt"] for name in pictures] == ["a red apple"] * 2 + [""] * 2
    sheet = pixels(out / "grid-0000.png")  # a row a prompt
    assert sheet.shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    assert np.array_equal(sheet[36:68, 2:34], pixels(out / pictures[2]))
    assert read_parameters(out / "grid-0000.png")["prompts"] == ["a red apple", ""]


def test_a_single_picture_needs_no_grid_and_replaces_nothing(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert txt2img(model, tmp_path, "a red apple") == 0
    assert names(tmp_path) == ["00000.png", "00001.png"]
    assert np.array_equal(pixels(tmp_path / "00000.png"), pixels(tmp_path / "00001.png"))


def test_batch_size_changes_no_picture(model: Path, tmp_path: Path) -> None:
    for batch in (1, 4):
        txt2img(
            model, tmp_path / str(batch), "a red apple", "-n", "4", "--batch", str(batch), "--sampler", "ddpm"
        )
    for i in range(4):
        one, four = (pixels(tmp_path / batch / f"0000{i}.png").astype(int) for batch in "14")
        assert np.abs(one - four).max() <= 1
        assert np.abs(one - four).mean() < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_remake_the_picture(model: Path, tmp_path: Path, dtype: str) -> None:
    arguments = (
        "--seed 11 -n 2 --batch 1 --sampler euler_ancestral --steps 3 --guidance 2.5 --size 40x24 --dtype"
    )
    txt2img(model, tmp_path, "ein Äpfelchen 🍎", "--negative", "a fish", *arguments.split(), dtype)
    p = read_parameters(tmp_path / "00001.png")
    assert set(p) == {
        "command", "prompt", "negative", "image", "seed", "steps", "sampler", "guidance", "size",
        "model", "weights", "dtype", "device", "versions",
    }  # fmt: skip
    assert p["versions"]["torch"] == torch.__version__
    pipe = Pipeline.load(p["model"], p["device"], DTYPES[p["dtype"]])
    images = pipe.txt2img(
        p["prompt"], negative=p["negative"], seed=p["seed"], first=p["image"], steps=p["steps"],
        sampler=p["sampler"], guidance=p["guidance"], size=tuple(p["size"]),
    )  # fmt: skip
    assert np.array_equal(np.array(to_pil(images)[0]), pixels(tmp_path / "00001.png"))


def test_a_long_prompt_is_told_what_is_cut(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert txt2img(model, tmp_path, "apple " * 75 + "seventysixth word", "--long-prompts", "cut") == 0
    told = capsys.readouterr().err
    assert told.startswith("ldm-sample: warning: prompt 'apple apple")
    assert "exceeds the model's 77 tokens; not read: 'seventysixth word'" in told
    assert told.count("\n") == 1


def test_a_long_prompt_is_read_in_chunks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words behind the 75th token change the picture, unless they are cut."""
    long = "apple " * 75
    for name, prompt, *options in (
        ("a", long + "seventysixth word"),
        ("b", long + "something else"),
        ("c", long + "something else", "--long-prompts", "cut"),
        ("d", long, "--long-prompts", "cut"),
    ):
        assert txt2img(model, tmp_path / name, prompt, *options) == 0
        if not options:
            assert "exceeds the model's 77 tokens; read in 2 chunks" in capsys.readouterr().err
    made = {name: pixels(tmp_path / name / "00000.png") for name in "abcd"}
    assert not np.array_equal(made["a"], made["b"])
    assert np.array_equal(made["c"], made["d"])


def test_a_negative_prompt_without_effect_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert txt2img(model, tmp_path, "apple", "--negative", "fish", "--guidance", "1") == 0
    assert capsys.readouterr().err == "ldm-sample: warning: --negative has no effect with --guidance 1\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--steps", "0"], "steps must be between 1 and 1000, got 0"),
    (["--steps", "1001"], "steps must be between 1 and 1000, got 1001"),
    (["--guidance", "nan"], "guidance scale must be a finite number"),
    (["--guidance", "1e39"], "not finite after step 1 of 2"),
    (["--sampler", "dimm"], "unknown sampler 'dimm': did you mean ddim"),
    (["--size", "30x32"], "the nearest is 32x32"),
    (["-n", "0"], "-n must be at least 1 picture a prompt, got 0"),
    (["--batch", "0"], "a batch of at least 1"),
    (["--model", "emojy"], "model 'emojy' is no shipped name, no file and no folder"),
    (["--device", "abacus"], "device 'abacus' cannot be used here"),
    (["--dtype", "float7"], "number format 'float7' is unknown; one of float32"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert txt2img(model, tmp_path / "out", "a red apple", *arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("ldm-sample: error: ")
    assert message in told.err
    assert names(tmp_path) == []


def test_out_that_is_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert txt2img(model, tmp_path / "out", "a") == 2
    assert "out is a file; expected a folder to write to" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, calls = Pipeline.decode, iter(range(9))

    def interrupted(self: Pipeline, latents: torch.Tensor, tile: None) -> torch.Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(Pipeline, "decode", interrupted)
    assert txt2img(model, tmp_path, "a red apple", "-n", "3", "--batch", "2") == 130
    assert names(tmp_path) == ["00000.png", "00001.png"]
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(tmp_path / name) for name in names(tmp_path)]
    assert told.err == "ldm-sample: interrupted\n"


def test_a_bare_terminal(model: Path, tmp_path: Path) -> None:
    """ASCII output, no terminal, no standard input, another folder; and a second process draws the same."""
    arguments = ["txt2img", "a 🍎", "--model", str(model), "--out", "öut 🍎", "--steps", "2"]
    txt2img(model, tmp_path / "here", "a 🍎")
    done = subprocess.run(
        [sys.executable, "-m", "sample", *arguments],
        capture_output=True,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONIOENCODING": "ascii",
            "HOME": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"00000.png" in done.stdout
    (written,) = (tmp_path / "öut 🍎").iterdir()
    assert np.array_equal(pixels(written), pixels(tmp_path / "here" / "00000.png"))


# --- reconstruct --------------------------------------------------------------------------------------------


def reconstruct(model: Path, out: Path, *arguments: str) -> int:
    return main(["reconstruct", "--model", str(model), "--out", str(out), "--device", "cpu", *arguments])


def test_reconstruct(model: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a b.png")
    Image.new("RGB", (33, 35), "white").save(tmp_path / "odd.png")
    assert reconstruct(model, tmp_path / "out", str(tmp_path / "a b.png"), str(tmp_path / "odd.png")) == 0
    told = capsys.readouterr()
    assert "odd.png: cut from 33x35 to 32x32, multiples of 4" in told.err
    sheet = pixels(tmp_path / "out" / "reconstruct-0000.png")
    assert np.array_equal(sheet[2:34, 2:50], noise)
    image = torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(image).mode()).clamp(-1, 1)
    assert np.array_equal(sheet[2:34, 52:100], np.array(to_pil(decoded)[0]))
    expected = 10 * np.log10(4 / float((image - decoded).square().mean()))
    first, second, mean = (float(line.split(" dB")[0]) for line in told.out.splitlines())
    assert first == pytest.approx(expected, abs=0.006)
    assert mean == pytest.approx((first + second) / 2, abs=0.011)


def test_reconstruct_needs_no_unet(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run" / "model"
    run.mkdir(parents=True)
    (run / "autoencoder.safetensors").write_bytes((model / "autoencoder.safetensors").read_bytes())
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    assert reconstruct(tmp_path / "run", tmp_path / "out", str(tmp_path / "red.png")) == 0


def test_reconstruct_reads_all_before_it_writes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    Image.new("RGB", (3, 32)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (
        ("text.png", "not an image"),
        ("small.png", "3x32 is below the model's smallest size 4x4"),
    ):
        assert reconstruct(model, tmp_path / "out", str(tmp_path / "good.png"), str(tmp_path / name)) == 2
        told = capsys.readouterr().err
        assert f"{name}: {message}" in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
