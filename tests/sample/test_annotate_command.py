"""`ldm-sample annotate`: the files that it writes, and what it says of files that it cannot read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sample.__main__ import main
from sample.annotators import annotate
from sample.images import read_parameters, to_rgb

pytest.importorskip("cv2")


def shape(width: int = 40, height: int = 30) -> Image.Image:
    """A red box on nothing, half transparent at its right end."""
    picture = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    picture.paste((200, 0, 0, 255), (8, 6, width - 10, height - 8))
    picture.paste((200, 0, 0, 128), (width - 14, 6, width - 10, height - 8))
    return picture


def run(out: Path, *words: str | Path) -> int:
    return main(["annotate", *map(str, words), "--out", str(out)])


def test_hints_and_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("ä 1.png", (40, 30)), ("b.webp", (60, 20))):
        shape(*size).save(tmp_path / name, lossless=True)
    out = tmp_path / "out"
    assert run(out, "canny:low=50,high=150", tmp_path / "ä 1.png", tmp_path / "b.webp") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "annotate-0000.png",
        "canny-0000.png",
        "canny-0001.png",
    ]
    on_white = [to_rgb(shape()), to_rgb(shape(60, 20))]
    hints = [annotate(picture, "canny", low=50, high=150) for picture in on_white]
    for i, hint in enumerate(hints):
        np.testing.assert_array_equal(Image.open(out / f"canny-000{i}.png"), hint)
    told = read_parameters(out / "canny-0001.png")
    assert told == {
        "command": "annotate",
        "kind": "canny:low=50,high=150",
        "picture": str(tmp_path / "b.webp"),
    }
    sheet = Image.open(out / "annotate-0000.png")
    assert sheet.size == (2 * (60 + 2) + 2, 2 * (30 + 2) + 2)
    np.testing.assert_array_equal(sheet.crop((12, 2, 52, 32)), on_white[0])  # picture | hint, in the middle
    np.testing.assert_array_equal(sheet.crop((74, 2, 114, 32)), hints[0])
    np.testing.assert_array_equal(sheet.crop((2, 39, 62, 59)), on_white[1])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'ä 1.png'} -> {out / 'canny-0000.png'}",
        f"{tmp_path / 'b.webp'} -> {out / 'canny-0001.png'}",
        f"sheet -> {out / 'annotate-0000.png'}",
    ]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    shape().save(tmp_path / "a.png")
    for _ in range(2):
        assert run(tmp_path / "out", "colours", tmp_path / "a.png") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"annotate-000{i}.png" for i in (0, 1)),
        *(f"colours-000{i}.png" for i in (0, 1)),
    ]


def test_alpha_reaches_the_silhouette_alone(tmp_path: Path) -> None:
    shape().save(tmp_path / "a.png")
    assert run(tmp_path, "silhouette", tmp_path / "a.png") == 0
    hint = np.asarray(Image.open(tmp_path / "silhouette-0000.png"))
    np.testing.assert_array_equal(hint[..., 0] > 0, np.asarray(shape())[..., 3] > 0)
    assert run(tmp_path, "silhouette:threshold=200", tmp_path / "a.png") == 0
    assert (np.asarray(Image.open(tmp_path / "silhouette-0001.png")) > 0).sum() < (hint > 0).sum()


def test_size_scales_and_cuts_first(tmp_path: Path) -> None:
    shape(80, 40).save(tmp_path / "a.png")
    assert run(tmp_path, "silhouette", tmp_path / "a.png", "--size", "20x20") == 0
    hint = Image.open(tmp_path / "silhouette-0000.png")
    columns = np.flatnonzero((np.asarray(hint)[..., 0] > 0).any(axis=0))
    assert hint.size == (20, 20) and set(columns) == set(range(20))  # of 8..70, 20..60 are left


@pytest.mark.parametrize("form", ["one pixel", "16 bit", "turned", "animated", "CMYK"])
def test_odd_pictures(form: str, tmp_path: Path) -> None:
    picture, path = to_rgb(shape()), tmp_path / "a.png"
    if form == "one pixel":
        picture = picture.crop((20, 10, 21, 11))
        picture.save(path)
    elif form == "16 bit":
        picture = picture.convert("L").convert("RGB")
        Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257).save(path)
    elif form == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees to the right
        picture.save(path, exif=exif)
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    elif form == "animated":
        path = tmp_path / "a.gif"
        picture.save(path, save_all=True, append_images=[Image.new("RGB", picture.size)])
    else:
        path = tmp_path / "a.tif"
        picture.convert("CMYK").save(path)
    assert run(tmp_path, "canny", path) == 0
    np.testing.assert_array_equal(Image.open(tmp_path / "canny-0000.png"), annotate(picture, "canny"))


def refused(out: Path, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that a failing command says; it must leave nothing behind."""
    assert run(out, *words) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("ldm-sample: error: ") and output.err.count("\n") == 1
    assert not out.exists()
    return output.err


def test_files_that_are_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, out = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "out"
    shape().save(good)
    assert f"{bad}: no such file" in refused(out, capsys, "canny", good, bad)
    bad.write_text("a text")
    assert f"{bad}: not an image" in refused(out, capsys, "canny", good, bad)
    bad.write_bytes(b"")
    assert f"{bad}: not an image" in refused(out, capsys, "canny", good, bad)
    bad.write_bytes(good.read_bytes()[:90])
    assert f"{bad}: unreadable image" in refused(out, capsys, "canny", good, bad)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    assert "floating-point pixels" in refused(out, capsys, "canny", tmp_path / "f.tif")
    assert f"{tmp_path}: no such file" in refused(out, capsys, "canny", tmp_path)


def test_a_bomb_is_not_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    error = refused(tmp_path / "out", capsys, "canny", tmp_path / "bomb.png")
    assert "bomb.png: more than 1000 pixels" in error


def test_kinds_options_and_sizes_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "out"
    shape().save(picture)
    shape(20, 20).save(tmp_path / "b.png")
    error = refused(out, capsys, "cany", picture)
    assert "no annotator 'cany'; did you mean canny? known are canny, hough, lsd, " in error
    assert "canny has no option 'lo'" in refused(out, capsys, "canny:lo=1", picture)
    assert "got low=300, high=200" in refused(out, capsys, "canny:low=300", picture)
    error = refused(out, capsys, "segments:colours=0", picture, tmp_path / "b.png")
    assert f"{picture}: segments: expected colours in 1..256" in error  # which one, where there are several
    error = refused(out, capsys, "depth", picture)
    assert "depth needs a network whose weights you have: depth:weights=FOLDER" in error
    assert "--size must be between 1x1 and 16384x16384, got 0x5" in refused(
        out, capsys, "canny", picture, "--size", "0x5"
    )
    with pytest.raises(SystemExit) as ended:
        run(out, "canny")
    assert ended.value.code == 2 and "required: IMAGE" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape().save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "canny", tmp_path / "a.png") == 2
    assert f"{tmp_path / 'a.png'} is a file; expected a folder to write to" in capsys.readouterr().err
