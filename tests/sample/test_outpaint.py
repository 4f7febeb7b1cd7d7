"""`outpaint`: the canvas, what is kept exactly, what is painted; and the soft edge of `--feather`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sample import txt2img
from sample.__main__ import main
from sample.canvas import extend
from sample.images import read_parameters
from sample.pipeline import Pipeline


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command."""
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A picture of 40 x 32 pixels, each different."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in é.png")
    return tmp_path / "in é.png"


def run(out: Path, *arguments: object) -> int:
    return main([*map(str, arguments), "--out", str(out), "--device", "cpu", "--steps", "2", "--seed", "3"])


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_canvas_and_picture(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 to the left and 8 above, where all of the picture but 4 pixels at these sides stays."""
    out = tmp_path / "out"
    arguments = ["outpaint", file, "a", "b", "--left", 16, "--top", 8, "--overlap", 4]
    assert run(out, *arguments) == 0
    told = capsys.readouterr()
    assert told.err == ""
    given = pixels(file)
    canvas = np.array(extend(Image.open(file), left=16, top=8).canvas).astype(int)
    for name in ("00000.png", "00001.png"):
        made = pixels(out / name)
        assert made.shape == (40, 56, 3)
        assert np.array_equal(made[12:, 20:], given[4:, 4:])
        border = np.ones((40, 56), dtype=bool)
        border[12:, 20:] = False
        assert np.abs(made - canvas)[border].mean() > 10
        assert np.abs(made[8:12, 16:] - given[:4]).mean() > 10  # the overlap is painted too
    assert not np.array_equal(pixels(out / "00000.png"), pixels(out / "00001.png"))
    p = read_parameters(out / "00000.png")
    assert (p["command"], p["left"], p["top"], p["overlap"], p["size"], p["init"]) == (
        "outpaint", 16, 8, 4, [56, 40], str(file)
    )  # fmt: skip
    assert "right" not in p


def test_rounded_to_a_legal_size(file: Path, tmp_path: Path) -> None:
    """To the right of the right and below, where there is no other side."""
    assert run(tmp_path / "a", "outpaint", file, "a", "--right", 3, "--overlap", 0) == 0
    made = pixels(tmp_path / "a" / "00000.png")
    assert made.shape == (32, 48, 3)
    assert np.array_equal(made[:, :40], pixels(file))
    assert run(tmp_path / "b", "outpaint", file, "a", "--left", 3, "--bottom", 9, "--overlap", 0) == 0
    made = pixels(tmp_path / "b" / "00000.png")
    assert made.shape == (48, 48, 3)
    assert np.array_equal(made[:32, 8:], pixels(file))


def test_again(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, and with other sides, whose canvas has another size."""
    options = ["--bottom", 8, "--fill", "noise", "--feather", 3, "--strength", 0.7, "--resample", 2]
    assert run(tmp_path / "a", "outpaint", file, "a", "--right", 8, *options) == 0
    picture = tmp_path / "a" / "00000.png"
    assert main(["again", str(picture), "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(pixels(tmp_path / "b" / "00000.png"), pixels(picture))
    assert read_parameters(tmp_path / "b" / "00000.png") == read_parameters(picture)
    assert main(["again", str(picture), "--right", "24", "--out", str(tmp_path / "c")]) == 0
    assert run(tmp_path / "d", "outpaint", file, "a", "--right", 24, *options) == 0
    assert np.array_equal(pixels(tmp_path / "c" / "00000.png"), pixels(tmp_path / "d" / "00000.png"))
    assert capsys.readouterr().err == ""


def test_the_fill_counts_where_it_is_not_forgotten(file: Path, tmp_path: Path) -> None:
    def made(strength: float) -> list[bytes]:
        found = []
        for fill in ("edge", "noise", "grey"):
            out = tmp_path / f"{fill} {strength}"
            arguments = ["--right", 16, "--fill", fill, "--strength", strength]
            assert run(out, "outpaint", file, "a", *arguments) == 0
            found.append(pixels(out / "00000.png").tobytes())
        return found

    assert len(set(made(0.5))) == 3
    canvas = np.array(extend(Image.open(file), right=16, fill="grey").canvas)
    assert run(tmp_path / "0", "outpaint", file, "a", "--right", 16, "--fill", "grey", "--strength", 0) == 0
    kept = pixels(tmp_path / "0" / "00000.png")  # the canvas through the autoencoder
    assert np.array_equal(kept[:, :32], canvas[:, :32])


@pytest.mark.parametrize("command", ["outpaint", "inpaint"])
def test_feather_lies_between(command: str, file: Path, tmp_path: Path) -> None:
    """Within so many pixels of what is kept: d / (pixels + 1) of what is painted, the rest of the picture."""
    if command == "outpaint":
        arguments: list[object] = [command, file, "a", "--right", 16, "--overlap", 16]
        under = np.array(extend(Image.open(file), right=16, overlap=16).canvas).astype(int)
    else:
        mask = np.zeros((32, 40), dtype=np.uint8)
        mask[:, 24:] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        arguments = [command, file, tmp_path / "mask.png", "a"]
        under = pixels(file)
    assert run(tmp_path / "raw", *arguments, "--no-paste") == 0
    assert run(tmp_path / "hard", *arguments) == 0
    assert run(tmp_path / "soft", *arguments, "--feather", 7) == 0
    raw, hard, soft = (pixels(tmp_path / name / "00000.png") for name in ("raw", "hard", "soft"))
    assert np.array_equal(hard[:, 24:], raw[:, 24:])
    assert not np.array_equal(raw[:, :24], under[:, :24])
    for made in (hard, soft):
        assert np.array_equal(made[:, :24], under[:, :24])  # what is kept is kept exactly
    share = np.minimum(np.arange(1, 17) / 8, 1)[: raw.shape[1] - 24, None]
    expected = under[:, 24:40] * (1 - share) + raw[:, 24:40] * share
    assert np.abs(soft[:, 24:40] - expected).max() <= 1  # `under` is of 8 bits, as are the pictures
    assert np.array_equal(soft[:, 32:], raw[:, 32:])
    assert read_parameters(tmp_path / "soft" / "00000.png")["feather"] == 7


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "a picture is extended by 0 pixels or more, on one side at least; got left 0, top 0"),
    (["--left", "-8", "--top", "8"], "got left -8, top 8, right 0, bottom 0"),
    (["--left", "8", "--fill", "mirror"], "fill must be one of edge, noise, grey, got mirror"),
    (["--left", "8", "--overlap", "-1"], "overlap at least 0, got 1 and -1"),
    (["--left", "8", "--overlap", "40"], "leaves nothing of a picture of 40x32"),
    (["--left", "8", "--feather", "-1"], "--feather must be at least 0 pixels, got -1"),
    (["--left", "8", "--strength", "2"], "strength must be between 0"),
    (["--left", "8", "--size", "64x64"], "--size is not for choice here: the canvas is 48x32"),
    (["--left", "9000000"], "has more pixels than a picture may have"),
])  # fmt: skip
def test_mistakes_are_one_line(
    file: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "outpaint", file, "a", *arguments) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert message in told.err
    assert not (tmp_path / "out").exists()
