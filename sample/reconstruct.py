"""`ldm-sample reconstruct IMAGE...`: what the first stage alone keeps of a picture.

Encode (the posterior's mode), decode, compare: one PNG a picture with the original on the left and the
reconstruction on the right, and the PSNR. Only the autoencoder is loaded, so the folder of an autoencoder's
training run will do.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from ldm.device import pick_device, pick_dtype
from ldm.metrics import psnr
from ldm.models.autoencoder import Autoencoder
from ldm.weights.reading import open_checkpoint
from sample.images import grid, output_folder, read_rgb, save_new, to_pil, to_tensor
from sample.model import find_model


def run(args: argparse.Namespace) -> None:
    """Reconstruct each picture, write the pairs, print the PSNR of each and their mean."""
    out = output_folder(args.out)
    originals = [read_rgb(Path(name)) for name in args.images]
    checkpoint = open_checkpoint(find_model(args.model), kind=args.kind)
    autoencoder = checkpoint.require("autoencoder").load(pick_dtype(args.dtype), args.allow_nan)
    autoencoder.to(pick_device(args.device))
    originals = [
        crop(picture, autoencoder.factor, name) for picture, name in zip(originals, args.images, strict=True)
    ]
    values = []
    for name, original in zip(args.images, originals, strict=True):
        reconstruction, value = reconstruct(autoencoder, original)
        parameters = {"command": "reconstruct", "image": name, "model": args.model, "psnr": value}
        path = save_new(grid([original, reconstruction], columns=2), out, "reconstruct-", 4, parameters)
        values.append(value)
        print(f"{value:6.2f} dB  {name} -> {path}")
    print(f"{sum(values) / len(values):6.2f} dB  mean PSNR of {len(values)}")


def crop(picture: Image.Image, factor: int, name: str) -> Image.Image:
    """The centre of a picture, with sides that are multiples of `factor`; says on stderr where that cuts
    something.

    Raises ValueError for a picture smaller than `factor`.
    """
    width, height = (side // factor * factor for side in picture.size)
    if not width or not height:
        raise ValueError(
            f"{name}: {picture.width}x{picture.height} is below the model's smallest size {factor}x{factor}"
        )
    if (width, height) == picture.size:
        return picture
    print(
        f"ldm-sample: warning: {name}: cut from {picture.width}x{picture.height} to {width}x{height}, "
        f"multiples of {factor}",
        file=sys.stderr,
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, picture: Image.Image) -> tuple[Image.Image, float]:
    """The picture after encoding and decoding, and its PSNR in dB."""
    image = to_tensor(picture)[None]  # (1, 3, H, W)
    weight = autoencoder.post_quant_conv.weight
    decoded = autoencoder.decode(autoencoder.encode(image.to(weight)).mode()).float().cpu()
    return to_pil(decoded)[0], float(psnr(image, decoded))
