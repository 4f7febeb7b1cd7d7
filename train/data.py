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
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ldm.seeding import generator
from train.buckets import BucketConfig, bucket_shapes
from train.entries import METADATA, SUFFIXES, Entry, Listing, list_images
from train.reading import Reader, read_picture, to_pixels
from train.shards import list_shards, names_shards
from train.streaming import stream_images
from train.tables import TABLE, list_table

__all__ = ["METADATA", "DataConfig", "ImageFolder", "Images", "batch_indices", "list_images", "load_images"]

MAX_WORKERS = 256
NAMED_IN_WARNING = 3  # of the skipped pictures, how many the warning names


@dataclass(frozen=True)
class DataConfig:
    """Which pictures to train on.

    path: the folder. size: side of the square images in pixels. strict: a picture that cannot be read is an
    error; else it is skipped with a warning. caption_column: the column of metadata.jsonl with the captions.
    heldout: share of the pictures kept from training where metadata.jsonl has no column "split".
    concepts: train on the pictures of these alone (column "concept"); empty takes all.
    workers: processes that read pictures; the result is the same for any number. stream: keep the pixels in a
    file of the folder `cache` (empty: one in the user's cache), not in memory, with the same result.
    split, image_column: of a set of Hugging Face, which part is read and where its pictures are.
    buckets: cut pictures to several shapes rather than to squares, see `buckets.py`.
    """

    path: str
    size: int = 64
    strict: bool = False
    caption_column: str = "text"
    heldout: float = 0.02
    concepts: tuple[str, ...] = ()
    workers: int = 0
    stream: bool = False
    cache: str = ""
    split: str = "train"
    image_column: str = "image"
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.path is empty, it must be a folder of images")
        if not 0 <= self.workers <= MAX_WORKERS:
            raise ValueError(f"data.workers is {self.workers}, it must be in 0..{MAX_WORKERS}")
        if self.size < 1:
            raise ValueError(f"data.size is {self.size}, it must be at least 1 pixel")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"data.heldout is {self.heldout}, it must be in [0, 1)")
        if self.buckets.on and self.stream:
            raise ValueError("data.buckets.on=true needs data.stream=false: buckets are held in memory")
        if self.buckets.on:
            bucket_shapes(self.buckets, self.size)  # refuses now what no picture could fit


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
        listing = list_set(config)
        self.root = listing.root
        self.skipped = listing.skipped if split in (None, "train") else []  # told of once, not by every split
        if not listing.entries and self.skipped:
            raise ValueError(f"{self.root}: no image is left: {named(self.skipped)}")
        entries = _select(listing.entries, split, config.heldout, self.root)
        self.entries = _of_concepts(entries, config.concepts, self.root) if split == "train" else entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Float32[Tensor, "3 H W"], str]:
        return to_float(self.pixels(index)), self.entries[index].caption

    def pixels(self, index: int) -> UInt8[Tensor, "3 H W"]:
        """Picture `index` as uint8."""
        return to_pixels([read_picture(self.entries[index], self.config.size)])[0]

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]

    @property
    def files(self) -> list[str]:
        return [entry.path.relative_to(self.root).as_posix() for entry in self.entries]

    def reader(self) -> Reader:
        return Reader(self.entries, self.config.size, self.config.workers)

    def tell(self, unread: Sequence[str], left: int) -> list[str]:
        """One warning that counts `unread`, reasons why pictures of the list could not be read, and what the
        list itself left out; all of these.

        Raises ValueError where `config.strict` or where none is `left`.
        """
        skipped = [*self.skipped, *unread]
        if not skipped:
            return []
        if self.config.strict:
            raise ValueError(skipped[0])
        counted = f"{len(skipped)} of {len(self) + len(self.skipped)} images could not be read"
        if not left:
            raise ValueError(f"{self.root}: {counted}, none is left: {named(skipped)}")
        warnings.warn(f"{self.root}: {counted} and are skipped: {named(skipped)}", stacklevel=3)
        return skipped


def named(skipped: Sequence[str]) -> str:
    """The first few of these reasons, in one line."""
    return "; ".join(skipped[:NAMED_IN_WARNING]) + ("; ..." if len(skipped) > NAMED_IN_WARNING else "")


def load_images(config: DataConfig, split: str | None = None) -> Images:
    """Read a whole set, or one split of it, into memory (a thousand images of 64 pixels take 12 MB).

    Pictures that cannot be read are skipped with one warning that counts them, or raise ValueError where
    `config.strict`. No usable picture at all is a ValueError; only a held-out split may be empty.
    """
    folder = ImageFolder(config, split)
    pixels, rows, unread = stream_images(folder) if config.stream else _read_all(folder)
    entries = [folder.entries[row] for row in rows]
    skipped = folder.tell(unread, len(rows))
    return Images(
        pixels=pixels,
        captions=[entry.caption for entry in entries],
        concepts=[entry.concept for entry in entries],
        styles=[entry.style for entry in entries],
        files=[entry.path.relative_to(folder.root).as_posix() for entry in entries],
        skipped=skipped,
    )


def _read_all(folder: ImageFolder) -> tuple[Tensor, list[int], list[str]]:
    """Pixels of the pictures that can be read, their numbers in the list, and why the others cannot."""
    size, pixels, rows, unread = folder.config.size, [], [], []
    with folder.reader() as reader:
        for index, picture in reader.in_order(range(len(folder))):
            if isinstance(picture, str):
                if folder.config.strict:
                    raise ValueError(picture)
                unread.append(picture)
            else:
                pixels.append(picture)
                rows.append(index)
    return to_pixels(pixels) if rows else torch.zeros(0, 3, size, size, dtype=torch.uint8), rows, unread


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


# --- the pictures of a set ----------------------------------------------------------------------------------


def list_set(config: DataConfig) -> Listing:
    """All pictures that `data.path` names: a folder of files, tar archives, or a set of Hugging Face."""
    if config.path.startswith(TABLE):
        return list_table(config.path, config.split, config.image_column, config.caption_column)
    if names_shards(config.path):
        return list_shards(config.path, config.caption_column)
    root = Path(config.path).expanduser()
    return Listing(root, list_images(root, config.caption_column))


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
            raise ValueError(f'{root}: no row has split "train", only {present}')
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
    return to_pixels([read_picture(Entry(path), size)])[0]
