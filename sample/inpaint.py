"""`ldm-sample inpaint IMAGE MASK PROMPT...`: a part of a picture painted anew.

White in the mask is what is painted, for every kind of model. A model trained for inpainting reads mask and
masked picture; any other keeps the latents outside the mask at each step (`ldm/diffusion/editing.py`). Reads
both files and leaves the rest to `txt2img.run`.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.diffusion.editing import cut
from sample import txt2img
from sample.images import cover, read_mask, read_rgb, to_tensor
from sample.img2img import fitting_size, source
from sample.pipeline import Pipeline
from sample.txt2img import Given, Repeated


def run(args: argparse.Namespace, repeated: Repeated | None = None) -> None:
    """Make the pictures; `repeated` as in `txt2img.run`. Raises ValueError and OSError in one line."""
    cut(1, args.strength)  # before the model is read
    if args.resample < 1:
        raise ValueError(f"--resample must be at least 1 (each step once), got {args.resample}")
    picture = read_rgb(Path(args.init))
    mask = read_mask(Path(args.mask), picture.size)
    txt2img.run(args, repeated, partial(given, args, picture, mask))


def given(args: argparse.Namespace, picture: Image.Image, mask: Image.Image, pipe: Pipeline) -> Given:
    """Picture and mask, both scaled and cut alike to the size of `--size` or the nearest legal one."""
    size = fitting_size(args, picture, pipe)
    white = torch.from_numpy(np.array(cover(mask, size, Image.Resampling.NEAREST)) > 0)[None]  # (1, H, W)
    options = {"strength": args.strength, "exact_steps": args.exact_steps, "resample": args.resample}
    told = {**options, "paste": args.paste, **source(args.init, "init"), **source(args.mask, "mask")}
    painted = white if args.paste else None
    return Given(to_tensor(cover(picture, size))[None], {**options, "mask": white}, told, painted)
