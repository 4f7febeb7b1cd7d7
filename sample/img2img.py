"""`ldm-sample img2img IMAGE PROMPT...`: pictures made anew from a picture (SDEdit, Meng et al. 2022).

Reads the picture and leaves the rest to `txt2img.run`: encode it (with the posterior's noise, of its own for
each picture made), noise it to the level where the last `--strength` of the steps begin, take these.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ldm.diffusion.editing import cut
from sample import txt2img
from sample.depth import read_depth
from sample.images import cover, read_rgb, to_tensor
from sample.pipeline import Pipeline
from sample.settings import Sampling
from sample.start import Start, depth_start
from sample.txt2img import Given, Repeated


def run(
    args: argparse.Namespace, repeated: Repeated | None = None, pipe: Pipeline | None = None
) -> list[Path]:
    """Make the pictures; arguments as in `txt2img.run`. Raises ValueError and OSError in one line."""
    cut(1, args.strength)  # before the model is read
    return txt2img.run(args, repeated, partial(given, args, read_rgb(Path(args.init))), pipe)


def given(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline, sampling: Sampling) -> Given:
    """The picture in the size of `--size`, or in the legal one nearest to its own; its depth, if given."""
    size = fitting_size(args, picture, pipe)
    image = to_tensor(cover(picture, size))[None]
    depth = None if args.depth is None else read_depth(Path(args.depth), size)

    def start(numbers: Sequence[int]) -> Start:
        begun = pipe.start(
            image,
            numbers,
            strength=args.strength,
            exact_steps=args.exact_steps,
            seed=sampling.seed,
            variation=sampling.variation,
        )
        return begun if depth is None else depth_start(pipe, depth, size, begun, numbers)

    return Given(size, start, args.strength, args.exact_steps)


def fitting_size(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline) -> tuple[int, int]:
    """The (W, H) to work at; says on stderr where the picture has another.

    Raises ValueError for a `--size` that is not legal.
    """
    size = args.size or pipe.legal_size(picture.size)
    pipe.latent_shape(size)
    if picture.size != size:
        print(
            f"ldm-sample: warning: {args.init}: scaled and cut from {picture.width}x{picture.height} to "
            f"{size[0]}x{size[1]}",
            file=sys.stderr,
        )
    return size
