"""3x3 convolutions as torch computes them beside Winograd's form (ldm/models/fast_conv.py), layer by layer.

    python -m benchmarks.convolutions                    the shapes of Stable Diffusion 1.5's UNet, batch 2
    python -m benchmarks.convolutions --network decoder  of its decoder, 64x64 latents to 512x512
    python -m benchmarks.convolutions --network emoji    the shapes of the shipped model, 4 pictures

A row is one shape of layer with random weights. `rule` is the gain that `fast_convolutions` expects, by which
it chooses; `measured` is the gain found here. Errors are relative, against the convolution in float64. Layers
of an upsampler stand for the whole of it, whose form without Winograd takes 16 products instead of 36.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import Row, alternate, execute, machine, make_parser, ratio, report
from ldm.models.autoencoder import AutoencoderConfig, Decoder
from ldm.models.blocks import Upsample
from ldm.models.fast_conv import ConvShape, WinogradConv2d, conv_shapes
from ldm.models.unet import UNet, UNetConfig
from sample.pipeline import Pipeline

TOKENS = 77
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(args: argparse.Namespace) -> None:
    """Every shape of layer, one row each, the costliest kind first."""
    shapes = tiny() if args.quick else NETWORKS[args.network]()
    described = machine(args.quick)  # before the load is our own
    rows = []
    for i, (shape, count) in enumerate(sorted(shapes.items(), key=cost, reverse=True), start=1):
        print(f"{i} of {len(shapes)}: {shape}", file=sys.stderr)
        rows.append({**vars(shape), "layers": count, "rule": shape.gain, "gigabytes": shape.bytes / 1e9})
        rows[-1] |= timed(shape, LAYOUTS[args.layout], args.rounds, args.warmup)
    columns = {
        "layer": lambda row: f"{row['in_channels']} to {row['out_channels']}{', up' * row['upsample']}",
        "input": lambda row: f"{row['pictures']}x {row['width']}x{row['height']}",
        "layers": lambda row: str(row["layers"]),
        "direct, s": lambda row: row["direct"],
        "Winograd, s": lambda row: row["winograd"],
        "measured": lambda row: f"{row['times_as_fast']:.2f}",
        "rule": lambda row: f"{row['rule']:.2f}",
        "error, direct": lambda row: f"{row['direct_error']:.1e}",
        "error, Winograd": lambda row: f"{row['winograd_error']:.1e}",
        "GB a layer": lambda row: f"{row['gigabytes']:.3f}",
    }
    name = "tiny" if args.quick else args.network
    report(f"convolutions-{name}", args, described, rows, columns)


def cost(item: tuple[ConvShape, int]) -> float:
    shape, count = item
    return count * shape.direct


def unet_shapes() -> Counter[ConvShape]:
    config = UNetConfig()
    x = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size, device="meta")
    context = torch.zeros(2, TOKENS, config.context_dim or 0, device="meta")
    return shapes_of(lambda: UNet(config), x, torch.zeros(2, device="meta"), context)


def decoder_shapes() -> Counter[ConvShape]:
    config = AutoencoderConfig()
    return shapes_of(lambda: Decoder(config), torch.zeros(1, config.z_channels, 64, 64, device="meta"))


def shapes_of(build: Callable[[], nn.Module], *inputs: Tensor) -> Counter[ConvShape]:
    """How often each shape of layer occurs; the network is built without data."""
    with torch.device("meta"):
        module = build().eval()
    return Counter(conv_shapes(module, *inputs, device="meta").values())


def emoji_shapes() -> Counter[ConvShape]:
    """Of the shipped model, 4 pictures."""
    unet = Pipeline.load("emoji", "cpu").unet
    config = unet.config
    x = torch.zeros(4, config.in_channels, config.sample_size, config.sample_size)
    context = torch.zeros(8, TOKENS, config.context_dim or 0)
    return Counter(conv_shapes(unet, x, torch.zeros(4), context).values())


NETWORKS = {"unet": unet_shapes, "decoder": decoder_shapes, "emoji": emoji_shapes}


def tiny() -> Counter[ConvShape]:
    return Counter([ConvShape(16, 16, 2, 10, 6), ConvShape(8, 8, 2, 32, 32, folded=True)])


def layer(shape: ConvShape, winograd: bool) -> nn.Module:
    """One layer with random weights, the same in both forms: a convolution, or an upsampler that folds."""
    torch.manual_seed(0)
    if shape.folded:
        upsample = Upsample(shape.in_channels)
        if winograd:
            upsample.conv = WinogradConv2d(upsample.conv)
        return upsample
    conv = nn.Conv2d(shape.in_channels, shape.out_channels, 3, padding=1)
    return WinogradConv2d(conv) if winograd else conv


@torch.no_grad()
def timed(shape: ConvShape, layout: torch.memory_format, rounds: int, warmup: int) -> Row:
    """Seconds of both forms in turns, and the error of each."""
    scale = 2 if shape.folded else 1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(
        shape.pictures, shape.in_channels, shape.height // scale, shape.width // scale, generator=generator
    ).contiguous(memory_format=layout)
    forms = {"direct": layer(shape, False).to(memory_format=layout), "winograd": layer(shape, True)}
    measured = alternate({name: partial(form, x) for name, form in forms.items()}, rounds, warmup)
    exact = layer(shape, False).double()(x[:1].double())  # of one picture: float64 is slow
    row: Row = {"upsample": shape.folded, "times_as_fast": ratio(measured["direct"], measured["winograd"])}
    for name, timing in measured.items():
        row[name] = str(timing)
        row[f"{name}_rounds"], row[f"{name}_cpu_rounds"] = timing.seconds, timing.cpu
        row[f"{name}_error"] = float((timing.result[:1].double() - exact).norm() / exact.norm())
    return row


def options() -> argparse.ArgumentParser:
    parser = make_parser("convolutions", "3x3 convolutions beside Winograd's form.", rounds=5)
    parser.add_argument("--network", default="unet", choices=NETWORKS, help="whose layers (%(default)s)")
    parser.add_argument(
        "--layout", default="contiguous", choices=LAYOUTS, help="memory layout (both; %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
