"""Training images: a folder of pictures with captions, as tensors.

Two forms of folder are read, the first of which `train/prepare.py` writes:

    metadata.jsonl      one row for each picture, {"file_name": "noto/1f34e.png", "text": "a red apple"} (the
                        Hugging Face convention); "concept", "style" and "split" are columns of ours, optional
    no metadata.jsonl   every picture below the folder, its caption in a .txt file of the same name, if any

A picture is turned upright (EXIF), put on white where it is transparent, cut to its centre square and
resized. Embedded colour profiles are ignored; of an animation the first frame is used. `load_images` reads a
set that fits memory at once; `ImageFolder` reads one picture at a time. `batch_indices` says which images a
training step sees, as a function of (seed, step): there is no iterator whose state would have to be saved.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ldm.seeding import generator
from sample.images import read_rgb

METADATA = "metadata.jsonl"
SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_CAPTION_FILE = 1 << 20  # bytes; a caption is a sentence, a larger .txt is something else
NAMED_IN_WARNING = 3  # of the skipped pictures, how many the warning names


@dataclass(frozen=True)
class DataConfig:
    """Which pictures to train on.

    path: the folder. size: side of the square images in pixels. strict: a picture that cannot be read is an
    error; else it is skipped with a warning. caption_column: the column of metadata.jsonl with the captions.
    heldout: share of the pictures kept from training where metadata.jsonl has no column "split".
    concepts: train on the pictures of these alone (column "concept"); empty takes all.
    """

    path: str
    size: int = 64
    strict: bool = False
    caption_column: str = "text"
    heldout: float = 0.02
    concepts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.path is empty, it must be a folder of images")
        if self.size < 1:
            raise ValueError(f"data.size is {self.size}, it must be at least 1 pixel")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"data.heldout is {self.heldout}, it must be in [0, 1)")


@dataclass(frozen=True)
class Entry:
    """One picture of a folder, not read yet; `source` ("metadata.jsonl line 3") is for errors."""

    path: Path
    caption: str = ""
    concept: str = ""
    style: str = ""
    split: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Images:
    """A set in memory: uint8 pixels and what is known of each; `skipped` are one-line reasons."""

    pixels: UInt8[Tensor, "N 3 H W"]
    captions: list[str]
    concepts: list[str]
    styles: list[str]
    files: list[str]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.captions)


class ImageFolder(Dataset[tuple[Tensor, str]]):
    """The pictures of a folder, read when asked for: `folder[i]` is (image, caption).

    The image is (3, size, size) float32 in [-1, 1].

    `split` keeps the rows of that split (None: all). Without a column "split", the share `config.heldout` of
    the pictures, picked by a hash of their names, is every split but "train". Only the list is read here: a
    picture that turns out to be unreadable raises ValueError with its name when it is asked for.

    Raises ValueError (metadata rows by line number), FileNotFoundError, NotADirectoryError.
    """

    def __init__(self, config: DataConfig, split: str | None = None):
        self.config = config
        self.root = Path(config.path).expanduser()
        entries = _select(list_images(self.root, config.caption_column), split, config.heldout, self.root)
        self.entries = _of_concepts(entries, config.concepts, self.root) if split == "train" else entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Float32[Tensor, "3 H W"], str]:
        return to_float(self.pixels(index)), self.entries[index].caption

    def pixels(self, index: int) -> UInt8[Tensor, "3 H W"]:
        """Picture `index` as uint8."""
        entry = self.entries[index]
        try:
            return read_image(entry.path, self.config.size)
        except ValueError as error:
            raise ValueError(f"{error} ({entry.source})" if entry.source else str(error)) from None


def load_images(config: DataConfig, split: str | None = None) -> Images:
    """Read a whole folder, or one split of it, into memory (a thousand images of 64 pixels take 12 MB).

    Pictures that cannot be read are skipped with one warning that counts them, or raise ValueError where
    `config.strict`. No usable picture at all is a ValueError; only a held-out split may be empty.
    """
    folder = ImageFolder(config, split)
    pixels, rows, skipped = [], [], []
    for index, entry in enumerate(folder.entries):
        try:
            pixels.append(folder.pixels(index))
            rows.append(entry)
        except ValueError as error:
            if config.strict:
                raise
            skipped.append(str(error))
    if skipped:
        named = "; ".join(skipped[:NAMED_IN_WARNING]) + ("; ..." if len(skipped) > NAMED_IN_WARNING else "")
        counted = f"{len(skipped)} of {len(folder)} images could not be read"
        if not rows:
            raise ValueError(f"{folder.root}: {counted}, none is left: {named}")
        warnings.warn(f"{folder.root}: {counted} and are skipped: {named}", stacklevel=2)
    return Images(
        pixels=torch.stack(pixels)
        if pixels
        else torch.zeros(0, 3, config.size, config.size, dtype=torch.uint8),
        captions=[row.caption for row in rows],
        concepts=[row.concept for row in rows],
        styles=[row.style for row in rows],
        files=[row.path.relative_to(folder.root).as_posix() for row in rows],
        skipped=skipped,
    )


def to_float(pixels: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Bytes 0..255 to float32 in [-1, 1], where the models live."""
    return pixels.float() / 127.5 - 1


