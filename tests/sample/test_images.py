"""Tensors to pictures and back, names that never replace a file, parameters in PNGs, reading anything."""

import itertools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sample import images
from sample.images import (
    grid,
    output_folder,
    read_parameters,
    read_rgb,
    save_new,
    save_png,
    to_pil,
    to_tensor,
)


def plain(
    color: str | tuple[int, ...] = "red", size: tuple[int, int] = (4, 3), mode: str = "RGB"
) -> Image.Image:
    return Image.new(mode, size, color)


def test_every_byte_survives_the_way_to_a_tensor_and_back() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint64).astype(np.uint8).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(np.array(to_pil(tensor[None])[0]), pixels)


def test_pixels_are_clamped_and_rounded() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 0.003, 1.0, 9.0]).expand(1, 3, 1, 6)
    assert np.array(to_pil(values)[0])[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_black_picture_of_nan(value: float) -> None:
    bad = torch.zeros(2, 3, 4, 4)
    bad[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="picture 1 of 2 holds NaN or infinite"):
        to_pil(bad)


def test_grid() -> None:
    sheet = grid([plain("red"), plain("lime"), plain("blue")], columns=2, gap=1)
    assert sheet.size == (2 * 5 + 1, 2 * 4 + 1)
    corners = [sheet.getpixel(at) for at in ((1, 1), (6, 1), (1, 5), (6, 5), (0, 0))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255)]


def test_parameters_travel_in_the_file(tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"prompt": 'ein "Apfel" 🍎\n', "seed": 2**70, "size": [64, 64], "scale": 7.5}
    save_png(plain(), tmp_path / "neu er" / "é.png", parameters)
    assert read_parameters(tmp_path / "neu er" / "é.png") == parameters
    assert os.listdir(tmp_path / "neu er") == ["é.png"]
    plain().save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="carries no parameters of ours"):
        read_parameters(tmp_path / "other.png")


def test_numbers_go_on_and_nothing_is_replaced(tmp_path: Path) -> None:
    for name in ("00003.png", "grid-0007.png", "00009.jpg", "x00011.png", "123456.png"):
        (tmp_path / name).write_text("kept")
    assert save_new(plain(), tmp_path, "", 5).name == "123457.png"
    assert save_new(plain(), tmp_path, "grid-", 4).name == "grid-0008.png"
    assert save_new(plain(), tmp_path / "new", "", 5).name == "00000.png"
    assert (tmp_path / "00003.png").read_text() == "kept"


def test_two_writers_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see the same listing before either writes."""
    ready, listdir = threading.Barrier(2), os.listdir

    def slow(path: Path) -> list[str]:
        names = listdir(path)
        ready.wait(10)
        return names

    monkeypatch.setattr(images.os, "listdir", slow)
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda: names.append(save_new(plain(), tmp_path, "", 5).name)) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == ["00000.png", "00001.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_new(plain(), tmp_path, "", 5, {"not JSON": object()})
    assert os.listdir(tmp_path) == []


def test_output_folder(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match="file is a file; expected a folder to write to"):
            output_folder(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_output_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        output_folder(tmp_path / "x")


def test_reading_every_kind(tmp_path: Path) -> None:
    half = plain((255, 0, 0, 128), mode="RGBA")
    sixteen = Image.fromarray(np.full((3, 4), 257 * 100, dtype=np.uint16))
    turned = Image.new("RGB", (4, 3), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    cases = {
        "rgb.png": (plain(), (255, 0, 0)),
        "half.png": (half, (255, 127, 127)),
        "grey.png": (plain(7, mode="L"), (7, 7, 7)),
        "sixteen.png": (sixteen, (100, 100, 100)),
        "palette.gif": (plain("blue").convert("P"), (0, 0, 255)),
    }
    for name, (picture, color) in cases.items():
        picture.save(tmp_path / name)
        read = read_rgb(tmp_path / name)
        assert (read.mode, read.size, read.getpixel((1, 1))) == ("RGB", (4, 3), color), name
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = read_rgb(tmp_path / "turned.png")
    assert (upright.size, upright.getpixel((2, 0))) == ((3, 4), (0, 0, 255))


def test_reading_a_square(tmp_path: Path) -> None:
    picture = plain("red", (12, 4))
    for x, y in itertools.product(range(4, 8), range(4)):
        picture.putpixel((x, y), (0, 255, 0))
    picture.save(tmp_path / "wide.png")
    assert read_rgb(tmp_path / "wide.png", 4).getcolors() == [(16, (0, 255, 0))]
    assert read_rgb(tmp_path / "wide.png", 8).size == (8, 8)


def test_unreadable_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(size=(64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("cut.png", "unreadable image"), ("empty.png", "not an image"), ("absent.png", "no such file")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: {message}") as caught:
            read_rgb(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"whole\.png: more than 1000 pixels"):
        read_rgb(tmp_path / "whole.png")
