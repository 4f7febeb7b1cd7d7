"""`ldm-sample annotate KIND IMAGE...`: the hints of pictures, as files and beside the pictures.

KIND is that of an annotator, with options where wanted (`canny:low=50,high=150`), see `sample/annotators`.
All hints are made before the first is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sample.annotators import KINDS, parse_annotator
from sample.images import cover, decoded, grid, output_folder, save_new, to_rgb

LARGEST = 16384  # pixels of a side that --size may ask for


def run(args: argparse.Namespace) -> None:
    """Write a hint for each picture, and a sheet of pictures and hints side by side; print where they are."""
    annotator, kind = parse_annotator(args.kind), args.kind.partition(":")[0]
    out = output_folder(args.out)
    if args.size is not None and not all(1 <= side <= LARGEST for side in args.size):
        raise ValueError(
            f"--size must be between 1x1 and {LARGEST}x{LARGEST}, got {args.size[0]}x{args.size[1]}"
        )
    pictures = [read(Path(name), args.size, KINDS[kind].alpha) for name in args.images]
    hints = []
    for name, picture in zip(args.images, pictures, strict=True):
        try:
            hints.append(annotator(picture))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if len(args.images) > 1 else str(error)) from None
    for name, hint in zip(args.images, hints, strict=True):
        parameters = {"command": "annotate", "kind": args.kind, "picture": name}
        print(f"{name} -> {save_new(hint, out, f'{kind}-', 4, parameters)}")
    pairs = [half for pair in zip(map(to_rgb, pictures), hints, strict=True) for half in pair]
    print(f"sheet -> {save_new(sheet(pairs), out, 'annotate-', 4)}")


def read(path: Path, size: tuple[int, int] | None, alpha: bool) -> Image.Image:
    """The picture in a file, upright, scaled and cut to `size` (W, H); with alpha where it has some and
    `alpha` asks for it, else on white. Raises ValueError."""

    def convert(image: Image.Image) -> Image.Image:
        seen = image.convert("RGBA") if alpha and image.has_transparency_data else to_rgb(image)
        return seen if size is None else cover(seen, size)

    return decoded(path, convert)


def sheet(pairs: Sequence[Image.Image]) -> Image.Image:
    """Pictures and hints in turn, two to four columns; smaller ones in the middle of a cell."""
    width, height = max(half.width for half in pairs), max(half.height for half in pairs)
    cells = []
    for half in pairs:
        cell = Image.new("RGB", (width, height), "white")
        cell.paste(half, ((width - half.width) // 2, (height - half.height) // 2))
        cells.append(cell)
    return grid(cells, columns=2 if len(pairs) <= 8 else 4)
