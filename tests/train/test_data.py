"""Folders of images: what is read, what is refused, and in which order training sees it."""

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DataConfig, ImageFolder, batch_indices, list_images, load_images, read_image, to_float

RED, GREEN, BLUE, WHITE = (200, 30, 40), (20, 180, 60), (30, 40, 210), (255, 255, 255)


def save(path, color=RED, size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def write_rows(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pixel(path, size=8):
    """The one colour of an image that should come out in one colour."""
    pixels = read_image(path, size)
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == torch.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def png_header(width, height):
    """A PNG file that claims a size and holds no pixels."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def folder(tmp_path):
    """Three images with metadata, two of them for training."""
    for name, color in (("a.png", RED), ("sub/b.png", GREEN), ("c.png", BLUE)):
        save(tmp_path / name, color)
    write_rows(
        tmp_path,
        {"file_name": "a.png", "text": "a red square", "concept": "square", "style": "red", "split": "train"},
        {"file_name": "sub/b.png", "text": "ein grünes Quadrat 🟩", "split": "train"},
        {"file_name": "c.png", "text": "", "split": "heldout_image"},
    )
    return tmp_path


def config(folder, **options):
    return DataConfig(path=str(folder), size=8, **options)


class TestLoading:
    def test_everything_with_its_columns(self, folder):
        images = load_images(config(folder))
        assert len(images) == 3
        assert images.pixels.shape == (3, 3, 8, 8)
        assert images.captions == ["a red square", "ein grünes Quadrat 🟩", ""]
        assert images.files == ["a.png", "sub/b.png", "c.png"]
        assert images.concepts == ["square", "", ""]
        assert images.styles == ["red", "", ""]
        assert [tuple(p) for p in images.pixels[:, :, 3, 3].tolist()] == [RED, GREEN, BLUE]

    def test_splits(self, folder):
        assert load_images(config(folder), "train").files == ["a.png", "sub/b.png"]
        assert load_images(config(folder), "heldout_image").files == ["c.png"]
        empty = load_images(config(folder), "heldout_pair")
        assert len(empty) == 0
        assert empty.pixels.shape == (0, 3, 8, 8)

    def test_no_training_rows(self, folder):
        write_rows(folder, {"file_name": "a.png", "text": "x", "split": "test"})
        with pytest.raises(ValueError, match='no row has split "train", only test'):
            load_images(config(folder), "train")

    def test_without_metadata_captions_come_from_text_files(self, tmp_path):
        save(tmp_path / "deep/er/one.jpg")
        save(tmp_path / "TWO.PNG")
        save(tmp_path / ".hidden/three.png")
        (tmp_path / "deep/er/one.txt").write_text("\ufeff a red\n square \n", encoding="utf-8")
        (tmp_path / "notes.md").write_text("no image")
        images = load_images(config(tmp_path))
        assert dict(zip(images.files, images.captions, strict=True)) == {
            "TWO.PNG": "",
            "deep/er/one.jpg": "a red square",
        }

    def test_without_splits_a_share_is_held_out(self, tmp_path):
        for index in range(20):
            save(tmp_path / f"{index}.png", (index, 0, 0))
        settings = config(tmp_path, heldout=0.1)
        train, held = (set(load_images(settings, split).files) for split in ("train", "heldout_image"))
        assert len(held) == 2
        assert len(train) == 18
        assert not train & held
        assert set(load_images(settings, "heldout_image").files) == held
        everything = load_images(config(tmp_path, heldout=0.0), "train")
        assert len(everything) == 20

    def test_a_single_image_is_for_training(self, tmp_path):
        save(tmp_path / "a.png")
        assert len(load_images(config(tmp_path, heldout=0.5), "train")) == 1
        assert len(load_images(config(tmp_path, heldout=0.5), "heldout_image")) == 0

    def test_folder_items_are_in_minus_one_to_one(self, folder):
        data = ImageFolder(config(folder), "train")
        image, caption = data[0]
        assert len(data) == 2
        assert caption == "a red square"
        assert image.dtype == torch.float32
        assert image.shape == (3, 8, 8)
        torch.testing.assert_close(image[:, 0, 0], torch.tensor(RED) / 127.5 - 1, rtol=0, atol=1e-6)

    def test_to_float_reaches_both_ends(self):
        ends = to_float(torch.tensor([0, 255], dtype=torch.uint8))
        assert ends.tolist() == [-1.0, 1.0]


class TestPictures:
    """Every kind of picture gives the right RGB bytes."""

    @pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.webp", "x.tif"])
    def test_lossless_rgb(self, tmp_path, name):
        options = {"lossless": True} if name.endswith("webp") else {}
        assert pixel(save(tmp_path / name, **options)) == RED

    def test_transparency_is_white(self, tmp_path):
        half = tuple(round(0.5 * c + 0.5 * 255) for c in RED)
        got = pixel(save(tmp_path / "rgba.png", (*RED, 128), mode="RGBA"))
        assert max(abs(a - b) for a, b in zip(got, half, strict=True)) <= 1
        assert pixel(save(tmp_path / "clear.png", (*RED, 0), mode="RGBA")) == WHITE
        assert pixel(save(tmp_path / "la.png", (90, 0), mode="LA")) == WHITE
        assert pixel(save(tmp_path / "key.png", RED, transparency=RED)) == WHITE
        assert pixel(save(tmp_path / "grey_key.png", 90, mode="L", transparency=90)) == WHITE

    def test_palette_with_and_without_transparency(self, tmp_path):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, *RED])
        image.save(tmp_path / "p.png")
        image.save(tmp_path / "clear.png", transparency=1)
        image.save(tmp_path / "p.gif")
        assert pixel(tmp_path / "p.png") == RED
        assert pixel(tmp_path / "p.gif") == RED
        assert pixel(tmp_path / "clear.png") == WHITE

    def test_grey_and_bilevel(self, tmp_path):
        assert pixel(save(tmp_path / "l.png", 77, mode="L")) == (77, 77, 77)
        assert pixel(save(tmp_path / "1.png", 1, mode="1")) == WHITE

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
    def test_jpeg_in_other_colour_spaces(self, tmp_path, mode):
        Image.new("RGB", (8, 8), RED).convert(mode).save(tmp_path / "x.jpg", quality=100)
        assert max(abs(a - b) for a, b in zip(pixel(tmp_path / "x.jpg"), RED, strict=True)) <= 3

    def test_sixteen_bit_grey_is_scaled(self, tmp_path):
        for value, expected in ((0, 0), (257 * 100, 100), (65535, 255)):
            pixels = np.full((8, 8), value, dtype=np.uint16)
            for name in ("x.png", "x.tif"):
                Image.fromarray(pixels).save(tmp_path / name)
                assert pixel(tmp_path / name) == (expected,) * 3

    @pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70000)])
    def test_pixels_without_a_range_are_refused(self, tmp_path, mode, value):
        save(tmp_path / "x.tif", value, mode=mode)
        with pytest.raises(ValueError, match=r"x\.tif.*no fixed range"):
            read_image(tmp_path / "x.tif", 8)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path, orientation):
        """The picture is stored as each orientation has it, and comes out red above, blue below right."""
        upright = Image.new("RGB", (16, 16), WHITE)
        upright.paste(RED, (0, 0, 16, 8))
        upright.paste(BLUE, (8, 8, 16, 16))
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "x.png", exif=exif)
        expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        assert torch.equal(read_image(tmp_path / "x.png", 16), expected)

    def test_animation_gives_its_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN)]
        frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
        assert pixel(tmp_path / "x.gif") == RED

    def test_one_pixel(self, tmp_path):
        assert pixel(save(tmp_path / "x.png", size=(1, 1))) == RED

    def test_centre_square(self, tmp_path):
        image = Image.new("RGB", (32, 8), RED)
        image.paste(GREEN, (12, 0, 20, 8))
        image.save(tmp_path / "x.png")
        assert pixel(tmp_path / "x.png") == GREEN

    def test_long_strip_stays_small(self, tmp_path):
        assert pixel(save(tmp_path / "x.png", size=(50_000, 1)), size=64) == RED

    def test_right_size_is_not_resampled(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "x.png")
        assert torch.equal(read_image(tmp_path / "x.png", 8), torch.from_numpy(noise).permute(2, 0, 1))


class TestUnreadable:
    @pytest.fixture
    def bad(self, tmp_path):
        """One good picture among six bad ones."""
        save(tmp_path / "good.png")
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noise).save(encoded, "JPEG")
        (tmp_path / "cut.jpg").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
        (tmp_path / "empty.png").write_bytes(b"")
        (tmp_path / "text.png").write_text("I am no picture")
        (tmp_path / "bomb.png").write_bytes(png_header(50_000, 50_000))
        (tmp_path / "near_bomb.png").write_bytes(png_header(10_000, 10_000))  # Pillow alone only warns
        (tmp_path / "headless.png").write_bytes(png_header(8, 8))
        return tmp_path

    def test_skipped_with_one_warning_that_counts(self, bad):
        with pytest.warns(UserWarning, match="could not be read") as caught:
            images = load_images(config(bad))
        assert images.files == ["good.png"]
        assert len(images.skipped) == 6
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "6 of 7 images could not be read" in message
        assert "bomb.png" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("cut.jpg", "truncated"),
            ("empty.png", "not an image"),
            ("text.png", "not an image"),
            ("bomb.png", "more than 89478485 pixels"),
            ("near_bomb.png", "more than 89478485 pixels"),
            ("headless.png", "unreadable image"),
            ("gone.png", "no such file"),
        ],
    )
    def test_reason_names_the_file(self, bad, name, reason):
        with pytest.raises(ValueError, match=reason) as error:
            read_image(bad / name, 8)
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    def test_strict(self, bad):
        with pytest.raises(ValueError, match=r"bomb\.png"):
            load_images(config(bad, strict=True))

    def test_none_left(self, bad):
        (bad / "good.png").unlink()
        with pytest.raises(ValueError, match="6 of 6 images could not be read, none is left"):
            load_images(config(bad))

    def test_listed_but_missing(self, folder):
        (folder / "sub/b.png").unlink()
        with pytest.warns(UserWarning, match=r"1 of 3 .*sub.b\.png: no such file \(metadata\.jsonl line 2\)"):
            assert load_images(config(folder)).files == ["a.png", "c.png"]
        with pytest.raises(ValueError, match=r"no such file \(metadata\.jsonl line 2\)"):
            load_images(config(folder, strict=True))

    def test_good_folder_gives_no_warning(self, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_images(config(folder)).skipped == []


class TestFolders:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_images(config(tmp_path / "none"))
        save(tmp_path / "a.png")
        with pytest.raises(NotADirectoryError, match="is a file"):
            load_images(config(tmp_path / "a.png"))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="no images in this folder"):
            load_images(config(tmp_path))
        write_rows(tmp_path, "")
        with pytest.raises(ValueError, match="no images in this folder"):
            load_images(config(tmp_path))

    def test_csv_is_not_ignored(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red\n")
        with pytest.raises(ValueError, match="convert it to metadata"):
            load_images(config(tmp_path))

    def test_caption_file_in_another_encoding(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
            load_images(config(tmp_path))

    @pytest.mark.parametrize("options", [{"size": 0}, {"heldout": 1.0}, {"heldout": -0.1}, {"path": ""}])
    def test_config_is_checked(self, options):
        with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
            DataConfig(**{"path": "x", **options})


class TestMetadata:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ("{not json}", "not a JSON object"),
            ('["a.png"]', "a JSON object is needed, got list"),
            ("[" * 100_000, "line 3"),
            ({"text": "x"}, "no column 'file_name', only 'text'"),
            ({"file_name": "a.png", "caption": "x"}, "no column 'text', only 'file_name', 'caption'"),
            ({"file_name": "a.png", "text": 3}, "column 'text' must be text, got 3"),
            ({"file_name": ["a.png"], "text": "x"}, "column 'file_name' must be text"),
            ('{"file_name": "a.png", "text": "\\ud800"}', "half a surrogate pair"),
            ({"file_name": "", "text": "x"}, "no file name"),
            ({"file_name": "a\0.png", "text": "x"}, "no file name"),
            ({"file_name": "../a.png", "text": "x"}, "leads out of the folder"),
            ({"file_name": "b/../../a.png", "text": "x"}, "leads out of the folder"),
            ({"file_name": "/etc/passwd", "text": "x"}, "leads out of the folder"),
            ({"file_name": "..\\a.png", "text": "x"}, "leads out of the folder"),
            ({"file_name": "C:\\a.png", "text": "x"}, "leads out of the folder"),
        ],
    )
    @pytest.mark.parametrize("strict", [False, True])
    def test_bad_rows_are_errors_with_their_line(self, tmp_path, row, reason, strict):
        save(tmp_path / "a.png")
        write_rows(tmp_path, {"file_name": "a.png", "text": "good"}, "", row)
        with pytest.raises(ValueError, match=reason) as error:
            load_images(config(tmp_path, strict=strict))
        assert "metadata.jsonl line 3" in str(error.value)
        assert "\n" not in str(error.value)

    def test_not_utf8(self, tmp_path):
        (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}\n')
        with pytest.raises(ValueError, match="line 1: not UTF-8"):
            load_images(config(tmp_path))

    @pytest.mark.parametrize(
        "text", ["", None, "word " * 5000, "تفاحة حمراء", "👩‍🚀", "a\0b", "<b>&amp;</b>"]
    )
    def test_odd_captions_are_kept(self, tmp_path, text):
        save(tmp_path / "a.png")
        write_rows(tmp_path, {"file_name": "a.png", "text": text})
        assert load_images(config(tmp_path)).captions == [(text or "").strip()]

    def test_another_caption_column_and_a_byte_order_mark(self, tmp_path):
        save(tmp_path / "a.png")
        row = json.dumps({"file_name": "a.png", "caption": "red"})
        (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8-sig")
        assert load_images(config(tmp_path, caption_column="caption")).captions == ["red"]

    def test_listing_opens_no_picture(self, folder):
        os.remove(folder / "a.png")
        assert [entry.path.name for entry in list_images(folder)] == ["a.png", "b.png", "c.png"]


class TestOrder:
    @pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 16)])
    def test_every_epoch_is_a_permutation(self, n, batch):
        steps = 3 * n  # n * batch * 3 indices: whole epochs
        stream = torch.cat([batch_indices(n, batch, 0, step) for step in range(steps)])
        assert len(stream) == steps * batch
        for epoch in stream.view(-1, n):
            assert epoch.sort().values.tolist() == list(range(n))

    def test_depends_on_seed_and_step_only(self):
        later = batch_indices(100, 8, 0, 40)
        for step in range(20):
            batch_indices(100, 8, 0, step)
        assert torch.equal(batch_indices(100, 8, 0, 40), later)
        assert later.dtype == torch.int64
        assert later.shape == (8,)
        assert not torch.equal(batch_indices(100, 8, 1, 40), later)
        first, second = (
            torch.cat([batch_indices(100, 50, 0, s) for s in steps]) for steps in ([0, 1], [2, 3])
        )
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
    def test_refuses_nonsense(self, arguments):
        with pytest.raises(ValueError, match="batch_indices needs"):
            batch_indices(*arguments)


class TestConcepts:
    def folder(self, root: Path) -> Path:
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number}.png")
        rows = [
            {"file_name": f"{n}.png", "text": c, "concept": c, "split": "heldout_pair" if n == 2 else "train"}
            for n, c in enumerate(("sun", "moon", "sun", "star"))
        ]
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return root

    def test_training_takes_the_named_ones_alone(self, tmp_path: Path) -> None:
        config = DataConfig(str(self.folder(tmp_path)), size=8, concepts=("sun", "star"))
        assert load_images(config, "train").concepts == ["sun", "star"]
        assert load_images(config, "heldout_pair").concepts == ["sun"]

    def test_one_without_pictures_is_an_error(self, tmp_path: Path) -> None:
        config = DataConfig(str(self.folder(tmp_path)), size=8, concepts=("sun", "mars"))
        with pytest.raises(ValueError, match="no training picture of data.concepts mars"):
            load_images(config, "train")
