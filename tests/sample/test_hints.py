"""`--control` on the command line: its parts, the files it reads, what is recorded, told and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import randomised
from PIL import Image
from torch import Tensor

from ldm.models.controlled import Control
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights.folder import save_part
from sample import model as models
from sample import txt2img
from sample.__main__ import main
from sample.control import fitted
from sample.hints import parse_control, parse_range, read_hint
from sample.images import read_parameters, to_pil
from sample.pipeline import Pipeline
from sample.settings import Wording

HOW: dict[str, Any] = {"steps": 2, "guidance": 3.0, "wording": Wording(syntax="webui")}


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command; its ControlNets are."""
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)
    monkeypatch.setattr(pipe, "controlnets", {})


@pytest.fixture(scope="module")
def net(pipe: Pipeline) -> ControlNet:
    torch.manual_seed(0)
    return randomised(ControlNet(ControlNetConfig(pipe.unet.config, hint_widths=(4, 6, 8))))


@pytest.fixture
def folder(tmp_path: Path, net: ControlNet, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shipped "edges", and a hint, in the working folder."""
    save_part(tmp_path / "shipped" / "edges" / "controlnet.safetensors", net, torch.float32)
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "h é.png", 0)
    return tmp_path


def save(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def run(out: Path, *arguments: object) -> int:
    common = ["--out", str(out), "--device", "cpu", "--steps", "2", "--guidance", "3"]
    return main([*map(str, arguments), *common])


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def expected(pipe: Pipeline, prompts: list[str], **how: Any) -> list[np.ndarray]:
    *_, step = pipe.stream(prompts, **{**HOW, **how})
    return [np.array(picture) for picture in to_pil(pipe.decode(step.sample))]


# --- the option ---------------------------------------------------------------------------------------------


def test_parts_of_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number at the end is the scale; where paths hold colons, what exists decides."""
    assert parse_control("edges:a.png") == ("edges", "a.png", 1.0)
    assert parse_control("edges:a.png:0.5") == ("edges", "a.png", 0.5)
    assert parse_control("edges:7") == ("edges", "7", 1.0)
    assert parse_control("edges:7:-1e-1") == ("edges", "7", -0.1)
    assert parse_control("m:a:b.png") == ("m", "a:b.png", 1.0)
    monkeypatch.chdir(tmp_path)
    for name in ("c:net", "a:b.png"):
        (tmp_path / name).touch()
    assert parse_control("c:net:a:b.png") == ("c:net", "a:b.png", 1.0)
    assert parse_control("c:net:a:b.png:2") == ("c:net", "a:b.png", 2.0)
    for text in ("edges", "edges:", ":a.png", "", "0.5"):
        with pytest.raises(ValueError, match="--control must be like emoji_edges:hint.png"):
            parse_control(text)


def test_parts_of_a_range() -> None:
    assert [parse_range(text) for text in ("0.1:0.6", ":0.5", "0.5:", ":")] == [
        (0.1, 0.6), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0),
    ]  # fmt: skip
    for text in ("0.5", "a:b", ""):
        with pytest.raises(ValueError, match="--control-range must be like 0:0.6"):
            parse_range(text)


# --- hints --------------------------------------------------------------------------------------------------


def test_hints_of_every_form(tmp_path: Path) -> None:
    """Alpha on black, grey and 16 bits scaled, a turned photograph upright."""
    drawn = np.zeros((2, 3, 4), np.uint8)
    drawn[0, 0], drawn[0, 1] = (255, 255, 255, 255), (255, 255, 255, 51)
    Image.fromarray(drawn).save(tmp_path / "alpha.png")
    found = read_hint(tmp_path / "alpha.png")
    assert found.shape == (1, 3, 2, 3)
    assert torch.equal(found[0, :, 0], torch.tensor([1, 0.2, 0]).expand(3, 3))
    assert not found[0, :, 1].any()
    Image.fromarray(np.array([[0, 257 * 51, 65535]], np.uint16)).save(tmp_path / "16.png")
    assert torch.equal(read_hint(tmp_path / "16.png")[0], torch.tensor([[0, 0.2, 1]]).expand(3, 1, 3))
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert torch.equal(read_hint(tmp_path / "grey.png"), read_hint(tmp_path / "16.png"))
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "turned.png", exif=turned)
    assert read_hint(tmp_path / "turned.png").shape == (1, 3, 3, 1)


