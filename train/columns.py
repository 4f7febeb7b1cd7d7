"""What a set says of a picture beyond caption and style: "mask", how much each place counts in the loss,
"label", the number of its class, "source", the picture that it is an edit of. Columns of metadata.jsonl or of
a table, members of a shard's sample (`shards.py`, `tables.py`); read for the pictures that `data.py` kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float32
from torch import Tensor

from train.buckets import Shape
from train.data import METADATA, DataConfig, list_set
from train.entries import Entry, Stored, unsafe
from train.reading import read_picture
from train.shards import names_shards
from train.tables import TABLE


def place_of(config: DataConfig) -> str:
    """Where the columns of a set stand, for errors."""
    if config.path.startswith(TABLE) or names_shards(config.path):
        return config.path
    return str(Path(config.path).expanduser() / METADATA)


def read_column(config: DataConfig, column: str, files: list[str]) -> tuple[Path, list[Any]]:
    """The set's root, and what the set says in `column` of each of `files` (names as `ImageFolder.files`),
    None where nothing. The set is listed anew: ask once for all files.

    Raises ValueError for a folder without metadata.jsonl, where no picture has that column, and where two
    rows of one picture differ in it.
    """
    place = place_of(config)
    if place.endswith(METADATA) and not Path(place).is_file():
        raise ValueError(f"{place} does not exist, and so no picture has a {column!r}")
    listing = list_set(config)
    values: dict[str, Any] = {}
    for entry in listing.entries:
        if entry.more is None or column not in entry.more:
            continue
        file = entry.path.relative_to(listing.root).as_posix()
        if values.setdefault(file, entry.more[column]) != entry.more[column]:
            raise ValueError(f"{place}: two rows of {file} differ in {column!r}")
    if not values:
        raise ValueError(f"{place}: no row has a column {column!r}")
    return listing.root, [values.get(file) for file in files]


def picture_column(config: DataConfig, column: str, files: list[str]) -> list[Entry | None]:
    """Where the pictures of `column` of `files` stand, none opened; None where a picture has none.

    Raises ValueError for a name that leads out of the folder, and as `read_column`.
    """
    entries: list[Entry | None] = []
    root, values = read_column(config, column, files)
    for file, value in zip(files, values, strict=True):
        if value is None:
            entries.append(None)
        elif isinstance(value, Stored):
            entries.append(Entry(root / file, source=f"the {column} of {file}", stored=value))
        elif not isinstance(value, str) or unsafe(value):
            raise ValueError(f"{place_of(config)}: {column} {value!r:.60} is no file name inside the folder")
        else:
            entries.append(Entry(root / value))
    return entries


def read_masks(masks: Sequence[Entry | None], factor: int, shape: Shape) -> Float32[Tensor, "N 1 h w"]:
    """Weights in [0, 1] of the latents' places: the mask's mean over the `factor` x `factor` pixels of each.

    A mask is a picture, white where its picture counts, of its picture's proportions: it is cut and resized
    to `shape` (W, H) as that is. None counts everywhere. Raises ValueError for one that cannot be read.
    """
    width, height = shape
    weights = torch.ones(len(masks), 1, height // factor, width // factor)
    for index, entry in enumerate(masks):
        if entry is not None:
            pixels = torch.from_numpy(read_picture(entry, shape)).float() / 255  # (H, W, 3)
            weights[index, 0] = reduce(pixels, "(h f) (w g) c -> h w", "mean", f=factor, g=factor)
    return weights


def load_labels(config: DataConfig, files: list[str], classes: int) -> list[int]:
    """Classes of the pictures. Raises ValueError where one is not in 0..classes-1, and as `read_column`."""
    _, labels = read_column(config, "label", files)
    for file, label in zip(files, labels, strict=True):
        if type(label) is not int or not 0 <= label < classes:
            told = "no label" if label is None else f"label {label!r:.60}"
            raise ValueError(
                f"{place_of(config)}: {file} has {told}, a whole number in 0..{classes - 1} is needed"
            )
    return labels
