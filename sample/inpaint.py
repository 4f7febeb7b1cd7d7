"""`ldm-sample inpaint IMAGE MASK PROMPT...`: a part of a picture painted anew.

White in the mask is what is painted, for every kind of model. A model trained for inpainting reads mask and
masked picture; any other keeps the latents outside the mask at each step (`ldm/diffusion/editing.py`). Reads
both files and leaves the rest to `txt2img.run`. `outpaint.py` comes here too.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.editing import cut
from sample import txt2img
from sample.canvas import feathered
from sample.images import cover, read_mask, read_rgb, to_tensor
from sample.img2img import fitting_size
from sample.pipeline import Pipeline
from sample.settings import Sampling
from sample.start import Start
from sample.txt2img import Given, Repeated


def run(
    args: argparse.Namespace, repeated: Repeated | None = None, pipe: Pipeline | None = None
) -> list[Path]:
    """Make the pictures; arguments as in `txt2img.run`. Raises ValueError and OSError in one line."""
    check(args)
    picture = read_rgb(Path(args.init))
    mask = read_mask(Path(args.mask), picture.size)
    return txt2img.run(args, repeated, partial(given, args, picture, mask), pipe)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options outside their range, before anything is read."""
    cut(1, args.strength)
    if args.resample < 1:
        raise ValueError(f"--resample must be at least 1 (each step once), got {args.resample}")
    if args.feather < 0:
        raise ValueError(f"--feather must be at least 0 pixels, got {args.feather}")


def given(
    args: argparse.Namespace, picture: Image.Image, mask: Image.Image, pipe: Pipeline, sampling: Sampling
) -> Given:
    """Picture and mask, both scaled and cut alike to the size of `--size` or the nearest legal one."""
    size = fitting_size(args, picture, pipe)
    white = torch.from_numpy(np.array(cover(mask, size, Image.Resampling.NEAREST)) > 0)[None]  # (1, H, W)
    image = to_tensor(cover(picture, size))[None]
    share = feathered(white, args.feather)

    def start(numbers: Sequence[int]) -> Start:
        return pipe.start(
            image,
            numbers,
            mask=white,
            strength=args.strength,
            exact_steps=args.exact_steps,
            resample=args.resample,
            seed=sampling.seed,
            variation=sampling.variation,
        )

    def pasted(images: Tensor) -> Tensor:
        return torch.where(share == 1, images, torch.lerp(image, images, share)) if args.paste else images

    return Given(size, start, args.strength, args.exact_steps, pasted)
