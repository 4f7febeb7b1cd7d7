"""`ldm-sample instruct IMAGE PROMPT...`: a picture edited as a prompt says.

For models that were trained for it (InstructPix2Pix, Brooks et al. 2022, arXiv:2211.09800): the UNet reads
the picture's latents besides the noised ones. `--guidance` is how strongly the instruction acts,
`--image-guidance` the picture.
"""

import argparse
import math
from functools import partial
from pathlib import Path

from PIL import Image

from sample import txt2img
from sample.images import cover, read_rgb, to_tensor
from sample.img2img import fitting_size
from sample.pipeline import Pipeline
from sample.settings import Sampling
from sample.start import Start, picture_channels, require_reads
from sample.txt2img import Given, Repeated


def run(
    args: argparse.Namespace, repeated: Repeated | None = None, pipe: Pipeline | None = None
) -> list[Path]:
    """Make the pictures; arguments as in `txt2img.run`. Raises ValueError and OSError in one line."""
    if not math.isfinite(args.image_guidance):
        raise ValueError(f"--image-guidance must be a finite number, got {args.image_guidance}")
    return txt2img.run(args, repeated, partial(given, args, read_rgb(Path(args.init))), pipe)


def given(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline, sampling: Sampling) -> Given:
    require_reads(pipe, "instruct")
    size = fitting_size(args, picture, pipe)
    image = to_tensor(cover(picture, size))[None]
    return Given(size, lambda numbers: Start(channels=picture_channels(pipe, image, numbers)))
