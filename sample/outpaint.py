"""`ldm-sample outpaint IMAGE PROMPT... --left PIXELS ...`: a picture painted beyond its edges.

Puts the picture on a larger canvas (`canvas.py`) and inpaints the border and a little of the picture's edge.
"""

import argparse
from functools import partial
from pathlib import Path

from PIL import Image

from sample import inpaint, txt2img
from sample.canvas import extend
from sample.images import read_rgb
from sample.pipeline import Pipeline
from sample.settings import Sampling
from sample.txt2img import Given, Repeated


def run(
    args: argparse.Namespace, repeated: Repeated | None = None, pipe: Pipeline | None = None
) -> list[Path]:
    """Make the pictures; arguments as in `txt2img.run`. Raises ValueError and OSError in one line."""
    inpaint.check(args)
    picture = read_rgb(Path(args.init))
    extended(args, picture, 1)  # what is wrong with the sides is told before the model is read
    return txt2img.run(args, repeated, partial(given, args, picture), pipe)


def given(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline, sampling: Sampling) -> Given:
    """The canvas, of a legal size, and the mask of what is beyond the picture."""
    canvas, mask = extended(args, picture, pipe.autoencoder.factor * pipe.unet.config.factor)
    if args.size not in (None, canvas.size):
        raise ValueError(
            f"--size is not for choice here: the canvas is {canvas.width}x{canvas.height}, by the sides given"
        )
    unsized = argparse.Namespace(**{**vars(args), "size": None})
    return inpaint.given(unsized, canvas, mask, pipe, sampling)


def extended(args: argparse.Namespace, picture: Image.Image, unit: int) -> tuple[Image.Image, Image.Image]:
    sides = {side: getattr(args, side) for side in ("left", "top", "right", "bottom")}
    found = extend(picture, **sides, unit=unit, fill=args.fill, overlap=args.overlap, seed=args.seed)
    return found.canvas, found.mask