def test_the_command_is_the_python_call(
    pipe: Pipeline, net: ControlNet, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two controls, ranges and a guess mode; several prompts; the ControlNet read once."""
    save(folder / "i.png", 1)
    arguments = [
        "--control",
        "edges:h é.png:0.5",
        "--control",
        "shipped/edges:i.png",
        "--control-range",
        "0:0.5",
    ]
    assert run(folder / "out", "txt2img", "a", "b", *arguments, "--guess-mode", "original") == 0
    assert capsys.readouterr().err == ""
    controls = [
        Control(net, read_hint(folder / name), scale, 0, 0.5, "original")
        for name, scale in (("h é.png", 0.5), ("i.png", 1.0))
    ]
    for i, picture in enumerate(expected(pipe, ["a", "b"], controls=controls)):
        assert np.array_equal(pixels(folder / "out" / f"0000{i}.png"), picture)
    assert len(pipe.controlnets) == 2  # two paths
    both = [*arguments, "--control-range", "0.5:1"]
    assert run(folder / "more", "txt2img", "a", *both) == 0
    controls = [Control(net, controls[0].hint, 0.5, 0, 0.5), Control(net, controls[1].hint, 1.0, 0.5, 1)]
    [picture] = expected(pipe, ["a"], controls=controls)
    assert np.array_equal(pixels(folder / "more" / "00000.png"), picture)


def test_the_second_pass_takes_the_hint_in_its_size(
    pipe: Pipeline,
    net: ControlNet,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(folder / "large.png", 1, (64, 48))
    seen: list[Tensor] = []
    encode = ControlNet.encode_hint
    monkeypatch.setattr(ControlNet, "encode_hint", lambda self, hint: seen.append(hint) or encode(self, hint))
    assert run(folder / "out", "txt2img", "a", "--control", "edges:large.png", "--hires", "64x48") == 0
    hint = read_hint(folder / "large.png")
    assert [tuple(each.shape[2:]) for each in seen] == [(32, 32), (48, 64)]
    assert torch.equal(seen[0], fitted(hint, (32, 32))) and torch.equal(seen[1], hint)
    told = "ldm-sample: warning: large.png: hint cut and resized (bicubic) from 64x48 to the pictures' 32x32"
    assert capsys.readouterr().err.splitlines() == [told]


@pytest.mark.parametrize("command", ["img2img", "inpaint", "outpaint"])
def test_other_commands(folder: Path, command: str) -> None:
    """The control changes what they make."""
    save(folder / "in.png", 2)
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).resize((32, 32)).save(folder / "mask.png")
    more = {"img2img": [], "inpaint": ["mask.png"], "outpaint": ["--right", "8"]}[command]
    line = [command, "in.png", *[each for each in more if each == "mask.png"], "a"]
    line += [each for each in more if each != "mask.png"]
    assert run(folder / "plain", *line) == 0
    assert run(folder / "out", *line, "--control", "edges:h é.png") == 0
    assert not np.array_equal(pixels(folder / "plain" / "00000.png"), pixels(folder / "out" / "00000.png"))


# --- recorded and repeated ----------------------------------------------------------------------------------


def test_again(folder: Path, net: ControlNet, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit-equal; refused with another hint or none; told of other weights; other controls replace these."""
    given = ["--control", "edges:h é.png:0.5", "--control-range", "0:0.9", "--guess-mode", "diffusers"]
    assert run(folder / "out", "txt2img", "a", *given) == 0
    picture = folder / "out" / "00000.png"
    recorded = read_parameters(picture)
    assert recorded["control"] == ["edges:h é.png:0.5"]
    [files] = recorded["control_files"]
    assert (files["control"], files["hint"]) == ("edges:h é.png:0.5", "h é.png")
    assert (len(files["weights"]), len(files["hint_hash"])) == (12, 12)
    assert main(["again", str(picture), "--out", "again"]) == 0
    assert np.array_equal(pixels(folder / "again" / "00000.png"), pixels(picture))
    assert read_parameters(folder / "again" / "00000.png") == recorded

    assert main(["again", str(picture), "--out", "other", "--control", "edges:h é.png:0.25"]) == 0
    changed = read_parameters(folder / "other" / "00000.png")
    assert changed["control"] == ["edges:h é.png:0.25"] and "control_range" not in changed
    assert not np.array_equal(pixels(folder / "other" / "00000.png"), pixels(picture))
    capsys.readouterr()

    save_part(folder / "shipped" / "edges" / "controlnet.safetensors", net, torch.float16)
    txt2img.load_pipeline(None).controlnets.clear()  # type: ignore[arg-type]
    assert main(["again", str(picture), "--out", "again"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "ldm-sample: warning: weights of --control edges:h é.png:0.5 differ: the picture was"
    )

    save(folder / "h é.png", 9)
    assert main(["again", str(picture), "--out", "third"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "ldm-sample: error: h é.png: not the hint that the picture was made with: its hash was"
    )
    (folder / "h é.png").unlink()
    assert main(["again", str(picture), "--out", "third"]) == 2
    assert capsys.readouterr().err == "ldm-sample: error: h é.png: no such file\n"
    assert not (folder / "third").exists()


def test_sweep(folder: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from sample import sweep

    monkeypatch.setattr(sweep, "load_pipeline", lambda args: pipe)
    (folder / "s.yaml").write_text(
        "prompts: [a]\noptions: {steps: 2, device: cpu}\n"
        'axes: {control: ["edges:h é.png:0", "edges:h é.png:0.8", null]}\n'
    )
    assert main(["sweep", "s.yaml", "--out", "swept"]) == 0
    without, steered, none = (pixels(folder / "swept" / f"0000{i}.png") for i in range(3))
    assert np.array_equal(without, none)  # scale 0 is no control, bit for bit
    assert not np.array_equal(without, steered)


# --- told and refused ---------------------------------------------------------------------------------------


def test_what_has_no_effect_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(folder / "empty.png")
    assert (
        run(folder / "out", "txt2img", "a", "--control", "edges:empty.png", "--control-range", "0.4:0.6") == 0
    )
    assert capsys.readouterr().err.splitlines() == [
        "ldm-sample: warning: empty.png: an empty hint, all of one colour (transparent is black)",
        "ldm-sample: warning: --control edges:empty.png acts in none of 2 steps, by its range 0.4:0.6",
    ]


def other_width(folder: Path) -> None:
    wide = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=24, norm_groups=4)
    wrong = ControlNet(ControlNetConfig(wide, hint_widths=(4, 6, 8)))
    save_part(folder / "wide" / "controlnet.safetensors", wrong, torch.float32)


def text_file(folder: Path) -> None:
    (folder / "t.png").write_text("no picture")


def floats(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "f.tiff")


REFUSED: dict[str, tuple[list[str], str]] = {
    "no hint file": (["--control", "edges:no.png"], "no.png: no such file"),
    "a folder": (["--control", "edges:shipped"], "shipped: no such file"),
    "no picture": (["--control", "edges:t.png"], "t.png: not an image"),
    "no range of values": (["--control", "edges:f.tiff"], "f.tiff: unreadable hint (floating-point pixels"),
    "no model": (["--control", "edgy:h é.png"], "ControlNet 'edgy' is no shipped name, no file and no folder; did you mean edges? shipped: edges"),
    "another width": (["--control", "wide:h é.png"], "--control wide:h é.png: ControlNet is made for another UNet: model_channels 32 (the UNet's 16), context_dim 24 (the UNet's 16)"),
    "scale": (["--control", "edges:h é.png:nan"], "--control edges:h é.png:nan: control scale must be a finite number, got nan"),
    "infinite": (["--control", "edges:h é.png:-inf"], "must be a finite number, got -inf"),
    "form": (["--control", "edges"], "--control must be like emoji_edges:hint.png"),
    "range": (["--control", "edges:h é.png", "--control-range", "0.9:0.1"], "0 <= start < end <= 1 of the steps, got 0.9 and 0.1"),
    "ranges": (["--control", "edges:h é.png", *["--control-range=0:1"] * 2], "--control-range is given 2 times for 1 --control; give one for all, or one each"),
    "range alone": (["--control-range", "0:1"], "--control-range has no effect without --control"),
    "guess alone": (["--guess-mode", "original"], "--guess-mode has no effect without --control"),
    "guess": (["--control", "edges:h é.png", "--guess-mode", "x"], "guess mode must be one of original, diffusers, got 'x'"),
    "deep cache": (["--control", "edges:h é.png", "--deep-cache", "2"], "--deep-cache leaves out the layers that --control steers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare: Callable[[Path], None]
    for prepare in (other_width, text_file, floats):
        prepare(folder)
    arguments, message = REFUSED[case]
    assert run(folder / "out", "txt2img", "a", *arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert told.err.startswith("ldm-sample: error: ") and message in told.err
    assert not (folder / "out").exists()


def test_token_merging_and_fast_convolutions_are_steered_too(
    pipe: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "form", None)
    monkeypatch.setattr(pipe, "network", pipe.network)
    monkeypatch.setattr(pipe, "autoencoder", pipe.autoencoder)
    for option in (["--token-merging", "0.5"], ["--fast-conv", "0.1"]):
        names = ["plain", "steered", "none"]
        for name, more in zip(
            names, ([], ["--control", "edges:h é.png"], ["--control", "edges:h é.png:0"]), strict=True
        ):
            assert run(folder / option[0] / name, "txt2img", "a", *option, *more) == 0
        plain, steered, none = (pixels(folder / option[0] / name / "00000.png") for name in names)
        assert np.array_equal(plain, none) and not np.array_equal(plain, steered)
