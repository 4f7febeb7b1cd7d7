"""`ldm-sample upscale IMAGE`: a small picture made large by a model for super-resolution.

The UNet of Rombach et al. 2022, section 4.4, reads the small picture at the size of its latents, so that the
result is as many times larger as its autoencoder divides by (4). Stable Diffusion's x4 upscaler reads a
prompt too, and the small picture through noise (`--noise-level`): the more, the more it invents. To enlarge
with any model, `img2img` on an enlarged picture or `txt2img --hires` does it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from sample import txt2img
from sample.images import read_rgb, to_tensor
from sample.pipeline import Pipeline
from sample.settings import Sampling
from sample.start import require_upscaler, upscaling
from sample.txt2img import Given, Repeated


def run(
    args: argparse.Namespace, repeated: Repeated | None = None, pipe: Pipeline | None = None
) -> list[Path]:
    """Make the pictures; arguments as in `txt2img.run`. Raises ValueError and OSError in one line."""
    args.prompts = args.prompts or [""]
    return txt2img.run(args, repeated, partial(given, args, read_rgb(Path(args.init))), pipe)


def given(args: argparse.Namespace, picture: Image.Image, pipe: Pipeline, sampling: Sampling) -> Given:
    """The picture, its sides cut to multiples of what the UNet divides by."""
    require_upscaler(pipe, args.noise_level)
    unit, factor = pipe.unet.config.factor, pipe.autoencoder.factor
    width, height = (side // unit * unit for side in picture.size)
    if not (width and height):
        raise ValueError(
            f"{args.init} is {picture.width}x{picture.height}; sides of {unit} or more are needed"
        )
    if picture.size != (width, height):
        told = f"cut from {picture.width}x{picture.height} to {width}x{height}"
        print(f"ldm-sample: warning: {args.init}: {told}", file=sys.stderr)
    low = to_tensor(picture.crop((0, 0, width, height)))[None]
    size = (width * factor, height * factor)
    if args.size not in (None, size):
        raise ValueError(f"--size is not for choice here: this picture becomes {size[0]}x{size[1]}")
    return Given(size, lambda numbers: upscaling(pipe, low, args.noise_level, args.seed, numbers))
