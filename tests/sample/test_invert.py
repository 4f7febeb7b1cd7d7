"""`invert`: the numbers that are printed, the picture that came back, the edit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.grids import make_grid
from ldm.metrics import psnr
from sample import invert
from sample.__main__ import main
from sample.images import read_parameters, to_pil, to_tensor
from sample.inversion import invert_and_return
from sample.pipeline import Pipeline

NUMBER = r"(-?[0-9.]+)"


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command."""
    monkeypatch.setattr(invert, "load_pipeline", lambda args: pipe)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC).save(tmp_path / "in é.png")
    return tmp_path / "in é.png"


def run(out: Path, *arguments: object) -> int:
    return main(["invert", *map(str, arguments), "--out", str(out), "--device", "cpu"])


def denoiser(pipe: Pipeline, prompt: str, guidance: float = 1.0) -> Denoise:
    cond, nothing = pipe.encode_prompts([prompt]), pipe.encode_prompts([""])
    denoise = Denoiser(pipe.unet, pipe.schedule)

    def guided(x: Tensor, sigma: Tensor | float) -> Tensor:
        one, other = denoise(x, sigma, context=cond), denoise(x, sigma, context=nothing)
        return other + guidance * (one - other)

    return guided


@torch.no_grad()
def latents_of(pipe: Pipeline, file: Path) -> Tensor:
    return pipe.autoencoder.encode_latents(to_tensor(Image.open(file))[None])


def told(pattern: str, text: str) -> list[float]:
    match = re.fullmatch(pattern, text)
    assert match is not None, text
    return [float(number) for number in match.groups()]


def test_the_numbers(pipe: Pipeline, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(out, file, "an apple", "--steps", 6, "--iterations", 2) == 0
    output = capsys.readouterr()
    assert output.err == ""
    latents, sigmas = latents_of(pipe, file), make_grid(pipe.schedule, "trailing", 6)
    expected = invert_and_return(denoiser(pipe, "an apple"), latents, sigmas, 2, decode=pipe.decode)
    assert expected.psnr is not None
    rmse, back, alone = told(
        re.escape(f"{out / 'inverted-0000.png'}: there and back in 2 x 6 steps the latents lose ") + NUMBER
        + re.escape(" (root mean square), the picture comes back at ") + NUMBER
        + " dB; the autoencoder alone keeps it at " + NUMBER + " dB\n",
        output.out,
    )  # fmt: skip
    assert rmse == pytest.approx(float(expected.rmse), rel=0.01, abs=6e-5)
    assert back == pytest.approx(float(expected.psnr), abs=0.05)
    image = to_tensor(Image.open(file))[None]
    assert alone == pytest.approx(float(psnr(pipe.decode(latents), image)), abs=0.006)
    made = to_tensor(Image.open(out / "inverted-0000.png"))
    assert_close(made, pipe.decode(expected.back)[0], rtol=0, atol=1.1 / 127.5)
    p = read_parameters(out / "inverted-0000.png")
    names = ("command", "prompt", "edit", "steps", "iterations", "schedule", "guidance", "init")
    assert [p[name] for name in names] == ["invert", "an apple", None, 6, 2, "trailing", 1.0, str(file)]
    assert len(p["init_hash"]) == 12


def test_more_steps_and_iterations_lose_less(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*arguments: object) -> float:
        assert run(tmp_path / "out", file, "an apple", *arguments) == 0
        return float(re.findall(r"lose ([0-9.]+) ", capsys.readouterr().out)[0])

    few, more = lost("--steps", 5), lost("--steps", 20)
    assert 0 < more < 0.7 * few
    assert lost("--steps", 20, "--iterations", 6) < 0.5 * more
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["inverted-0000.png", "inverted-0001.png", "inverted-0002.png"]


def test_an_edit(pipe: Pipeline, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Back from the same noise with another prompt, guided; with none where the prompt is left out."""
    out = tmp_path / "out"
    arguments = [file, "an apple", "--edit", "a fish", "--guidance", 3, "--steps", 5]
    assert run(out, *arguments) == 0
    mean, deviation = told(
        re.escape(f"{out / 'inverted-0000.png'}: from noise of mean ") + NUMBER + " and deviation " + NUMBER
        + "\n", capsys.readouterr().out,
    )  # fmt: skip
    sigmas = make_grid(pipe.schedule, "trailing", 5)
    expected = invert_and_return(
        denoiser(pipe, "an apple"), latents_of(pipe, file), sigmas, back=denoiser(pipe, "a fish", 3)
    )
    noise = expected.noise / sigmas[0]
    assert (mean, deviation) == pytest.approx((float(noise.mean()), float(noise.std())), abs=2e-3)
    made = np.array(Image.open(out / "inverted-0000.png")).astype(int)
    wanted = np.array(to_pil(pipe.decode(expected.back))[0]).astype(int)
    assert np.abs(made - wanted).max() <= 2
    assert read_parameters(out / "inverted-0000.png")["edit"] == "a fish"
    assert run(tmp_path / "plain", file, "an apple", "--steps", 5) == 0
    plain = np.array(Image.open(tmp_path / "plain" / "inverted-0000.png")).astype(int)
    assert np.abs(made - plain).mean() > 1


def test_the_size(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", file, "--steps", 2, "--size", "24x24") == 0
    assert capsys.readouterr().err.endswith("in é.png: scaled and cut from 40x32 to 24x24\n")
    assert Image.open(tmp_path / "out" / "inverted-0000.png").size == (24, 24)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--iterations", "0"], "--iterations must be at least 1, got 0"),
    (["--schedule", "compvis"], "inversion needs levels that fall to 0 from a finite one, got"),
    (["--schedule", "karas"], "karras"),
    (["--steps", "0"], "steps must be between 1 and 1000, got 0"),
    (["--size", "30x32"], "the nearest is 32x32"),
    (["--guidance", "3"], "--guidance is for the way back to another prompt: give it with --edit"),
    (["--edit", "b", "--guidance", "nan"], "guidance scale must be a finite number, got nan"),
])  # fmt: skip
def test_mistakes_are_one_line(
    file: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", file, "a", *arguments) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert message in output.err
    assert not (tmp_path / "out").exists()


def test_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", tmp_path / "nowhere.png") == 2
    assert capsys.readouterr().err == f"ldm-sample: error: {tmp_path / 'nowhere.png'}: no such file\n"
    assert not (tmp_path / "out").exists()
