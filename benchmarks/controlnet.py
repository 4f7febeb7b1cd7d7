"""What a ControlNet adds to a step: a controlled UNet call beside an uncontrolled one, ours and diffusers'.

    python -m benchmarks.controlnet                Stable Diffusion 1.5's: 1 guided picture, 64x64 latents
    python -m benchmarks.controlnet --size tiny    the same plan, 32 channels wide

The weights are random, none is zero, and both sides share them. All four calls are timed in turns; a row is
one side in one number format and memory layout. `overhead` is the median over rounds of a controlled step's
time over that of an uncontrolled one. Ours encodes the hint once a picture, which `hint` times and the step
leaves out; diffusers' encodes it in every step. `difference` is the largest between the controlled outputs of
both, over the largest output.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Row, Timing, alternate, execute, machine, make_parser, randomise, ratio, report
from ldm.device import DTYPES
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNet
from ldm.weights.kinds import find_kind

BAR = 1.5  # a controlled step takes at most so many times an uncontrolled one's time
TOKENS = 77
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    size: str
    precision: str
    layout: str


def measure(args: argparse.Namespace) -> None:
    """Each number format in each layout, two rows each."""
    size = "tiny" if args.quick else args.size
    chosen = [("float32", "contiguous")] if args.quick else itertools.product(args.precision, args.layout)
    cases = [Case(size, *parts) for parts in chosen]
    described = machine(args.quick)  # before the load is our own
    rows: list[Row] = []
    for i, case in enumerate(cases, start=1):
        print(f"{i} of {len(cases)}: {', '.join(case)}", file=sys.stderr)
        rows += timed(case, args.rounds, args.warmup)
    columns: dict[str, Callable[[Row], str]] = {
        f"{size}, 1 guided picture": lambda row: row["what"],
        "precision": lambda row: row["precision"],
        "layout": lambda row: row["layout"],
        "step, s": lambda row: row["plain"],
        "controlled step, s": lambda row: row["controlled"],
        "overhead": lambda row: f"{row['overhead']:.2f}",
        "hint, s": lambda row: f"{row['hint_seconds']:.3g}" if "hint_seconds" in row else "in the step",
        "difference": lambda row: f"{row['difference']:.1e}",
    }
    report(f"controlnet-{size}", args, described, rows, columns)


def config_of(size: str) -> ControlNetConfig:
    config = find_kind({"sd15": "controlnet_sd15", "tiny": "tiny_controlnet_sd15"}[size]).config.control
    assert config is not None
    return config


class Inputs(NamedTuple):
    """Of one guided picture: x (1, C, h, w), t (1,), context (2, 77, D), hint (1, 3, 8h, 8w)."""

    x: Tensor
    t: Tensor
    context: Tensor
    hint: Tensor


def inputs(config: ControlNetConfig, layout: str) -> Inputs:
    unet, generator = config.unet, torch.Generator().manual_seed(1)
    side = unet.sample_size
    assert unet.context_dim is not None, "every size here reads a text"
    x = torch.randn(1, unet.in_channels, side, side, generator=generator)
    context = torch.randn(2, TOKENS, unet.context_dim, generator=generator)
    hint = torch.rand(
        1, config.hint_channels, side * config.stride, side * config.stride, generator=generator
    )
    form = LAYOUTS[layout]
    return Inputs(x.to(memory_format=form), torch.tensor([500]), context, hint.to(memory_format=form))


def networks(config: ControlNetConfig, layout: str) -> tuple[UNet, ControlNet]:
    """Ours, with random weights."""
    torch.manual_seed(0)
    unet, net = randomise(UNet(config.unet)), randomise(ControlNet(config))
    for module in (unet, net):
        module.eval().requires_grad_(False)
        module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    return unet, net


Step = Callable[[], Tensor]


def ours(unet: UNet, net: ControlNet, data: Inputs) -> dict[str, Step]:
    """A step without and with control, and what is done once a picture."""
    features = net.encode_hint(data.hint)
    call = (data.x, data.t, data.context)
    return {
        "plain": lambda: unet(*call),
        "controlled": lambda: unet(*call, control=net(*call, features)),
        "hint": lambda: net.encode_hint(data.hint),
    }


def theirs(unet: UNet, net: ControlNet, data: Inputs) -> dict[str, Step]:
    """The same by diffusers' networks on the same weights, called as its pipeline does."""
    from benchmarks import theirs as library

    their_unet, their_net = library.unet(unet, share=True), library.controlnet(net, share=True)
    x, t, hint = (torch.cat([tensor] * 2) for tensor in (data.x, data.t, data.hint))

    def controlled() -> Tensor:
        down, middle = their_net(x, t, data.context, hint, return_dict=False)
        found: Any = their_unet(
            x,
            t,
            data.context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )
        return found[0]

    return {"plain": lambda: library.predict(their_unet, x, t, data.context), "controlled": controlled}


def timed(case: Case, rounds: int, warmup: int) -> list[Row]:
    """A row of ours and one of diffusers'."""
    config, dtype = config_of(case.size), DTYPES[case.precision]
    data, pair = inputs(config, case.layout), networks(config, case.layout)
    cast = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), cast():
        calls = {"ours": ours(*pair, data), "diffusers": theirs(*pair, data)}
        flat = {f"{side} {what}": call for side, steps in calls.items() for what, call in steps.items()}
        timings = alternate(flat, rounds, warmup)
    mine, other = (timings[f"{side} controlled"].result.float() for side in calls)
    difference = float((mine - other).abs().max() / other.abs().max())
    return [row(case, side, timings, difference) for side in calls]


def row(case: Case, side: str, timings: dict[str, Timing], difference: float) -> Row:
    plain, controlled = timings[f"{side} plain"], timings[f"{side} controlled"]
    hint = timings.get(f"{side} hint")
    return {
        "what": side,
        **case._asdict(),
        "plain_seconds": plain.median,
        "controlled_seconds": controlled.median,
        "overhead": ratio(controlled, plain),
        "bar": BAR,
        "difference": difference,
        **({"hint_seconds": hint.median, "hint_rounds": hint.seconds} if hint is not None else {}),
        "plain": str(plain),
        "controlled": str(controlled),
        "plain_rounds": plain.seconds,
        "controlled_rounds": controlled.seconds,
        "plain_cpu_rounds": plain.cpu,
        "controlled_cpu_rounds": controlled.cpu,
    }


def options() -> argparse.ArgumentParser:
    parser = make_parser("controlnet", "What a ControlNet adds to a step, beside diffusers.", rounds=5)
    parser.add_argument("--size", default="sd15", choices=["sd15", "tiny"], help="which model (%(default)s)")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["float32"],
        choices=["float32", "bfloat16"],
        help="number formats; bfloat16 is autocast (both)",
    )
    parser.add_argument(
        "--layout", nargs="+", default=["contiguous"], choices=LAYOUTS, help="memory layouts (both)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
