"""The second pass of `--hires`, by hand and bit for bit, and decoding in tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.editing import upscale_latents
from sample import txt2img
from sample.__main__ import main
from sample.images import cover, read_parameters, to_pil, to_tensor
from sample.pipeline import Pipeline
from sample.settings import Wording
from sample.start import Start

HOW: dict[str, Any] = {"steps": 4, "seed": 3, "wording": Wording(syntax="webui")}
LARGE = (64, 48)


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command."""
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)


def run(out: Path, *arguments: object) -> int:
    common = ["--out", str(out), "--device", "cpu", "--steps", "4", "--seed", "3"]
    return main([*map(str, arguments), *common])


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def last(steps: Any) -> Tensor:
    *_, step = steps
    return step.sample


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "pixels"])
def test_by_hand(pipe: Pipeline, tmp_path: Path, mode: str) -> None:
    small = last(pipe.stream(["an apple", "a fish"], **HOW))
    if mode == "pixels":
        enlarged = [picture.resize(LARGE, Image.Resampling.LANCZOS) for picture in to_pil(pipe.decode(small))]
        start = pipe.start(torch.stack([to_tensor(each) for each in enlarged]), [0, 1], strength=0.6, seed=3)
    else:
        start = Start(upscale_latents(small, (12, 16), mode), 0.6)
    second = list(pipe.stream(["an apple", "a fish"], start=start, **HOW))
    assert len(second) == 2  # 0.6 of 4 steps
    expected = to_pil(pipe.decode(second[-1].sample))
    arguments = ["--hires", "64x48", *([] if mode == "bicubic" else ["--hires-mode", mode])]
    assert run(tmp_path, "txt2img", "an apple", "a fish", *arguments) == 0
    for i, picture in enumerate(expected):
        assert picture.size == LARGE
        assert np.array_equal(pixels(tmp_path / f"0000{i}.png"), np.array(picture))
    assert Image.open(tmp_path / "grid-0000.png").height > 48


def test_the_modes_differ(pipe: Pipeline, tmp_path: Path) -> None:
    made = set()
    for mode in txt2img.HIRES_MODES:
        assert run(tmp_path / mode, "txt2img", "a", "--hires", "64x48", "--hires-mode", mode) == 0
        made.add((tmp_path / mode / "00000.png").read_bytes()[-2000:])
    assert len(made) == 4


def test_strength_counts_and_0_is_the_enlarged_picture(pipe: Pipeline, tmp_path: Path) -> None:
    for strength in (0, 0.3, 1):
        out = tmp_path / str(strength)
        assert run(out, "txt2img", "a", "--hires", "64x48", "--hires-strength", strength) == 0
    small = last(pipe.stream(["a"], **HOW))
    expected = to_pil(pipe.decode(upscale_latents(small, (12, 16))))[0]
    assert np.array_equal(pixels(tmp_path / "0" / "00000.png"), np.array(expected))
    forgotten = to_pil(pipe.txt2img("a", size=LARGE, **HOW))[0]
    assert np.array_equal(pixels(tmp_path / "1" / "00000.png"), np.array(forgotten))
    between = pixels(tmp_path / "0.3" / "00000.png")
    assert not np.array_equal(between, np.array(expected))
    assert not np.array_equal(between, np.array(forgotten))


def test_after_a_picture(pipe: Pipeline, tmp_path: Path) -> None:
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "in.png")
    out = tmp_path / "out"
    arguments = ["--strength", "0.5", "--hires", "48x48"]
    assert run(out, "img2img", tmp_path / "in.png", "a", *arguments) == 0
    image = to_tensor(cover(Image.open(tmp_path / "in.png"), (32, 32)))[None]
    first = last(pipe.stream(["a"], start=pipe.start(image, [0], strength=0.5, seed=3), **HOW))
    second = last(pipe.stream(["a"], start=Start(upscale_latents(first, (12, 12)), 0.6), **HOW))
    assert np.array_equal(pixels(out / "00000.png"), np.array(to_pil(pipe.decode(second))[0]))


def test_again(tmp_path: Path) -> None:
    arguments = ["--hires", "64x48", "--hires-strength", "0.4", "--hires-mode", "nearest", "--tile", "6"]
    assert run(tmp_path / "a", "txt2img", "a", "-n", "2", *arguments) == 0
    picture = tmp_path / "a" / "00001.png"
    p = read_parameters(picture)
    assert (p["size"], p["hires"], p["hires_strength"], p["hires_mode"], p["tile"]) == (
        [32, 32], [64, 48], 0.4, "nearest", 6
    )  # fmt: skip
    assert main(["again", str(picture), "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(pixels(tmp_path / "b" / "00000.png"), pixels(picture))
    assert read_parameters(tmp_path / "b" / "00000.png") == p


def test_tiles(pipe: Pipeline, tmp_path: Path) -> None:
    """The same in one tile; in several near it, where the tiles are large for what a cell can see."""
    how = ["txt2img", "a", "--size", "128x96"]
    assert run(tmp_path / "whole", *how) == 0
    assert run(tmp_path / "one", *how, "--tile", 32) == 0
    assert run(tmp_path / "four", *how, "--tile", 20) == 0
    whole, one, four = (
        pixels(tmp_path / name / "00000.png").astype(int) for name in ("whole", "one", "four")
    )
    assert np.array_equal(whole, one)
    assert not np.array_equal(whole, four)
    assert np.abs(whole - four).mean() < 0.2 * np.abs(whole - whole.mean((0, 1))).mean()
    latents = last(pipe.stream(["a"], size=(128, 96), **HOW))
    assert_close(to_tensor(Image.fromarray(four.astype(np.uint8))), pipe.decode(latents, tile=20)[0],
                 rtol=0, atol=1.01 / 127.5)  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [
    (["--hires", "60x48"], "size 60x48: sides must be multiples of 8; the nearest is 64x48"),
    (["--hires", "64x48", "--hires-strength", "1.5"], "strength must be between 0"),
    (["--hires", "64x48", "--hires-mode", "lanczos"], "--hires-mode must be one of nearest, bilinear"),
    (["--tile", "0"], "--tile must be at least 1 latent cell, got 0"),
    (["--tile", "-4", "--hires", "64x48"], "--tile must be at least 1 latent cell, got -4"),
])  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, pipe: Pipeline,
) -> None:  # fmt: skip
    monkeypatch.setattr(type(pipe), "stream", None)  # told before any work
    assert run(tmp_path / "out", "txt2img", "a", *arguments) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert message in told.err
    assert not (tmp_path / "out").exists()


def test_a_size_of_another_form(capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in {"--hires=64": "'64' is not a size like 64x64", "--tile=x": "invalid int"}.items():
        with pytest.raises(SystemExit) as caught:
            main(["txt2img", "a", option])
        told = capsys.readouterr().err
        assert (caught.value.code, told.count("\n")) == (2, 1)
        assert message in told
