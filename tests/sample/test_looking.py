"""Looking inside by the commands: the estimate at every step, and the attention to the words; no picture changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ldm.diffusion.editing import upscale_latents
from ldm.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ldm.weights.io import save_weights
from ldm.weights.tiny import to_original
from sample import txt2img
from sample.__main__ import main
from sample.images import grid, read_parameters, to_pil
from sample.looking import FRAME_MS, LAST_MS
from sample.pipeline import Pipeline
from sample.preview import enlarged, linear_previewer, tiny_previewer
from sample.settings import Wording
from sample.start import Start

HOW: dict[str, Any] = {"steps": 4, "seed": 3, "wording": Wording(syntax="webui")}


@pytest.fixture
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command."""
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)


def run(out: Path, *arguments: object) -> list[str]:
    """Runs txt2img on four steps; the names of the files."""
    common = ["--out", str(out), "--device", "cpu", "--steps", "4", "--seed", "3"]
    assert main(["txt2img", *map(str, arguments), *common]) == 0
    return sorted(path.name for path in out.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def shown(pipe: Pipeline, preview: Any, prompts: list[str], row: int = 0) -> list[Image.Image]:
    """What the previewer makes of x0 of each step."""
    return [to_pil(enlarged(preview(step.denoised)))[row] for step in pipe.stream(prompts, **HOW)]


# --- frames -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
def test_an_animation(pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    names = run(out, "an apple", "a fish", "--frames", "gif")
    pictures = ["00000-steps.gif", "00000.png", "00001-steps.gif", "00001.png", "grid-0000.png"]
    assert names == pictures
    told = capsys.readouterr().out.splitlines()
    order = ["00000.png", "00000-steps.gif", "00001.png", "00001-steps.gif", "grid-0000.png"]
    assert told == [str(out / name) for name in order]
    for row in (0, 1):
        expected = shown(pipe, linear_previewer(pipe.autoencoder), ["an apple", "a fish"], row)
        with Image.open(out / f"0000{row}-steps.gif") as animation:
            frames = [(np.array(f.convert("RGB")), dict(f.info)) for f in ImageSequence.Iterator(animation)]
            assert animation.info["loop"] == 0
        assert len(frames) == 4
        for i, (frame, info) in enumerate(frames):
            assert info["duration"] == (LAST_MS if i == 3 else FRAME_MS)
            off = [np.abs(frame.astype(int) - np.array(each).astype(int)).mean() for each in expected]
            assert off[i] == min(off) < 12  # 256 colours
    run(tmp_path / "plain", "an apple", "a fish")
    assert np.array_equal(pixels(tmp_path / "plain" / "00001.png"), pixels(out / "00001.png"))
    assert "frames" not in read_parameters(out / "00001.png")


@pytest.mark.usefixtures("loaded")
def test_a_sheet(pipe: Pipeline, tmp_path: Path) -> None:
    names = run(tmp_path, "an apple", "--frames", "sheet")
    assert names == ["00000-steps.png", "00000.png"]  # no preview.png: nobody asked for it
    expected = grid(shown(pipe, linear_previewer(pipe.autoencoder), ["an apple"]))
    assert np.array_equal(pixels(tmp_path / "00000-steps.png"), np.array(expected))


@pytest.mark.usefixtures("loaded")
def test_a_sheet_by_a_tiny_decoder(pipe: Pipeline, tmp_path: Path) -> None:
    config = TinyAutoencoderConfig(channels=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    tensors = to_original(TinyAutoencoder(config).state_dict(), config)
    decoder = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder")}
    save_weights(tmp_path / "taé.safetensors", decoder)
    out = tmp_path / "out"
    names = run(out, "an apple", "--frames", "sheet", "--preview", tmp_path / "taé.safetensors")
    assert names == ["00000-steps.png", "00000.png", "preview.png"]
    frames = shown(pipe, tiny_previewer(tmp_path / "taé.safetensors"), ["an apple"])
    assert np.array_equal(pixels(out / "00000-steps.png"), np.array(grid(frames)))
    assert np.array_equal(pixels(out / "preview.png"), np.array(grid(frames[-1:])))


@pytest.mark.usefixtures("loaded")
def test_both_passes_of_hires(pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames of both, of one size; the preview is that of the very last step, and told once."""
    options = ["--frames", "gif", "--preview", "linear", "--hires", "64x32", "--hires-strength", "0.5"]
    run(tmp_path, "an apple", *options, "--preview-every", "1")
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / name) for name in ("preview.png", "00000.png", "00000-steps.gif")
    ]
    with Image.open(tmp_path / "00000-steps.gif") as animation:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    assert [frame.shape for frame in frames] == [(96, 192, 3)] * 6
    run(tmp_path, "an apple", *options, "--preview-every", "100")
    *_, first = pipe.stream(["an apple"], **HOW)
    start = Start(upscale_latents(first.sample, (8, 16)), 0.5)
    *_, last = pipe.stream(["an apple"], start=start, **HOW)
    expected = to_pil(enlarged(linear_previewer(pipe.autoencoder)(last.denoised)))
    assert np.array_equal(pixels(tmp_path / "preview.png"), np.array(grid(expected)))


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "options", "words"), [
    ("a red apple", [], 3),
    ("a red apple", ["--guidance", "1"], 3),
    ("a red apple", ["--guidance", "3", "--apart"], 3),
    ("a red apple AND a fish:0.5", [], 3),
    ("a (red:1.4) [apple:fish:0.5]", ["--negative", "a cat"], 3),
    ("a red apple", ["--deep-cache", "2"], 3),
    ("a red apple", ["--token-merging", "0.4"], 3),
    ("a red apple", ["--hires", "64x32"], 3),
    ("a red apple", ["--pag", "2"], 3),
    ("apple " * 90, ["--clip-skip", "1"], 90),
])  # fmt: skip
def test_attention(model: Path, tmp_path: Path, prompt: str, options: list[str], words: int) -> None:
    """A tile for each word beside the picture, which is the same bit for bit."""
    arguments = [prompt, "--model", model, *options]
    assert run(tmp_path / "a", *arguments, "--attention") == ["00000-attention.png", "00000.png"]
    assert run(tmp_path / "b", *arguments, "--batch", 1) == ["00000.png"]
    assert (tmp_path / "a" / "00000.png").read_bytes() == (tmp_path / "b" / "00000.png").read_bytes()
    sheet, picture = pixels(tmp_path / "a" / "00000-attention.png"), Image.open(tmp_path / "a" / "00000.png")
    columns = int(np.ceil(np.sqrt(words)))
    assert sheet.shape[1] == columns * (192 + 2) + 2
    assert sheet.shape[0] % (192 * picture.height // picture.width) > 0  # captions below
    assert sheet.reshape(-1, 3).std(axis=0).min() > 5


@pytest.mark.usefixtures("loaded")
def test_attention_of_several_prompts(pipe: Pipeline, tmp_path: Path) -> None:
    """One picture at a time, each with its own words; the maps are of the prompt that is asked for."""
    names = run(tmp_path / "a", "a red apple", "a fish", "--attention", "--frames", "sheet")
    assert names == [
        "00000-attention.png", "00000-steps.png", "00000.png", "00001-attention.png", "00001-steps.png",
        "00001.png", "grid-0000.png",
    ]  # fmt: skip
    run(tmp_path / "b", "a red apple", "a fish", "--batch", 1)
    for name in ("00000.png", "00001.png"):
        assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))
    run(tmp_path / "c", "a fish", "--first", 1, "--attention")
    assert np.array_equal(
        pixels(tmp_path / "c" / "00000-attention.png"), pixels(tmp_path / "a" / "00001-attention.png")
    )


@pytest.mark.usefixtures("loaded")
def test_where_no_step_is_taken(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    out = tmp_path / "out"
    arguments = [
        "img2img",
        str(tmp_path / "in.png"),
        "a",
        "--strength",
        "0",
        "--attention",
        "--frames",
        "gif",
    ]
    assert main([*arguments, "--out", str(out), "--device", "cpu"]) == 0
    assert [path.name for path in out.iterdir()] == ["00000.png"]


@pytest.mark.parametrize(("options", "message"), [
    (["--frames", "avi"], "--frames must be gif or sheet, got 'avi'"),
    (["--attention"], "--attention needs a model with a CLIP text tower: this one has no words"),
    (["--attention", "--compile"],
     "--attention looks inside blocks, which --compile makes one: drop one of them"),
    (["--preview-every", "0"], "--preview-every must be at least 1 step, got 0"),
])  # fmt: skip
def test_refused(
    build: Any, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: build(text=False))
    assert main(["txt2img", "", *options, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"ldm-sample: error: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded")
def test_a_prompt_without_words(tmp_path: Path) -> None:
    """The empty prompt has nothing to attend to: its picture comes without a sheet."""
    assert run(tmp_path, "", "--attention") == ["00000.png"]
