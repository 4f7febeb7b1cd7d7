"""`ldm-sample img2img IMAGE PROMPT...`: pictures made anew from a picture (SDEdit, Meng et al. 2022).

Reads the picture and leaves the rest to `txt2img.run`: encode it (with the posterior's noise, of its own for
each picture made), noise it to the level where the last `--strength` of the steps begin, take these.
"""

import argparse
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.diffusion.editing import cut
from sample import txt2img
from sample.images import cover, read_rgb, to_tensor
from sample.pipeline import Pipeline
from sample.txt2img import Given, Repeated


def run(args: argparse.Namespace, repeated: Repeated | None = None) -> None:
    """Make the pictures; `repeated` as in `txt2img.run`. Raises ValueError and OSError in one line."""
    cut(1, args.strength)  # before the model is read
    txt2img.run(args, repeated, partial(given, args, read_rgb(Path(args.init))))


def given(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline) -> Given:
    """The picture in the size of `--size`, or in the legal one nearest to its own."""
    fitted = cover(picture, fitting_size(args, picture, pipe))
    options = {"strength": args.strength, "exact_steps": args.exact_steps}
    return Given(to_tensor(fitted)[None], options, {**options, **source(args.init, "init")})


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


def source(path: str, name: str) -> dict[str, Any]:
    """A file that a picture was made of, for its text chunk: the path as given and a hash of its bytes."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return {name: path, f"{name}_hash": digest}
