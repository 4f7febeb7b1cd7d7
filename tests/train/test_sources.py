"""Sets that are no folders of pictures (tar shards, Hugging Face), and reading by several processes."""

import copy
import io
import json
import os
import signal
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.weights.io import save_weights
from train.cache import cached_moments, fingerprint
from train.columns import load_labels, picture_column, read_masks
from train.concat import read_sources, source_entries
from train.data import DataConfig, ImageFolder, load_images
from train.reading import Ahead, Reader, images_per_second
from train.shards import expand, names_shards
from train.streaming import mapped_key, require_whole


def picture(number, kind="PNG", size=(8, 8)):
    """The bytes of a picture that no other number has."""
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def pixels(number):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(picture(number))))).permute(2, 0, 1)


def write_tar(path, *members):
    """`members` are (name, bytes), or TarInfo for what has no content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def config(path, **options):
    return DataConfig(path=str(path), **{"size": 8, "heldout": 0.0, **options})


@pytest.fixture
def shards(tmp_path):
    """Three shards of four pictures."""
    for shard in range(3):
        members = []
        for number in range(4 * shard, 4 * shard + 4):
            members.append((f"{number:04}.png", picture(number)))
            if number % 2:
                members.append((f"{number:04}.txt", f"picture {number}\n".encode()))
            else:
                row = {"text": f"picture {number}", "concept": f"c{number % 3}", "style": "noise"}
                members.append((f"{number:04}.json", json.dumps(row).encode()))
        write_tar(tmp_path / "shards" / f"{shard:03}.tar", *members)
    return tmp_path / "shards"


def skipped(settings, split=None):
    with pytest.warns(UserWarning, match="could not be read") as caught:
        images = load_images(settings, split)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    return images


class TestShards:
    @pytest.mark.parametrize("path", ["", "/{000..002}.tar", "/{000,001,002}.tar"])
    def test_all_ways_to_name_them(self, shards, path):
        images = load_images(config(f"{shards}{path}"))
        assert images.captions == [f"picture {number}" for number in range(12)]
        assert images.files[:5] == [*(f"000.tar/{n:04}.png" for n in range(4)), "001.tar/0004.png"]
        assert images.concepts[:3] == ["c0", "", "c2"] and images.styles[:2] == ["noise", ""]
        assert all(torch.equal(images.pixels[n], pixels(n)) for n in range(12))

    def test_one_shard(self, shards):
        assert load_images(config(shards / "001.tar")).captions == [f"picture {n}" for n in range(4, 8)]

    def test_the_same_samples_as_the_library(self, shards):
        wds = pytest.importorskip("webdataset")
        theirs = list(wds.WebDataset(str(shards / "{000..002}.tar"), shardshuffle=False))
        ours = ImageFolder(config(shards))
        assert [f"{sample['__key__']}.png" for sample in theirs] == [
            entry.path.name for entry in ours.entries
        ]
        for sample, entry in zip(theirs, ours.entries, strict=True):
            assert sample["png"] == entry.stored.read()
            caption = (
                sample["txt"].decode().strip() if "txt" in sample else json.loads(sample["json"])["text"]
            )
            assert caption == entry.caption

    def test_what_the_library_writes(self, tmp_path):
        wds = pytest.importorskip("webdataset")
        with wds.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as sink:
            for number in range(5):
                # As img2dataset has them
                row = {"caption": f"c {number}", "url": None, "width": 8}
                sink.write({"__key__": f"a/{number}", "png": picture(number), "json": row})
        images = load_images(config(tmp_path))
        assert images.captions == [f"c {number}" for number in range(5)]
        assert images.files[4] == "001.tar/a/4.png"

    @pytest.mark.parametrize(
        "pattern", ["{000..003}", "{8..11}", "{08..11}", "{3..1}", "a{x,y}b{1..2}c", "none"]
    )
    def test_patterns_as_the_library_has_them(self, pattern):
        braceexpand = pytest.importorskip("braceexpand")
        assert expand(pattern) == list(braceexpand.braceexpand(pattern))

    @pytest.mark.parametrize("pattern", ["{}", "{a}", "{1..}", "{0..99999999}", "{0..9999}{0..9999}"])
    def test_bad_patterns(self, pattern):
        with pytest.raises(ValueError, match="data.path"):
            expand(pattern)

    def test_splits(self, tmp_path):
        rows = [{"text": "a", "split": "train"}, {"text": "b", "split": "heldout_image"}, {"text": "c"}]
        members = [
            m
            for n, r in enumerate(rows)
            for m in ((f"{n}.png", picture(n)), (f"{n}.json", json.dumps(r).encode()))
        ]
        write_tar(tmp_path / "a.tar", *members)
        assert load_images(config(tmp_path), "train").captions == ["a", "c"]
        assert load_images(config(tmp_path), "heldout_image").captions == ["b"]

    def test_a_share_is_held_out_by_name(self, shards):
        settings = config(shards, heldout=0.25)
        train, held = (load_images(settings, split).files for split in ("train", "heldout_image"))
        assert len(held) == 3 and sorted(train + held) == sorted(load_images(settings).files)

    def test_no_shards(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"002\.tar: no such tar archive"):
            load_images(config(tmp_path / "002.tar"))
        write_tar(tmp_path / "a.tar", ("a.png", picture(0)))
        with pytest.raises(FileNotFoundError, match=r"b\.tar: no such tar archive"):
            load_images(config(f"{tmp_path}/{{a,b}}.tar"))
        with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed.*unpack"):
            load_images(config(tmp_path / "a.tar.gz"))

    def test_a_folder_of_pictures_with_an_archive_beside_them_stays_one(self, tmp_path):
        write_tar(tmp_path / "a.tar", ("a.png", picture(0)))
        assert names_shards(str(tmp_path))
        (tmp_path / "b.png").write_bytes(picture(1))
        assert load_images(config(tmp_path)).files == ["b.png"]


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


class TestBadShards:
    """FAULTS 9, 10, 12: what a stranger puts into an archive is skipped by name, or refused where strict."""

    BAD = (
        ("../x.png", b"", "leads out of the folder"),
        ("/abs/x.png", b"", "leads out of the folder"),
        ("a\\..\\..\\x.png", b"", "leads out of the folder"),
        ("x.png", tarfile.SYMTYPE, "symbolic link"),
        ("x.png", tarfile.LNKTYPE, "hard link"),
        ("x.png", tarfile.CHRTYPE, "a device"),
        ("x.png", tarfile.BLKTYPE, "a device"),
        ("x.png", tarfile.FIFOTYPE, "a pipe"),
        ("../README", b"", "leads out of the folder"),
        ("x.png", b"", "not an image"),
        ("x.png", b"I am a text", "not an image"),
        ("x.png", picture(9, size=(64, 64))[:3000], "unreadable image"),
        ("x.json", b'{"text": "no picture"}', "x has no picture"),
    )

    @pytest.mark.parametrize(("name", "content", "told"), BAD)
    def test_members(self, tmp_path, name, content, told):
        secret = tmp_path / "secret.png"
        secret.write_bytes(picture(7))
        member = (
            special(name, content, str(secret)) if content in (*tarfile.SUPPORTED_TYPES,) else (name, content)
        )
        good = (("a.png", picture(0)), ("z.png", picture(1)))
        write_tar(tmp_path / "s" / "0.tar", good[0], member, good[1])
        before = sorted(tmp_path.rglob("*"))
        images = skipped(config(tmp_path / "s"))
        assert images.files == ["0.tar/a.png", "0.tar/z.png"]
        (reason,) = images.skipped
        assert told in reason and "0.tar" in reason and name.split("/")[-1].split(".")[0] in reason
        assert sorted(tmp_path.rglob("*")) == before  # nothing was written anywhere
        with pytest.raises(ValueError, match=told):
            load_images(config(tmp_path / "s", strict=True))

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            ("x.json", b"{not json", r"x\.json: not a JSON object"),
            ("x.json", b"[1]", r"x\.json: a JSON object is needed"),
            ("x.json", b"[" * 100_000, r"x\.json"),
            ("x.json", b'{"text": 3}', r"x\.json: column 'text' must be text"),
            ("x.json", b'{"text": "\\ud800"}', r"half a surrogate"),
            ("x.txt", b"\xff\xfe\xfa", r"x\.txt: not UTF-8"),
            ("x.txt", b"a" * (1 << 21), r"x\.txt' has 2097152 bytes"),
            ("x.jpg", picture(1, "JPEG"), "x has more than one picture"),
            ("x.png", picture(1), "x has more than one picture"),
        ],
    )
    def test_samples(self, tmp_path, name, content, told):
        members = ("a.png", picture(0)), ("x.png", picture(3)), (name, content), ("z.png", picture(1))
        write_tar(tmp_path / "0.tar", *members)
        if b"a" * 9 in content:  # the caption is left out by name, and the picture stays
            images = ImageFolder(config(tmp_path))
            assert len(images) == 3
            assert [entry.caption for entry in images.entries] == ["", "", ""]
            return
        with pytest.warns(UserWarning, match=told):
            assert load_images(config(tmp_path)).files == ["0.tar/a.png", "0.tar/z.png"]

    @pytest.mark.parametrize("text", ["", "word " * 5000, "تفاحة حمراء", "👩‍🚀", "a\0b"])
    def test_odd_captions_are_kept(self, tmp_path, text):
        write_tar(tmp_path / "0.tar", ("a.png", picture(0)), ("a.json", json.dumps({"text": text}).encode()))
        assert load_images(config(tmp_path)).captions == [text.strip()]

    @pytest.mark.parametrize("damage", ["cut", "header", "empty", "rubbish", "gzip"])
    def test_damaged_archives_lose_what_follows(self, shards, damage):
        file = shards / "001.tar"
        whole = bytearray(file.read_bytes())
        if damage == "cut":
            whole = whole[: len(whole) // 2 - 100]
        elif damage == "header":
            second = whole.index(b"0005.png")
            whole[second : second + 512] = b"\x11" * 512
        elif damage == "gzip":
            import gzip

            whole = gzip.compress(bytes(whole))
        else:
            whole = b"" if damage == "empty" else b"\x11" * 5000
        file.write_bytes(bytes(whole))
        images = skipped(config(shards))
        lost = 12 - len(images)
        assert 1 <= lost <= 4 and len(images.skipped) >= 1
        assert all("001.tar" in reason for reason in images.skipped)
        with pytest.raises(ValueError, match=r"001\.tar"):
            load_images(config(shards, strict=True))

    def test_none_left(self, tmp_path):
        (tmp_path / "0.tar").write_bytes(b"rubbish" * 1000)
        with pytest.raises(ValueError, match=r"no image is left: .*0\.tar"):
            load_images(config(tmp_path))

    def test_a_shard_that_changes_after_the_list(self, shards):
        folder = ImageFolder(config(shards))
        stamp = folder.entries[5].stamp()
        file = shards / "001.tar"
        file.write_bytes(file.read_bytes()[:700])
        with pytest.raises(ValueError, match=r"001\.tar: it ends before byte \d+, it was cut short"):
            folder.pixels(5)
        assert folder.entries[5].stamp() != stamp
        file.unlink()
        with pytest.raises(ValueError, match=r"001\.tar: no such file"):
            folder.pixels(5)


class TestTables:
    """Sets of Hugging Face that are on disk."""

    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets")

    @pytest.fixture
    def table(self, datasets):
        rows = {
            "image": [{"bytes": picture(n), "path": None} for n in range(6)],
            "text": [f"picture {n}" for n in range(6)],
            "concept": [f"c{n % 2}" for n in range(6)],
        }
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    def same(self, images):
        assert images.captions == [f"picture {n}" for n in range(6)]
        assert images.concepts == ["c0", "c1"] * 3
        assert all(torch.equal(images.pixels[n], pixels(n)) for n in range(6))

    def test_saved_to_disk(self, table, datasets, tmp_path):
        table.save_to_disk(tmp_path / "one")
        self.same(load_images(config(f"hf:{tmp_path}/one", workers=2)))
        both = datasets.DatasetDict({"train": table.select([0]), "test": table})
        both.save_to_disk(tmp_path / "two")
        self.same(load_images(config(f"hf:{tmp_path}/two", split="test")))
        with pytest.raises(ValueError, match="no split 'dev' .data.split., only 'train', 'test'"):
            load_images(config(f"hf:{tmp_path}/two", split="dev"))

    def test_parquet(self, table, tmp_path):
        table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
        self.same(load_images(config(f"hf:{tmp_path}/set")))
        self.same(load_images(config(f"hf:{tmp_path}/set/train-00000-of-00001.parquet")))

    def test_a_folder_with_pictures(self, datasets, tmp_path):
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(picture(number))
        rows = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in range(3)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        images = load_images(config(f"hf:{tmp_path}"))
        assert images.captions == ["picture 0", "picture 1", "picture 2"]
        assert torch.equal(images.pixels[2], pixels(2))

    def test_columns(self, datasets, tmp_path):
        rows = {"img": [picture(0), picture(1)], "name": [1, 0], "many": [["a", "b"], ["c"]], "style": [3, 4]}
        kinds = datasets.Features(
            {
                "img": datasets.Value("binary"),
                "name": datasets.ClassLabel(names=["cat", "dog"]),
                "many": datasets.List(datasets.Value("string")),
                "style": datasets.Value("int64"),
            }
        )
        datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set")
        settings = {"path": f"hf:{tmp_path}/set", "image_column": "img"}
        assert load_images(config(**settings, caption_column="name")).captions == ["dog", "cat"]
        assert load_images(config(**settings, caption_column="many")).captions == ["a", "c"]
        assert load_images(config(**settings, caption_column="")).captions == ["", ""]
        with pytest.raises(ValueError, match="no column 'text' .data.caption_column., only 'img', 'name'"):
            load_images(config(**settings))
        with pytest.raises(ValueError, match="no column 'image' .data.image_column., only 'img', 'name'"):
            load_images(config(settings["path"]))
        with pytest.raises(ValueError, match="column 'name' .data.image_column. has no pictures"):
            load_images(config(settings["path"], image_column="name", caption_column=""))

    def test_bad_rows(self, datasets, tmp_path):
        outside = tmp_path / "outside.png"
        outside.write_bytes(picture(0))
        values = [
            {"bytes": picture(0), "path": None},
            {"bytes": b"", "path": None},
            {"bytes": b"no picture", "path": None},
            {"bytes": None, "path": "../outside.png"},
            {"bytes": None, "path": str(outside)},
            {"bytes": None, "path": "gone.png"},
            None,
        ]
        table = datasets.Dataset.from_dict({"image": values, "text": ["x"] * 7})
        table.save_to_disk(tmp_path / "set")
        images = skipped(config(f"hf:{tmp_path}/set"))
        assert images.files == ["train-00000000"]
        told = ["not an image", "not an image", "leads out", "leads out", "No such file", "has no picture"]
        assert len(images.skipped) == 6
        assert all(words in reason for words, reason in zip(told, images.skipped, strict=True))

    def test_no_such_set(self, datasets, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_images(config(f"hf:{tmp_path}/none"))
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(ValueError, match="no data set that datasets can read") as error:
            load_images(config(f"hf:{tmp_path}"))
        assert "\n" not in str(error.value)

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ValueError, match=r"needs the package datasets: pip install .*\[data\]"):
            load_images(config(f"hf:{tmp_path}"))


class TestWorkers:
    @pytest.fixture
    def folder(self, tmp_path):
        """Forty pictures, and among them three that are none."""
        for number in range(40):
            (tmp_path / f"{number:02}.png").write_bytes(picture(number) if number % 15 else b"")
        return tmp_path

    def test_the_same_for_any_number(self, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = (load_images(config(folder, workers=workers)) for workers in (0, 2))
        assert torch.equal(first.pixels, second.pixels)
        assert first.files == second.files and first.skipped == second.skipped and len(first.skipped) == 3

    def test_a_killed_worker_does_no_harm(self, folder):
        entries = ImageFolder(config(folder)).entries
        with Reader(entries, 8, workers=1) as reader:
            found = reader.in_order(range(40))
            next(found)
            for pid in reader.pool._processes:
                os.kill(pid, signal.SIGKILL)
            with pytest.warns(UserWarning, match="was killed"):
                list(reader.in_order(list(range(40)) * 20))
            assert reader.pool is None
            for (_, ours), theirs in zip(reader.in_order(range(40)), reader.try_all(range(40)), strict=True):
                assert type(ours) is type(theirs) and np.array_equal(ours, theirs)

    @pytest.mark.parametrize("threads", [0, 1])
    def test_batches_ahead_are_those_that_are_asked_for(self, threads):
        asked = []

        def rows(step, part):
            asked.append((step, part))
            return torch.tensor([10 * step + part])

        ahead = Ahead(torch.arange(100), rows, threads)
        assert [int(ahead(2, part)) for part in (0, 1, 0)] == [20, 21, 20]
        assert asked == ([(2, 0), (3, 0), (2, 1), (3, 1)] if threads else [(2, 0), (2, 1), (2, 0)])
        assert [int(ahead(3, part)) for part in (0, 1)] == [30, 31]
        assert int(ahead(7, 1)) == 71  # a jump, as after a resume
        assert [*ahead.started] == ([(7, 1), (8, 1)] if threads else [])

    def test_the_rate_of_a_loader(self):
        assert images_per_second(lambda step: None, batch=4, steps=3, skipped=1) > 0

    @pytest.mark.parametrize("workers", [-1, 1000])
    def test_config_is_checked(self, workers):
        with pytest.raises(ValueError, match="data.workers"):
            DataConfig("x", workers=workers)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    config = AutoencoderConfig(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    return make_autoencoder(config).eval()


class TestStreaming:
    """Pixels and moments in mapped files: the same numbers, without the memory."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Thirty pictures, two of them bad."""
        (tmp_path / "set").mkdir()
        for number in range(30):
            content = picture(number) if number % 20 != 3 else b"bad"
            (tmp_path / "set" / f"{number:02}.png").write_bytes(content)
        return tmp_path / "set"

    @pytest.fixture
    def streamed(self, folder):
        return config(folder, stream=True, cache=str(folder.parent / "cache"), heldout=0.2)

    @staticmethod
    def quietly(settings, split="train"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_images(settings, split)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_same_images(self, streamed, workers):
        for split in ("train", "heldout_image", None):
            held = self.quietly(replace(streamed, stream=False), split)
            for _ in range(2):  # made, then found
                ours = self.quietly(replace(streamed, workers=workers), split)
                assert torch.equal(held.pixels, ours.pixels) and mapped_key(ours.pixels)
                assert (held.files, held.captions, held.skipped) == (ours.files, ours.captions, ours.skipped)
                rows = torch.tensor([3, 1, 1])
                assert torch.equal(held.pixels[rows], ours.pixels[rows])

    def test_bad_pictures_are_counted_again_and_refused_where_strict(self, streamed):
        for _ in range(2):
            assert len(skipped(streamed).skipped) == 2
        with pytest.raises(ValueError, match=r"03\.png: not an image"):
            load_images(replace(streamed, strict=True))

    def test_many_bad_pictures_are_told_of_in_short(self, tmp_path):
        for number in range(150):
            (tmp_path / f"{number:03}{'ü' * 70}.png").write_bytes(b"bad")
        (tmp_path / "good.png").write_bytes(picture(0))
        images = skipped(config(tmp_path, stream=True, cache=str(tmp_path / "cache")))
        assert len(images.skipped) == 150 and images.skipped[99] != "..." == images.skipped[100]

    def test_an_empty_split(self, folder, streamed):
        images = self.quietly(replace(streamed, heldout=0.0), "heldout_image")
        assert images.pixels.shape == (0, 3, 8, 8)

    def test_other_pictures_or_sizes_are_never_taken_for_these(self, folder, streamed):
        first = self.quietly(streamed, None)
        assert self.quietly(replace(streamed, size=4), None).pixels.shape[-1] == 4
        (folder / "05.png").write_bytes(picture(99))
        second = self.quietly(streamed, None)
        assert torch.equal(second.pixels[4], pixels(99)) and torch.equal(first.pixels[4], pixels(5))
        assert mapped_key(first.pixels) != mapped_key(second.pixels)
        os.utime(folder / "05.png", ns=(0, 0))
        assert mapped_key(self.quietly(streamed, None).pixels) != mapped_key(second.pixels)

    def test_what_is_left_of_a_file_is_made_anew(self, streamed):
        first = self.quietly(streamed).pixels.clone()
        (file,) = (path for path in Path(streamed.cache).iterdir())
        for content in (file.read_bytes()[:-1], b"", b"\xff" * 100):
            file.unlink()  # a mapped one must not be cut
            file.write_bytes(content)
            assert torch.equal(self.quietly(streamed).pixels, first)

    def test_the_same_moments_in_the_same_file(self, streamed, autoencoder, tmp_path):
        held, ours = (self.quietly(s).pixels for s in (replace(streamed, stream=False), streamed))
        expected = cached_moments(tmp_path / "a", "train", held, autoencoder)
        for _ in range(2):
            moments = cached_moments(tmp_path / "b", "train", ours, autoencoder)
            assert all(torch.equal(x, y) and mapped_key(y) for x, y in zip(expected, moments, strict=True))
        (a,), (b,) = (list((tmp_path / name).iterdir()) for name in "ab")
        assert a.read_bytes() == b.read_bytes()
        save_weights(tmp_path / "c", {"mean": expected[0], "std": expected[1]})
        assert a.read_bytes() == (tmp_path / "c").read_bytes()

    def test_moments_of_another_autoencoder_crop_or_part_are_made_anew(self, streamed, autoencoder, tmp_path):
        """FAULTS 31, with keys that need no pixel."""
        pixels, other = self.quietly(streamed).pixels, copy.deepcopy(autoencoder)
        other.quant_conv.bias.data[0] += 1e-3
        small = self.quietly(replace(streamed, size=4)).pixels
        keys = {
            fingerprint(pixels, autoencoder),
            fingerprint(pixels, other),
            fingerprint(pixels[:5], autoencoder),
            fingerprint(pixels[5:10], autoencoder),
            fingerprint(small, autoencoder),
            fingerprint(pixels.clone(), autoencoder),
        }
        assert len(keys) == 6
        assert fingerprint(self.quietly(streamed).pixels, autoencoder) in keys
        cached_moments(tmp_path, "train", pixels, autoencoder)
        cached_moments(tmp_path, "train", pixels, other)
        assert len(list(tmp_path.glob("train-*.safetensors"))) == 2

    def test_a_cut_file_is_told_before_it_is_read(self, streamed):
        images = self.quietly(streamed)
        require_whole(images.pixels, torch.zeros(1), None)
        (file,) = Path(streamed.cache).iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{file.name} has {len(whole) // 2} bytes, it had {len(whole)}"):
            require_whole(images.pixels)
        assert torch.equal(
            self.quietly(streamed).pixels, self.quietly(replace(streamed, stream=False)).pixels
        )
        require_whole(images.pixels)  # of a file that is no more


def load_masks(config, files, factor):
    return read_masks(picture_column(config, "mask", files), factor, (config.size, config.size))


def load_sources(config, files):
    return read_sources(source_entries(config, files), (config.size, config.size))


class TestOtherColumns:
    """Labels, masks and sources: of shards and of tables as of a folder of the same pictures."""

    LABELS = (2, 0, None, 1)

    def folder(self, root):
        rows = []
        for number, label in enumerate(self.LABELS):
            row = {"file_name": f"{number}.png", "text": ""} | ({} if label is None else {"label": label})
            (root / f"{number}.png").write_bytes(picture(number))
            for column, there in (("mask", number % 2), ("source", number > 0)):
                if there:
                    (root / f"{number}.{column}.png").write_bytes(picture(100 + number))
                    row[column] = f"{number}.{column}.png"
            rows.append(row)
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return rows

    def the_same(self, folder, other, names):
        """Both sets list the pictures in one order, under other names."""
        ours = [f"{number}.png" for number in range(4)]
        assert torch.equal(load_masks(other, names, 2), load_masks(folder, ours, 2))
        assert load_masks(other, names, 2).min() < 0.9  # none of the four counts everywhere
        assert torch.equal(load_sources(other, names[1:]), load_sources(folder, ours[1:]))
        kept = [0, 1, 3]
        assert load_labels(other, [names[n] for n in kept], 3) == [2, 0, 1]
        for file in (names[2], ours[2]):
            with pytest.raises(ValueError, match=r"2.* has no label, a whole number in 0..2 is needed"):
                load_labels(folder if file == ours[2] else other, [file], 3)
        with pytest.raises(ValueError, match=r"0.* has no source, the picture that it is an edit of"):
            load_sources(other, names)

    def test_shards(self, tmp_path):
        self.folder(tmp_path)
        members = []
        for number, label in enumerate(self.LABELS):
            for file in sorted(tmp_path.glob(f"{number}.*png")):
                members.append((f"00{file.name}", file.read_bytes()))
            if label is not None:
                told = (
                    (f"00{number}.cls", str(label))
                    if number
                    else (f"00{number}.json", json.dumps({"label": label}))
                )
                members.append((told[0], told[1].encode()))
        shard = write_tar(tmp_path / "shards" / "0.tar", *members)
        names = ImageFolder(config(shard)).files
        assert names == [f"0.tar/00{number}.png" for number in range(4)]
        self.the_same(config(tmp_path), config(shard), names)

    def test_samples_that_say_two_things(self, tmp_path):
        shard = write_tar(
            tmp_path / "0.tar",
            ("a.png", picture(0)), ("a.cls", b"one"),
            ("b.png", picture(0)), ("b.mask.png", picture(0)), ("b.mask.jpg", picture(0)),
            ("c.png", picture(0)), ("c.cls", b" 3\n"),
        )  # fmt: skip
        folder = ImageFolder(config(shard))
        assert folder.files == ["0.tar/c.png"]
        assert folder.skipped == [f"{shard}: a.cls: not a whole number", f"{shard}: b has more than one mask"]
        assert load_labels(config(shard), folder.files, 4) == [3]
        with pytest.raises(ValueError, match="0.tar: no row has a column 'mask'"):
            load_masks(config(shard), folder.files, 2)

    @pytest.mark.parametrize("named", [False, True])
    def test_tables(self, tmp_path, named):
        datasets = pytest.importorskip("datasets")
        rows = self.folder(tmp_path)

        def content(name):
            return {"bytes": (tmp_path / name).read_bytes(), "path": None} if name else None

        labels = [-1 if label is None and named else label for label in self.LABELS]
        columns = {"image": [content(row["file_name"]) for row in rows], "text": [""] * 4, "label": labels}
        columns |= {column: [content(row.get(column)) for row in rows] for column in ("mask", "source")}
        table = datasets.Dataset.from_dict(columns)
        for column in ("image", "mask", "source"):
            table = table.cast_column(column, datasets.Image())
        if named:
            table = table.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
            table = table.select([3, 2, 1, 0]).select([3, 2, 1, 0])  # rows by a table of numbers
        table.save_to_disk(tmp_path / "set")
        other = config(f"hf:{tmp_path}/set")
        self.the_same(config(tmp_path), other, ImageFolder(other).files)
