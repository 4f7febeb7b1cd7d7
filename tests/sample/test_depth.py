"""Depth pictures: precision kept, colours and damaged files refused in one line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm.diffusion.editing import depth_channels
from sample.depth import read_depth


def test_eight_bits(tmp_path: Path) -> None:
    levels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    for mode in ("L", "RGB"):
        Image.fromarray(levels).convert(mode).save(tmp_path / "d é.png")
        made = read_depth(tmp_path / "d é.png")
        assert made.dtype == torch.float32
        assert torch.equal(made, torch.from_numpy(levels).float()[None])


def test_sixteen_bits_keep_all_their_steps(tmp_path: Path) -> None:
    levels = np.arange(20_000, 20_064, dtype=np.uint16).reshape(8, 8)  # a quarter of a step of 8 bits
    Image.fromarray(levels).save(tmp_path / "deep.png")
    made = read_depth(tmp_path / "deep.png")
    assert_close(made * 257, torch.from_numpy(levels.astype(np.float32))[None], rtol=0, atol=0.01)
    ramp = depth_channels(made[None], (8, 8))
    assert_close(ramp.flatten(), torch.linspace(-1, 1, 64), rtol=0, atol=0.01)
    assert ramp.flatten().diff().min() > 0


def test_scaled_and_cut_like_its_picture(tmp_path: Path) -> None:
    levels = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (40, 1))  # white, so near, on the right
    Image.fromarray(levels).save(tmp_path / "deep.png")
    made = read_depth(tmp_path / "deep.png", (20, 20))
    assert made.shape == (1, 20, 20)
    assert_close(made[0, 7], torch.linspace(66, 189, 20), rtol=0, atol=2.0)  # the middle half of the ramp
    assert len(made.unique()) > 19  # not rounded to steps of 8 bits: 20 columns, 20 levels between them


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "no such file"),
        ("text.png", "not an image"),
        ("colour.png", "unreadable depth picture .it has colours, of which none is depth"),
        ("float.tiff", "unreadable depth picture .floating-point pixels have no fixed range"),
        ("cut.png", "unreadable depth picture"),
        ("bomb.png", "more than [0-9]+ pixels"),
    ],
)
def test_files_that_are_no_depth(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.png").write_text("depth")
    Image.effect_noise((8, 8), 50).convert("RGB").save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "colour.png")
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    )
    with pytest.raises(ValueError, match=message) as error:
        read_depth(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)
