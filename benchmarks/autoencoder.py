"""What first stages keep of held-out pictures: ours, and by option the trained TAEF2 network in the same run.

    python -m benchmarks.autoencoder --data data/emoji
    python -m benchmarks.autoencoder --data data/emoji --taef2 FOLDER

PSNR of encoding to the posterior's mode and decoding, in dB, the mean over the pictures of a split; how many
numbers a picture's latents are; and the seconds of both ways for all pictures, in turns.

TAEF2 (madebyollin/taesd, MIT) is a distilled autoencoder of 32 channels at 1/8 of the side. FOLDER holds its
`taef2_encoder.pth`, `taef2_decoder.pth` and `taef2_golden.npz`, known inputs and outputs (image in [0, 1],
latent, decoded): they are checked before anything is measured.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Row, Timing, alternate, execute, machine, make_parser, report
from ldm.config import find_config, load_config
from ldm.metrics import psnr
from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.reading import open_checkpoint
from ldm.weights.tiny import load_tiny_autoencoder
from sample.model import find_model
from train.data import DataConfig, load_images, to_float
from train.tasks.autoencoder import AutoencoderTaskConfig

BAR = 30.0  # dB, of ours on held-out pictures
GOLDEN_TOLERANCE = 1e-4  # largest absolute difference; 3e-6 is what another order of summation makes


class FirstStage(NamedTuple):
    """Images (B, 3, H, W) in [-1, 1] to latents and back."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    parameters: int


def measure(args: argparse.Namespace) -> None:
    """Both first stages on the same pictures, one row each."""
    if args.quick:
        stage, pixels, styles = *tiny(), [""] * 8
    else:
        if args.data is None:
            raise ValueError("--data is needed: the folder of images that `ldm-train prepare` made")
        data = load_images(DataConfig(args.data, args.size), args.split)
        if not len(data):
            raise ValueError(f"{args.data}: no picture has the split {args.split!r}")
        pixels, styles = data.pixels, data.styles
        stage = open_checkpoint(find_model(args.model)).require("autoencoder").load()
    stages = [ours(stage, "ours" if args.quick else f"ours, {args.model}")]
    if args.taef2 is not None:
        stages.append(taef2(args.taef2))
    described = machine(args.quick)  # before the load is our own
    images = to_float(pixels).split(args.batch)
    with torch.no_grad():
        latents = alternate(
            {stage.name: partial(apply, stage.encode, images) for stage in stages}, args.rounds, args.warmup
        )
        decoded = alternate(
            {stage.name: partial(apply, stage.decode, latents[stage.name].result) for stage in stages},
            args.rounds,
            args.warmup,
        )
    rows = [
        row(stage, torch.cat(images), styles, latents[stage.name], decoded[stage.name]) for stage in stages
    ]
    rows[0]["bar_db"] = BAR
    count = len(pixels)
    columns = {
        f"first stage, {count} pictures": lambda row: row["name"],
        "PSNR, dB": lambda row: f"{row['psnr_db']:.2f}",
        "bar": lambda row: f"{row['bar_db']:g}" if "bar_db" in row else "-",
        "latent numbers a picture": lambda row: str(row["latent_numbers"]),
        "parameters": lambda row: f"{row['parameters']:,}",
        "encoding, s": lambda row: row["encoding"],
        "decoding, s": lambda row: row["decoding"],
    }
    report("autoencoder", args, described, rows, columns)


def apply(network: Callable[[Tensor], Tensor], batches: list[Tensor]) -> list[Tensor]:
    return [network(batch) for batch in batches]


def row(stage: FirstStage, images: Tensor, styles: list[str], encoding: Timing, decoding: Timing) -> Row:
    """PSNR over all pictures and by style, latent size, seconds."""
    values = psnr(images, torch.cat(decoding.result))
    by_style = {
        style: float(values[[i for i, other in enumerate(styles) if other == style]].mean())
        for style in sorted(set(styles))
    }
    return {
        "name": stage.name,
        "pictures": len(images),
        "psnr_db": float(values.mean()),
        "psnr_lowest_db": float(values.min()),
        "psnr_by_style_db": by_style,
        "latent_numbers": encoding.result[0][0].numel(),
        "parameters": stage.parameters,
        "encoding_seconds": encoding.median,
        "decoding_seconds": decoding.median,
        "encoding": str(encoding),
        "decoding": str(decoding),
    }


def ours(autoencoder: AutoencoderKL, name: str) -> FirstStage:
    """The mode of the posterior, unscaled: the scale of the latents takes no part."""
    autoencoder.eval().requires_grad_(False)
    return FirstStage(
        name, lambda images: autoencoder.encode(images).mode(), autoencoder.decode, size(autoencoder)
    )


def tiny() -> tuple[AutoencoderKL, Tensor]:
    """A tiny random autoencoder and eight pictures of noise."""
    torch.manual_seed(0)
    task = load_config(AutoencoderTaskConfig, find_config("configs/train/tiny_autoencoder.yaml"))
    return AutoencoderKL(task.autoencoder), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- TAEF2 --------------------------------------------------------------------------------------------------


def taef2(folder: Path) -> FirstStage:
    """The network in `folder`, checked. Raises FileNotFoundError, and ValueError where it is another one."""
    network = load_tiny_autoencoder(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth")
    network.eval().requires_grad_(False)
    stage = FirstStage("TAEF2", network.encode, network.decode, size(network))
    check_golden(stage, folder / "taef2_golden.npz")
    return stage


@torch.no_grad()
def check_golden(stage: FirstStage, path: Path) -> None:
    """Raises FileNotFoundError, or ValueError where known inputs do not give the known outputs."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; without it nothing shows that the weights are loaded right"
        )
    golden = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    latent = stage.encode(golden["image"] * 2 - 1)
    decoded = (stage.decode(golden["latent"]) + 1) / 2
    for name, value in (("latent", latent), ("decoded", decoded)):
        difference = float((value - golden[name]).abs().max())
        if not difference < GOLDEN_TOLERANCE:
            raise ValueError(f"{path}: {name} differs by {difference:.2g}, more than {GOLDEN_TOLERANCE}")


def options() -> argparse.ArgumentParser:
    parser = make_parser("autoencoder", "What first stages keep of held-out pictures.", rounds=3)
    parser.add_argument("--model", default="emoji", metavar="NAME|PATH", help="our model (%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="folder that `ldm-train prepare` made")
    parser.add_argument("--split", default="heldout_image", help="which of its pictures (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (%(default)s)")
    parser.add_argument("--taef2", type=Path, metavar="FOLDER", help="folder with TAEF2's weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
