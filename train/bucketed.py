"""Pictures in aspect-ratio buckets (`buckets.py`): read, kept as tensors of several shapes, and in which
order a training step sees them.

A task holds `Images` of one shape or `BucketedImages`; the functions here do for either what it needs, so
that it does not ask which. Rows are numbers of pictures in the whole set, as captions are.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import pad

from ldm.distributed import is_first
from ldm.models.autoencoder import Autoencoder
from ldm.seeding import generator
from train.buckets import Shape, assign, bucket_shapes, describe, kept, nearest, upright_size
from train.cache import cached_moments
from train.columns import picture_column, read_masks
from train.data import DataConfig, ImageFolder, Images, batch_indices, load_images
from train.entries import Entry
from train.reading import Reader, to_pixels

PREVIEWED = 3  # shapes
T = TypeVar("T")


class Ragged:
    """N rows in tensors of several shapes: `ragged[rows]` is a tensor, where all rows are of one of them.

    parts: the tensors, one for each bucket. which: the bucket of each row; the rows of a bucket stand in its
    tensor in their order. members: the rows of each bucket.
    """

    def __init__(self, parts: Sequence[Tensor], which: Int64[Tensor, " N"]):
        self.parts, self.which = list(parts), which
        self.members = [(which == bucket).nonzero()[:, 0] for bucket in range(len(self.parts))]
        assert [len(part) for part in self.parts] == [len(rows) for rows in self.members]
        self.place = torch.zeros_like(which)
        for rows in self.members:
            self.place[rows] = torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, rows: slice) -> "Ragged": ...
    @overload
    def __getitem__(self, rows: Int64[Tensor, " B"]) -> Tensor: ...
    def __getitem__(self, rows: Int64[Tensor, " B"] | slice) -> "Tensor | Ragged":
        if isinstance(rows, slice):
            return self._sliced(rows)
        bucket = int(self.which[rows[0]])
        assert bool((self.which[rows] == bucket).all()), "rows of several buckets"
        return self.parts[bucket][self.place[rows]]

    def _sliced(self, rows: slice) -> "Ragged":
        """Only these rows; buckets that have none of them are left out."""
        used, which = self.which[rows].unique(return_inverse=True)
        places = [self.place[rows][which == number] for number in range(len(used))]
        parts = [self.parts[bucket][place] for bucket, place in zip(used.tolist(), places, strict=True)]
        return Ragged(parts, which)


@dataclass(frozen=True)
class BucketedImages:
    """As `data.Images`, with pixels of several shapes; summary: one line on the buckets."""

    pixels: Ragged
    captions: list[str]
    concepts: list[str]
    styles: list[str]
    files: list[str]
    skipped: list[str]
    summary: str

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def shapes(self) -> list[Shape]:
        """(W, H) of each bucket."""
        return [(part.shape[3], part.shape[2]) for part in self.pixels.parts]


AnyImages = Images | BucketedImages


def load(config: DataConfig, split: str, batch: int, like: AnyImages | None = None) -> AnyImages:
    """A split as the configuration wants it; `like`: pictures in whose buckets it shall be. Prints what the
    buckets hold."""
    if not config.buckets.on:
        return load_images(config, split)
    images = load_bucketed(config, split, batch, like.shapes if isinstance(like, BucketedImages) else None)
    if is_first():
        print(f"{split}: {images.summary}")
    return images


def load_bucketed(
    config: DataConfig, split: str | None, batch: int, shapes: Sequence[Shape] | None = None
) -> BucketedImages:
    """Read a folder, or one split of it, each picture in the shape of its bucket.

    batch: buckets of fewer pictures are given up, where data.buckets.fewest does not say another number.
    shapes: choose among these, and give none up; for held-out pictures, the buckets that are trained on.
    Raises and warns as `data.load_images`, and ValueError as `bucket_shapes`.
    """
    folder, all_shapes = ImageFolder(config, split), bucket_shapes(config.buckets, config.size)
    skipped, entries, sizes = [], [], []
    for entry in folder.entries:
        try:
            sizes.append(fitting_size(entry, all_shapes, config))
            entries.append(entry)
        except ValueError as error:
            if config.strict:
                raise
            skipped.append(str(error))
    fewest = (config.buckets.fewest or batch) if shapes is None else 1
    chosen = assign(sizes, shapes or all_shapes, config.size, fewest)
    found: dict[Shape, list[Tensor]] = {shape: [] for shape in sorted(set(chosen))}
    read = []
    with Reader(entries, chosen, config.workers) as reader:
        for index, picture in reader.in_order(range(len(entries))):
            if not isinstance(picture, str):
                found[chosen[index]].append(to_pixels([picture])[0])
                read.append(index)
            elif config.strict:
                raise ValueError(picture)
            else:
                skipped.append(picture)
    rows, kinds = [entries[index] for index in read], [chosen[index] for index in read]
    skipped = folder.tell(skipped, len(rows))
    found = {shape: pixels for shape, pixels in found.items() if pixels}
    number = {shape: bucket for bucket, shape in enumerate(found)}
    which = torch.tensor([number[shape] for shape in kinds], dtype=torch.int64)
    return BucketedImages(
        pixels=Ragged([torch.stack(pixels) for pixels in found.values()], which),
        captions=[row.caption for row in rows],
        concepts=[row.concept for row in rows],
        styles=[row.style for row in rows],
        files=[row.path.relative_to(folder.root).as_posix() for row in rows],
        skipped=skipped,
        summary=describe([sizes[index] for index in read], kinds, config.size) if rows else "no pictures",
    )


def fitting_size(entry: Entry, shapes: Sequence[Shape], config: DataConfig) -> Shape:
    """The size of a picture. Raises ValueError where it cannot be read, or fits no shape well enough."""
    try:
        size = upright_size(entry.path, entry.stored.read() if entry.stored else None)
        lost = 1 - kept(size, nearest(size, shapes, config.size))
        if lost > config.buckets.max_cut:
            raise ValueError(
                f"{entry.path}: no bucket fits {size[0]}x{size[1]} pixels, {lost:.0%} would be cut, more "
                f"than data.buckets.max_cut {config.buckets.max_cut:.0%}"
            )
        return size
    except ValueError as error:
        raise ValueError(f"{error} ({entry.source})" if entry.source else str(error)) from None


# --- which pictures a step sees -----------------------------------------------------------------------------


def batch_rows(data: Tensor | Ragged, batch: int, seed: int, step: int) -> Int64[Tensor, " batch"]:
    """The rows of `step` = 0, 1, ..., all of one bucket; of a tensor, as `batch_indices`.

    A pure function. Each bucket is a sequence of epochs of its own, as `batch_indices` has them: in each of
    them every picture comes once. What a bucket has left over at the end of an epoch of the set, less than a
    batch, waits and comes first in the next: after e epochs of the set a bucket of n pictures has had
    floor(e n / batch) batches, so that each of its pictures has been seen e or e - 1 times (where n >= batch,
    as it is unless `fewest` says otherwise), none is left out, and no bucket is favoured. The batches of an
    epoch come in an order drawn from (seed, epoch).
    """
    if isinstance(data, Tensor):
        return batch_indices(len(data), batch, seed, step)
    bucket, turn = bucket_turn(tuple(map(len, data.members)), batch, seed, step)
    return data.members[bucket][batch_indices(len(data.members[bucket]), batch, seed, turn)]


def bucket_turn(counts: tuple[int, ...], batch: int, seed: int, step: int) -> tuple[int, int]:
    """Which bucket `step` sees, and how many batches of it came before; `counts`: pictures of each bucket."""
    if min(counts) < 1 or batch < 1 or step < 0:
        raise ValueError(f"bucket_turn needs counts and batch >= 1, step >= 0, got {counts}, {batch}, {step}")
    epoch = step * batch // sum(counts)  # no earlier one has it: e epochs have at most e sum / batch batches
    while (ends := sum(batches_until(counts, batch, epoch + 1))) <= step:
        epoch += 1
    before, order = batches_until(counts, batch, epoch), _order(counts, batch, seed, epoch)
    position = step - (ends - len(order))
    bucket = int(order[position])
    return bucket, before[bucket] + int((order[:position] == bucket).sum())


def batches_until(counts: tuple[int, ...], batch: int, epoch: int) -> list[int]:
    """How many whole batches each bucket has had before `epoch`."""
    return [epoch * n // batch for n in counts]


@functools.lru_cache(maxsize=4)
def _order(counts: tuple[int, ...], batch: int, seed: int, epoch: int) -> Tensor:
    """The bucket of each batch of an epoch."""
    before, after = (batches_until(counts, batch, e) for e in (epoch, epoch + 1))
    turns = torch.tensor([end - start for start, end in zip(before, after, strict=True)])
    buckets = torch.arange(len(counts)).repeat_interleave(turns)
    return buckets[torch.randperm(len(buckets), generator=generator(seed, "buckets", epoch))]


def in_parts(data: Tensor | Ragged, size: int) -> list[Tensor]:
    """All rows, at most `size` at once, and at once only of one bucket."""
    if isinstance(data, Tensor):
        return list(torch.arange(len(data)).split(size))
    return [part for rows in data.members for part in rows.split(size)]


# --- what belongs to the pictures ---------------------------------------------------------------------------


def moments(
    folder: Path, name: str, pixels: Tensor | Ragged, autoencoder: Autoencoder
) -> tuple[Tensor, Tensor] | tuple[Ragged, Ragged]:
    """`cache.cached_moments`; a file for each bucket, whose shape is in its name and key."""
    if isinstance(pixels, Tensor):
        return cached_moments(folder, name, pixels, autoencoder)
    means, stds = [], []
    for part in pixels.parts:
        bucket = f"{name}-{part.shape[3]}x{part.shape[2]}"
        mean, std = cached_moments(folder, bucket, part, autoencoder)
        means.append(mean)
        stds.append(std)
    return Ragged(means, pixels.which), Ragged(stds, pixels.which)


def masks(config: DataConfig, files: list[str], pixels: Tensor | Ragged, factor: int) -> Tensor | Ragged:
    """`columns.read_masks` of column "mask" of `files`, each cut as its picture in `pixels` is."""
    entries = picture_column(config, "mask", files)
    return beside(entries, pixels, lambda some, shape: read_masks(some, factor, shape))


def beside(
    entries: list[T], pixels: Tensor | Ragged, read: Callable[[list[T], Shape], Tensor]
) -> Tensor | Ragged:
    """What is read for each picture, in the shape (W, H) that it has in `pixels`."""
    if isinstance(pixels, Tensor):
        return read(entries, (pixels.shape[3], pixels.shape[2]))
    parts = [
        read([entries[row] for row in rows.tolist()], (part.shape[3], part.shape[2]))
        for rows, part in zip(pixels.members, pixels.parts, strict=True)
    ]
    return Ragged(parts, pixels.which)


def preview_sizes(images: Images | BucketedImages) -> list[Shape | None]:
    """The shapes to show, those of the most pictures; None: the one that the model has."""
    if isinstance(images, Images):
        return [None]
    counts = Counter(dict(zip(images.shapes, map(len, images.pixels.members), strict=True)))
    return [shape for shape, _ in counts.most_common(PREVIEWED)]


def largest(pixels: Tensor | Ragged) -> Shape:
    """(W, H) of the pictures of most pixels."""
    parts = [pixels] if isinstance(pixels, Tensor) else pixels.parts
    return max(((part.shape[3], part.shape[2]) for part in parts), key=math.prod)


def on_one_sheet(pictures: Sequence[Tensor]) -> Tensor:
    """Batches of pictures (B, 3, H, W) of several shapes as one, white around the smaller ones."""
    height, width = (max(batch.shape[side] for batch in pictures) for side in (2, 3))
    padded = [
        pad(batch, (0, width - batch.shape[3], 0, height - batch.shape[2]), value=1.0) for batch in pictures
    ]
    return torch.cat(padded)
