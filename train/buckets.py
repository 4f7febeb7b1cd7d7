"""Aspect-ratio buckets: which shape a picture that is not square is cut to, and how.

After NovelAI ("Aspect Ratio Bucketing", 2022, github.com/NovelAI/novelai-aspect-ratio-bucketing): a picture
goes to that of a set of shapes, all of about `data.size`^2 pixels, whose ratio is nearest to its own; every
batch is of one shape. Here no shape has more pixels than the square; the nearest ratio is that which cuts
least (it is measured in logarithms, so that portraits are treated as landscapes are); and a bucket of too few
pictures gives them to its neighbours, rather than the remainders of all to the square. `bucketed.py` reads
the pictures and says which of them a step sees.
"""

import io
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sample.images import decoded, to_rgb

Shape = tuple[int, int]  # (W, H) in pixels
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that exchange width and height


@dataclass(frozen=True)
class BucketConfig:
    """Which shapes there are. Off, every picture is cut to its centre square.

    step: every side is a multiple of it, in pixels; itself one of the autoencoder's factor times the UNet's.
    smallest, largest: of the sides; 0 is half and twice data.size. max_ratio: longer side to shorter side.
    max_cut: a picture that would lose a larger share of its pixels counts as one that cannot be read.
    fewest: a bucket of fewer pictures is given up; 0 is fewer than a batch. With 1 none is, and a batch of a
    small bucket has a picture more than once.
    """

    on: bool = False
    step: int = 64
    smallest: int = 0
    largest: int = 0
    max_ratio: float = 4.0
    max_cut: float = 1.0
    fewest: int = 0

    def __post_init__(self) -> None:
        for name, least in (("step", 1), ("smallest", 0), ("largest", 0), ("max_ratio", 1), ("fewest", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"data.buckets.{name} is {getattr(self, name)}, it must be at least {least}")
        if not 0 <= self.max_cut <= 1:
            raise ValueError(f"data.buckets.max_cut is {self.max_cut}, it must be in [0, 1]")

    def require_step(self, autoencoder: int, unet: int = 1) -> None:
        """Raises ValueError where these factors of the networks do not divide the sides."""
        if self.on and self.step % (autoencoder * unet):
            times = f" times the UNet's, {autoencoder} x {unet} = {autoencoder * unet}" if unet > 1 else ""
            raise ValueError(
                f"data.buckets.step {self.step} must be a multiple of the autoencoder's factor"
                f"{times or f' {autoencoder}'}"
            )


def bucket_shapes(config: BucketConfig, size: int) -> list[Shape]:
    """The square of side `size`, and for each width and each height the shape with the largest other side
    that has no more pixels than the square; the nearer to the square, the earlier.

    Raises ValueError where `size` is no multiple of the step, and where no other shape or not even the square
    lies within the limits of the sides and the ratio.
    """
    step, smallest, largest = config.step, config.smallest or size // 2, config.largest or 2 * size
    if size % step:
        raise ValueError(f"data.size {size} must be a multiple of data.buckets.step {step}")
    limits = f"sides of {smallest} to {largest} pixels and a ratio of at most {config.max_ratio:g}"
    if not smallest <= size <= largest:
        raise ValueError(f"data.buckets: no shape fits {limits}, not even the square of data.size {size}")
    found = set()
    for side in range(-(-smallest // step) * step, largest + 1, step):
        other = min(size * size // side // step * step, largest // step * step)
        if other >= smallest and max(side, other) <= config.max_ratio * min(side, other):
            found |= {(side, other), (other, side)}
    if len(found) < 2:
        raise ValueError(
            f"data.buckets: no shape but the square of data.size {size} fits {limits} in steps of {step}"
        )
    return sorted(found, key=lambda shape: (max(shape) / min(shape), -shape[0]))


def kept(size: Shape, shape: Shape) -> float:
    """The share of a picture of this size (w, h) that is left when it is cut to the ratio of `shape`."""
    across, down = size[0] * shape[1], shape[0] * size[1]
    return min(across, down) / max(across, down)


def scale(size: Shape, shape: Shape) -> float:
    """The factor at which a picture of this size just covers `shape`; above 1 it is enlarged."""
    return max(shape[0] / size[0], shape[1] / size[1])


def nearest(size: Shape, shapes: Sequence[Shape], side: int) -> Shape:
    """The shape that cuts least of a picture of this size; of equal ones the earliest.

    Shapes for which it would have to be enlarged more than for the square of `side` are passed over while
    there are others. Among all of `bucket_shapes` the nearest is never one of these: that a landscape of
    ratio r is nearer to R >= r than to 1 means R <= r^2, and so the width sqrt(R) side is at most r side.
    """
    limit = max(1.0, scale(size, (side, side))) * (1 + 1e-9)
    gentle = [shape for shape in shapes if scale(size, shape) <= limit]
    return max(gentle or shapes, key=lambda shape: kept(size, shape))


def assign(sizes: Sequence[Shape], shapes: Sequence[Shape], side: int, fewest: int = 1) -> list[Shape]:
    """The shape of each of these pictures (w, h).

    While a bucket has fewer pictures than `fewest`, and is not the last one, the one with the fewest is given
    up and its pictures go to the nearest of those that have any.
    """
    if not sizes:
        return []
    distinct, live = Counter(sizes), list(shapes)
    home = {size: nearest(size, live, side) for size in distinct}
    while True:
        counts: Counter[Shape] = Counter()
        for size, count in distinct.items():
            counts[home[size]] += count
        live = [shape for shape in live if counts[shape]]
        least = min(reversed(live), key=lambda shape: counts[shape])
        if counts[least] >= fewest or len(live) == 1:
            return [home[size] for size in sizes]
        live.remove(least)
        home |= {size: nearest(size, live, side) for size, shape in home.items() if shape == least}


def describe(sizes: Sequence[Shape], chosen: Sequence[Shape], side: int) -> str:
    """One line: how many pictures each bucket has, what is cut, and how many are enlarged."""
    counts, square, pairs = Counter(chosen), (side, side), list(zip(sizes, chosen, strict=True))
    table = ", ".join(f"{w}x{h}: {counts[w, h]}" for w, h in sorted(counts, key=lambda s: s[0] / s[1]))
    lost = [1 - kept(size, shape) for size, shape in pairs]
    by_squares = sum(1 - kept(size, square) for size in sizes)
    enlarged = sum(scale(size, shape) > 1 for size, shape in pairs)
    beyond = sum(scale(size, shape) > max(1.0, scale(size, square)) * (1 + 1e-9) for size, shape in pairs)
    return (
        f"{len(sizes)} pictures in {len(counts)} buckets ({table}); of a picture {sum(lost) / len(lost):.1%} "
        f"is cut on average, {max(lost):.1%} at most (by squares {by_squares / len(lost):.1%}); {enlarged} "
        f"are enlarged, {beyond} of them more than for a square"
    )


# --- one picture --------------------------------------------------------------------------------------------


def upright_size(path: Path, content: bytes | None = None) -> Shape:
    """(w, h) of a picture after turning it upright, by its header (a PNG file is decoded: its orientation may
    stand at its end). Arguments and errors as of `read_cut`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                turned = image.getexif().get(ORIENTATION) in TURNED
                return (image.height, image.width) if turned else image.size
    except Exception:  # what is wrong with it is said by the one place that knows; else it reads more slowly
        return decoded(path, lambda image: image.size, content=content)


def cut_box(size: Shape, shape: Shape) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest centred part of a picture (w, h) with the ratio of `shape`, in
    whole pixels; for a square that of `sample.images.square_rgb`."""
    (w, h), (across, down) = size, shape
    width = min(w, max(1, math.floor(h * across / down + 0.5)))
    height = min(h, max(1, math.floor(w * down / across + 0.5)))
    left, top = (w - width) // 2, (h - height) // 2
    return left, top, left + width, top + height


def cut_rgb(image: Image.Image, shape: Shape) -> Image.Image:
    """A Pillow image cut and resized (Lanczos) to `shape`, as RGB."""
    part = to_rgb(image.crop(cut_box(image.size, shape)))  # first: a strip must not be resized as a whole
    return part if part.size == shape else part.resize(shape, Image.Resampling.LANCZOS)


def read_cut(path: Path, shape: Shape, content: bytes | None = None) -> Image.Image:
    """A picture file, or these bytes of it, cut and resized to `shape`, as RGB. Raises ValueError as
    `sample.images.read_rgb`."""
    return decoded(path, lambda image: cut_rgb(image, shape), content=content)