# --- which images a step sees -------------------------------------------------------------------------------


def batch_indices(n: int, batch: int, seed: int, step: int) -> Int64[Tensor, " batch"]:
    """Indices (batch,) int64 into `n` images for `step` = 0, 1, ...

    A pure function, so that a resumed run sees what an uninterrupted one would. Every epoch is a permutation
    of its own, drawn from (seed, epoch); batches run on across the end of an epoch, so no image is left out
    and none comes twice in one epoch.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"batch_indices needs n >= 1, batch >= 1, step >= 0, got {n}, {batch}, {step}")
    start, end = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(start // n, (end - 1) // n + 1):
        first = epoch * n
        parts.append(_permutation(n, seed, epoch)[max(start - first, 0) : end - first])
    return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


# --- the list of a folder -----------------------------------------------------------------------------------


def list_images(root: Path, caption_column: str = "text") -> list[Entry]:
    """The pictures of a folder, none opened yet, in the order of metadata.jsonl, else of their names."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; data.path must be a folder of images")
    if (root / METADATA).is_file():
        return list(_read_metadata(root, caption_column))
    if (root / "metadata.csv").is_file():
        raise ValueError(
            f"{root / 'metadata.csv'} is not read; convert it to {METADATA}, one JSON object per line"
        )
    paths = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = (path for path in paths if not any(p.startswith(".") for p in path.relative_to(root).parts))
    return [Entry(path, _sibling_caption(path)) for path in sorted(visible) if path.is_file()]


def _sibling_caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ""
    if text.stat().st_size > MAX_CAPTION_FILE:
        raise ValueError(f"{text} has {text.stat().st_size} bytes, too many for a caption")
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{text} is not UTF-8 text") from None


def _read_metadata(root: Path, caption_column: str) -> Iterator[Entry]:
    with open(root / METADATA, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{METADATA} line {number}"
            try:
                yield _parse_row(json.loads(line.decode("utf-8-sig")), root, caption_column, where)
            except UnicodeDecodeError:
                raise ValueError(f"{root / METADATA} line {number}: not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{root / METADATA} line {number}: not a JSON object ({error.msg})"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{root / METADATA} line {number}: {error}") from None


def _parse_row(row: Any, root: Path, caption_column: str, where: str) -> Entry:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {type(row).__name__}")
    for column in ("file_name", caption_column):
        if column not in row:
            raise ValueError(f"no column {column!r}, only {', '.join(map(repr, row)) or 'none'}")
    values = {}
    for column in ("file_name", caption_column, "concept", "style", "split"):
        value = row.get(column)
        if not isinstance(value, str | None):
            raise ValueError(f"column {column!r} must be text, got {value!r:.60}")
        if any("\ud800" <= char <= "\udfff" for char in value or ""):
            raise ValueError(f"column {column!r} has half a surrogate pair, which is no text")
        values[column] = value or ""
    name = values["file_name"]
    # Windows rules too: "..\x" and "C:\x" must not be file names here and paths elsewhere.
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if not parts or "\0" in name:
        raise ValueError(f"file_name {name!r} is no file name")
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise ValueError(f"file_name {name!r} leads out of the folder")
    caption = values[caption_column].strip()
    return Entry(root / name, caption, values["concept"], values["style"], values["split"] or None, where)


def _select(entries: list[Entry], split: str | None, heldout: float, root: Path) -> list[Entry]:
    """The entries of `split`; without any column "split", a hash of the names holds some out."""
    if not entries:
        raise ValueError(f"{root}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
    if split is None:
        return entries
    if any(entry.split for entry in entries):
        chosen = [entry for entry in entries if (entry.split or "train") == split]
        if not chosen and split == "train":
            present = ", ".join(sorted({str(entry.split) for entry in entries}))
            raise ValueError(f'{root / METADATA}: no row has split "train", only {present}')
        return chosen
    names = [entry.path.relative_to(root).as_posix() for entry in entries]
    count = min(math.ceil(heldout * len(names)), len(set(names)) - 1)  # one at least is for training
    held = set(sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [entry for entry, name in zip(entries, names, strict=True) if (name in held) != (split == "train")]


def _of_concepts(entries: list[Entry], concepts: tuple[str, ...], root: Path) -> list[Entry]:
    """The entries that show one of `concepts`; all where none is named.

    Raises ValueError for a concept that no entry shows.
    """
    unknown = set(concepts) - {entry.concept for entry in entries}
    if unknown:
        raise ValueError(f"{root}: no training picture of data.concepts {', '.join(sorted(unknown)[:5])}")
    return [entry for entry in entries if not concepts or entry.concept in concepts]


# --- one picture --------------------------------------------------------------------------------------------


def read_image(path: Path, size: int) -> UInt8[Tensor, "3 {size} {size}"]:
    """Read one picture as (3, size, size) uint8 RGB.

    Raises ValueError with the file's name and what is wrong with it.
    """
    return torch.from_numpy(np.array(read_rgb(path, size))).permute(2, 0, 1).contiguous()
