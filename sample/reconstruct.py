"""`ldm-sample reconstruct IMAGE...`: what the first stage alone keeps of a picture.

Encode (the posterior's mode), decode, compare: one PNG a picture with the original on the left and the
reconstruction on the right, and PSNR, SSIM and, given the network, LPIPS; at the end their means, and mean
and deviation of each channel of the latents as a diffusion model meets them (scaled). Only the autoencoder is
loaded, so the folder of an autoencoder's training run will do.
"""

import argparse
import sys
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldm.device import pick_device, pick_dtype
from ldm.losses.perceptual import HED, LPIPS, SMALLEST_IMAGE, load_perceptual
from ldm.metrics import WINDOW, psnr, ssim
from ldm.models.autoencoder import Autoencoder
from ldm.weights.reading import open_checkpoint
from sample.images import grid, output_folder, read_rgb, save_new, to_pil, to_tensor
from sample.model import find_model

LPIPS_FILE = "lpips_vgg16.safetensors"  # in a folder given instead of the file
MEASURES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "vgg_distance": "VGG distance"}


def run(args: argparse.Namespace) -> None:
    """Reconstruct each picture, write the pairs, print how near each is, the means, and the latents'
    statistics."""
    out = output_folder(args.out)
    lpips = open_lpips(args.lpips) if args.lpips else None
    originals = [read_rgb(Path(name)) for name in args.images]
    checkpoint = open_checkpoint(find_model(args.model), kind=args.kind)
    autoencoder = checkpoint.require("autoencoder").load(pick_dtype(args.dtype), args.allow_nan)
    autoencoder.to(pick_device(args.device))
    originals = [
        crop(picture, autoencoder.factor, name) for picture, name in zip(originals, args.images, strict=True)
    ]
    rows, latents = [], []
    for name, original in zip(args.images, originals, strict=True):
        decoded, z = reconstruct(autoencoder, original)
        reconstruction = to_pil(decoded)[0]
        row = compare(to_tensor(original)[None], decoded, lpips)
        parameters = {"command": "reconstruct", "image": name, "model": args.model, **row}
        if lpips is not None:
            parameters["trunk"] = lpips.trunk
        path = save_new(grid([original, reconstruction], columns=2), out, "reconstruct-", 4, parameters)
        rows.append(row)
        latents.append(rearrange(z, "1 c h w -> c (h w)"))
        print(f"{row['psnr']:6.2f} dB  {'  '.join([*told(row), name])} -> {path}")
    means = {key: mean(rows, key) for key in MEASURES if any(key in row for row in rows)}
    last = [f"mean PSNR of {len(rows)}", *told(means), f"latents {statistics(torch.cat(latents, dim=1))}"]
    if lpips is not None:
        last.append(f"({lpips.label} on {lpips.trunk})")
    print(f"{means['psnr']:6.2f} dB  {'  '.join(last)}")


def open_lpips(name: str) -> LPIPS:
    """The network in the file `name`, or in a file of the usual name in this folder; or "hed", see
    `load_perceptual`. Raises as it does."""
    if name.partition(":")[0] == HED:
        return load_perceptual(name)
    path = Path(name).expanduser()
    return load_perceptual(path / LPIPS_FILE if path.is_dir() else path)


@torch.no_grad()
def compare(
    image: Float[Tensor, "1 3 H W"], decoded: Float[Tensor, "1 3 H W"], lpips: LPIPS | None = None
) -> dict[str, float]:
    """`psnr`, `ssim` and `lpips` (`vgg_distance` by the network that stands in for it) of a picture and its
    reconstruction; the last two where it is not too small for them."""
    decoded, smallest = decoded.clamp(-1, 1), min(image.shape[-2:])
    values = {"psnr": float(psnr(image, decoded))}
    if smallest >= WINDOW:
        values["ssim"] = float(ssim(image, decoded))
    if lpips is not None and smallest >= SMALLEST_IMAGE:
        values[lpips.label.lower().replace(" ", "_")] = float(lpips(image, decoded))
    return values


def told(row: dict[str, float]) -> list[str]:
    """What a line says beside the PSNR."""
    return [f"{name} {row[key]:.4f}" for key, name in MEASURES.items() if key in row and key != "psnr"]


def mean(rows: list[dict[str, float]], key: str) -> float:
    """Over the rows that have it."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values)


def statistics(latents: Float[Tensor, "C N"]) -> str:
    """`mean+-deviation` of each channel."""
    return " ".join(
        f"{float(channel.mean()):.3g}+-{float(channel.std(correction=0)):.3g}" for channel in latents
    )


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
def reconstruct(
    autoencoder: Autoencoder, picture: Image.Image
) -> tuple[Float[Tensor, "1 3 H W"], Float[Tensor, "1 C h w"]]:
    """The picture after encoding and decoding, in [-1, 1] (not clamped), and its scaled latents."""
    image = to_tensor(picture)[None]  # (1, 3, H, W)
    z = autoencoder.encode(image.to(autoencoder.post_quant_conv.weight)).mode()
    return autoencoder.decode(z).float().cpu(), autoencoder.scale_latents(z).float().cpu()
