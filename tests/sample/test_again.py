"""A picture made again from its own text: bit-equal, or with a change; and the text other programs read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sample.__main__ import main
from sample.images import read_parameters, save_png, web_ui_text


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def make(model: Path, out: Path, *arguments: object) -> Path:
    """Runs a command of two steps; the path of its first picture."""
    common = ["--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "2"]
    assert main([*map(str, arguments), *common]) == 0
    return out / "00000.png"


def again(picture: Path, out: Path, *arguments: object) -> int:
    return main(["again", str(picture), "--out", str(out), *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A picture and a mask, with names that need care."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "--in é.png")
    Image.fromarray((np.arange(40) > 20).repeat(32).reshape(40, 32).T).save(tmp_path / "mask.png")
    return [str(tmp_path / "--in é.png"), str(tmp_path / "mask.png")]


COMMANDS: dict[str, list[object]] = {
    "txt2img": ["txt2img", "ein Äpfelchen 🍎\nin two lines", "--negative=-a, fish: red", "--size", "40x24"],
    "odd prompts": ["txt2img", "--guidance", "2.1", "--seed", str(2**66), "--", "--seed 3"],
    "stochastic": ["txt2img", "a", "--sampler", "euler_ancestral", "-n", 3, "--batch", 3, "--first", 5],
    "variation": ["txt2img", "a", "--variation-seed", 7, "--variation-strength", 0.3, "--dtype", "bfloat16"],
    "sampler": [
        *("txt2img", "a", "--sampler", "unipc", "--schedule", "karras", "--sampler-option", "order=3"),
        *("--sampler-option", "variant=bh1"),
    ],
    "img2img": ["img2img", "IN", "a", "--strength", 0.37, "--exact-steps", "-n", 2],
    "inpaint": ["inpaint", "IN", "MASK", "a", "b", "--resample", 2, "--no-paste", "--strength", 0.9],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_bit_equal(
    command: str, model: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = dict(zip(("IN", "MASK"), files, strict=True))
    options = [f"--model={model}", f"--out={tmp_path / 'out'}", "--device=cpu", "--steps=2"]
    first, *rest = [str(places.get(str(each), each)) for each in COMMANDS[command]]
    assert main([first, *options, *rest]) == 0
    made = sorted((tmp_path / "out").glob("0*.png"))
    capsys.readouterr()
    for i, picture in enumerate(made):
        assert again(picture, tmp_path / "again") == 0
        told = capsys.readouterr()
        repeated = tmp_path / "again" / f"{i:05d}.png"  # one, of whatever batch it was made in
        assert (told.out, told.err) == (f"{repeated}\n", "")
        assert np.array_equal(pixels(repeated), pixels(picture))
        assert read_parameters(repeated) == read_parameters(picture)


def test_a_grid_again(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path / "out", "txt2img", "a", "b", "-n", 2, "--batch", 3, "--first", 4)
    assert again(tmp_path / "out" / "grid-0000.png", tmp_path / "again") == 0
    names = ["00000.png", "00001.png", "00002.png", "00003.png", "grid-0000.png"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(tmp_path / "again" / name))


def test_with_a_change(model: Path, files: list[str], tmp_path: Path) -> None:
    """The rest stays, and only the one picture is made."""
    make(model, tmp_path / "out", "img2img", files[0], "a", "-n", 2, "--strength", 0.4, "--guidance", 3)
    picture = tmp_path / "out" / "00001.png"
    assert again(picture, tmp_path / "again", "--strength", "0.8", "a blue fish", "--seed", 4) == 0
    expected = {**read_parameters(picture), "strength": 0.8, "prompt": "a blue fish", "seed": 4}
    del expected["together"]
    assert read_parameters(tmp_path / "again" / "00000.png") == expected
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["00000.png"]
    command = ["img2img", files[0], "a blue fish", "--strength", 0.8, "--guidance", 3, "--seed", 4]
    by_hand = make(model, tmp_path / "by hand", *command, "--first", 1)
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(by_hand))
    assert again(picture, tmp_path / "more", "-n", 2) == 0
    assert read_parameters(tmp_path / "more" / "00001.png")["image"] == 2


def test_differences_are_told(
    model: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = make(model, tmp_path / "out", "inpaint", *files, "a")
    p = read_parameters(picture)
    p["versions"]["torch"], p["weights"] = "1.0", "123456789abc"
    save_png(Image.open(picture), picture, p)
    Image.new("RGB", (40, 32)).save(files[0])
    capsys.readouterr()
    assert again(picture, tmp_path / "again") == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" differ: ")[0] for line in told] == [
        f"ldm-sample: warning: {name}" for name in ("versions", "init_hash", "weights")
    ]
    assert "the picture was made with 123456789abc, now " in told[2]


def test_options_that_change_no_picture_are_not_read_from_it(model: Path, tmp_path: Path) -> None:
    picture = make(model, tmp_path / "out", "txt2img", "a")
    p = {**read_parameters(picture), "out": str(tmp_path / "elsewhere"), "preview": "linear", "debug": True}
    save_png(Image.open(picture), picture, p)
    assert again(picture, tmp_path / "again") == 0
    assert not (tmp_path / "elsewhere").exists()
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["00000.png"]


def test_how_a_checkpoint_is_read_is_kept(model: Path, tmp_path: Path) -> None:
    picture = make(model, tmp_path / "out", "txt2img", "a", "--prediction", "v", "--allow-nan")
    assert read_parameters(picture)["reading"] == {"prediction": "v", "allow_nan": True}
    assert again(picture, tmp_path / "again") == 0
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(picture))
    plain = make(model, tmp_path / "plain", "txt2img", "a")
    assert not np.array_equal(pixels(plain), pixels(picture))


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"command": "reconstruct"}, "was made by 'reconstruct'; again knows txt2img, img2img, inpaint"),
    ({"command": ["txt2img"]}, "was made by ['txt2img']"),
    ({"command": None}, "was made by None"),
    ({"prompt": 7}, "its parameters are not complete (prompts and paths must be text)"),
    ({"prompt": None}, "prompts and paths must be text"),
    ({"image": "x"}, "picture numbers must be whole numbers"),
    ({"together": {"first": 0, "prompts": []}}, "prompts and paths must be text"),
    ({"together": 3}, "its parameters are not complete"),
    ({"reading": {"seed": 1}}, "'reading' knows only kind"),
    ({"model": "/nowhere"}, "model '/nowhere' is no shipped name"),
    ({"sampler": "x y"}, "unknown sampler 'x y'"),
    ({"size": [30, 30]}, "the nearest is 32x32"),
    ({"guidance": float("nan")}, "guidance scale must be a finite number"),
])  # fmt: skip
def test_parameters_of_another_form(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = make(model, tmp_path / "out", "txt2img", "a")
    save_png(Image.open(picture), picture, {**read_parameters(picture), **change})
    capsys.readouterr()
    assert again(picture, tmp_path / "again") == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("ldm-sample: error: ")
    assert message in told.err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("change", "arguments", "message"), [
    ({"seed": "many"}, [], "argument --seed: invalid int value: 'many'"),
    ({"size": {"a": 1}}, [], "is not a size like 64x64"),
    ({}, ["--nope"], "unrecognized arguments: --nope"),
    ({}, ["--steps", "x"], "argument --steps: invalid int value: 'x'"),
])  # fmt: skip
def test_options_of_another_form(
    model: Path, tmp_path: Path, change: dict[str, Any], arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture = make(model, tmp_path / "out", "txt2img", "a")
    save_png(Image.open(picture), picture, {**read_parameters(picture), **change})
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        again(picture, tmp_path / "again", *arguments)
    told = capsys.readouterr().err
    assert (caught.value.code, told.count("\n")) == (2, 1)
    assert message in told
    assert not (tmp_path / "again").exists()


def test_files_that_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, chunk in (("list.png", "[1]"), ("broken.png", "{"), ("deep.png", "[" * 100_000)):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("ldm", chunk)
        Image.new("RGB", (4, 4)).save(tmp_path / name, pnginfo=info)
    data = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:20])
    for name, message in {
        "plain.png": "carries no parameters of ours", "text.png": "text.png: unreadable image (cannot identify",
        "list.png": "holds no parameters", "broken.png": "is not JSON", "deep.png": "is not JSON",
        "absent.png": "No such file", "cut.png": "cut.png: unreadable image",
    }.items():  # fmt: skip
        assert again(tmp_path / name, tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert message in told, name
        assert told.count("\n") == 1, name
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_gone(
    model: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = make(model, tmp_path / "out", "img2img", files[0], "a")
    Path(files[0]).unlink()
    capsys.readouterr()
    assert again(picture, tmp_path / "again") == 2
    assert capsys.readouterr().err == f"ldm-sample: error: {files[0]}: no such file\n"


# --- the web UI's text --------------------------------------------------------------------------------------


def test_web_ui_text(model: Path, tmp_path: Path) -> None:
    arguments = (
        "--sampler euler_ancestral --guidance 6.5 --seed 11 --variation-seed 5 --variation-strength .25"
    )
    picture = make(
        model, tmp_path / "out", "txt2img", "a 🍎\n2", "--negative", "fish, red", *arguments.split()
    )
    text = Image.open(picture).text["parameters"]  # type: ignore[attr-defined]
    lines = text.split("\n")
    assert lines[:3] == ["a 🍎", "2", "Negative prompt: fish, red"]
    p = read_parameters(picture)
    assert lines[3:] == [
        "Steps: 2, Sampler: Euler a, CFG scale: 6.5, Seed: 11, Size: 32x32, "
        f"Model hash: {p['weights']}, Model: {model}, Variation seed: 5, Variation seed strength: 0.25, "
        f"Image number: 0, Version: ldm {p['versions']['latent-diffusion-from-scratch']}"
    ]
    assert json.loads(Image.open(picture).text["ldm"]) == p  # type: ignore[attr-defined]


def test_web_ui_values_with_separators_are_quoted() -> None:
    text = web_ui_text({"prompt": "a", "steps": 2, "model": "C:\\a, b", "strength": 0.5})
    assert text == 'a\nSteps: 2, Model: "C:\\\\a, b", Denoising strength: 0.5'
