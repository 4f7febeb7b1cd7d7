"""`ldm-train prepare style`: five pictures of a drawing style, and others of it that are held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import picture, tarball

from train.__main__ import main
from train.data import DataConfig, load_images
from train.prepare_style import SOURCE, STYLE

pytest.importorskip("emoji")
FOLDER = SOURCE[STYLE][1]
POINTS = {"fox": "1f98a", "owl": "1f989", "panda": "1f43c", "red heart": "2764-fe0f", "key": "1f511"}


@pytest.fixture
def package(tmp_path: Path) -> str:
    """A stand-in of the npm package: a few emoji, of one also a skin tone, and a picture elsewhere."""
    pictures = [
        (f"{FOLDER}/{slug}.png", picture((9 * i, 0, 99, 255))) for i, slug in enumerate(POINTS.values())
    ]
    more = [(f"{FOLDER}/1f44d-1f3fb.png", picture("red")), ("package/img/other/1f427.png", picture("red"))]
    return f"twemoji={tarball(tmp_path / 'twemoji.tgz', [*pictures, *more])}"


def prepared(folder: Path, package: str, *more: str) -> int:
    return main(["prepare", "style", str(folder), "--npm-package", package, *more])


def test_what_is_written(tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "style"
    assert prepared(folder, package, "--concepts", "fox, owl,red heart", "--size", "32") == 0
    assert capsys.readouterr().out == f"3 images to learn from and 2 held out in {folder}\n"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    told = {row["file_name"]: (row["text"], row["concept"], row["style"], row["split"]) for row in rows}
    assert told == {
        "1f98a.png": ("a fox, twemoji emoji", "fox", "twemoji", "train"),
        "1f989.png": ("an owl, twemoji emoji", "owl", "twemoji", "train"),
        "2764-fe0f.png": ("a red heart, twemoji emoji", "red heart", "twemoji", "train"),
        "1f43c.png": ("a panda, twemoji emoji", "panda", "twemoji", "heldout_image"),
        "1f511.png": ("a key, twemoji emoji", "key", "twemoji", "heldout_image"),
    }
    assert {path.name for path in folder.iterdir()} == {*told, "metadata.jsonl", "README.md"}
    assert "CC BY 4.0" in (folder / "README.md").read_text()
    with Image.open(folder / "1f989.png") as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))
        pixels = np.array(image)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[16, 16].tolist() == [9, 0, 99]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_training_reads_the_taught_ones(tmp_path: Path, package: str) -> None:
    assert prepared(tmp_path / "style", package, "--concepts", "fox,owl") == 0
    data = DataConfig(str(tmp_path / "style"), 64, heldout=0.0)
    assert load_images(data, "train").captions == ["a fox, twemoji emoji", "an owl, twemoji emoji"]
    assert len(load_images(data, "heldout_image")) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--concepts", "fax"], "'fax' is the name of no emoji"),
        (["--concepts", "fox,penguin"], "no picture of 'penguin' in it"),
        (["--concepts", ""], "is the name of no emoji"),
        (["--size", "4"], "it must be 8 to 1024"),
        (["--without-npm"], "through npm alone"),
        (["--npm-package", "noto=x.tgz"], "no npm package is known for style 'noto'"),
    ],
)
def test_mistakes_leave_nothing(
    tmp_path: Path, package: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path / "style", package, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["twemoji.tgz"]


def test_a_full_folder_and_a_damaged_package(
    tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("b")
    assert prepared(tmp_path / "full", package) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "twemoji.tgz").write_bytes(b"no archive")
    assert prepared(tmp_path / "style", package) == 2
    assert "not a readable .tgz" in capsys.readouterr().err


def test_without_npm_a_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["prepare", "style", str(tmp_path / "style")]) == 2
    error = capsys.readouterr().err
    assert "npm was not found; download emoji-datasource-twitter@16.0.0" in error
    assert "--npm-package twemoji=FILE" in error
    assert [*tmp_path.iterdir()] == []


def test_concepts_are_of_a_style_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "emoji", str(tmp_path / "emoji"), "--concepts", "fox"]) == 2
    assert "--concepts is for ldm-train prepare style" in capsys.readouterr().err
