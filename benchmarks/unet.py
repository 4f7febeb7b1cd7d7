"""Our UNet beside diffusers' UNet2DConditionModel on equal weights: one call, and one training step.

    python -m benchmarks.unet                emoji size: batch 8 = 4 guided pictures, 16x16 latents, 77 tokens
    python -m benchmarks.unet --size sd15    Stable Diffusion 1.5: batch 2 = 1 guided picture, 64x64 latents
    python -m benchmarks.unet --size sd15 --compile    and compiled: ours by block, diffusers' as a whole

The weights are random and none is zero. A row is one kind of call in one number format and memory layout,
the same on both sides. A `call` has inputs that all differ; in a `guided call`, as sampling makes it, two
prompts share each x, which ours gets once and diffusers' gets twice. `difference` is the largest of the
outputs' absolute differences for a call, and for a training step the norm of the gradients' difference over
that of the gradient. Memory is the peak of a process of its own that holds one model, less what it held
before building it.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    add_kinds,
    alternate,
    execute,
    in_fresh_process,
    machine,
    make_parser,
    memory_of,
    randomise,
    report,
    timings,
)
from ldm.config import find_config, load_config
from ldm.device import DTYPES
from ldm.models.compiled import compile_blocks
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.diffusers import to_diffusers
from train.tasks.diffusion import DiffusionTaskConfig

TOKENS = 77
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, context) -> prediction


class Size(NamedTuple):
    """config: a shipped training configuration, None for Stable Diffusion's. Batches: 0 leaves it out."""

    config: str | None
    batch: int
    training_batch: int


SIZES = {
    "emoji": Size("configs/train/emoji.yaml", 8, 32),
    "sd15": Size(None, 2, 0),  # training it takes 16 bytes a parameter: 14 GB a side
    "tiny": Size("configs/train/tiny.yaml", 2, 4),
}


class Case(NamedTuple):
    """One row: "call", "guided call", "compiled call" (guided) or "training step", in one number format and
    layout."""

    kind: str
    size: str
    precision: str
    layout: str

    @property
    def batch(self) -> int:
        return SIZES[self.size].training_batch if self.kind == "training step" else SIZES[self.size].batch


def measure(args: argparse.Namespace) -> None:
    """Every case, one row each; memory first, while this process is small."""
    if args.quick:
        cases = [
            Case("call", "tiny", "float32", "contiguous"),
            Case("guided call", "tiny", "float32", "contiguous"),
            Case("training step", "tiny", "bfloat16", "channels_last"),
        ]
    else:
        kinds = ["call", "guided call", *(["compiled call"] if args.compile else [])]
        kinds += ["training step"] if SIZES[args.size].training_batch else []
        chosen = itertools.product(kinds, [args.size], args.precision, args.layout)
        cases = [Case(*parts) for parts in chosen]
    described = machine(args.quick)  # before the load is our own
    rows = []
    for i, case in enumerate(cases, start=1):
        print(f"{i} of {len(cases)}: {', '.join(case)}", file=sys.stderr)
        memory = args.memory and not (args.quick and i > 1)
        rows.append({**case._asdict(), "batch": case.batch, **(peaks(case) if memory else {})})
        rows[-1] |= timed(case, args.rounds, args.warmup)
    columns = {
        "UNet": lambda row: f"{row['size']}, batch {row['batch']}",
        "what": lambda row: row["kind"],
        "precision": lambda row: row["precision"],
        "layout": lambda row: row["layout"],
        "ours, s": lambda row: row["ours"],
        "diffusers, s": lambda row: row["diffusers"],
        "times as fast": lambda row: f"{row['times_as_fast']:.2f}",
        "first call, s": lambda row: f"{row['ours_first']:.1f}, {row['diffusers_first']:.1f}",
        "difference": lambda row: f"{row['difference']:.1e}",
        "ours, MiB": lambda row: f"{row['ours_mib']:.0f}" if "ours_mib" in row else "-",
        "diffusers, MiB": lambda row: f"{row['diffusers_mib']:.0f}" if "diffusers_mib" in row else "-",
    }
    report(f"unet-{'tiny' if args.quick else args.size}", args, described, rows, columns)


def config_of(size: str) -> UNetConfig:
    path = SIZES[size].config
    return UNetConfig() if path is None else load_config(DiffusionTaskConfig, find_config(path)).unet


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, h, w), t (B,), context (B, 77, D); the same for both sides. Guided x and t have B / 2 rows."""
    config, generator = config_of(case.size), torch.Generator().manual_seed(1)
    side, batch = config.sample_size, case.batch
    x = torch.randn(batch, config.in_channels, side, side, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    assert config.context_dim is not None, "every size here reads a text"
    context = torch.randn(batch, TOKENS, config.context_dim, generator=generator)
    if case.kind in ("guided call", "compiled call"):
        x, t = x[: batch // 2], t[: batch // 2]
    return x.to(memory_format=LAYOUTS[case.layout]), t, context


def ready(module: Any, case: Case) -> Any:
    """A module in the mode and memory layout of the case."""
    trains = case.kind == "training step"
    module = module.train(trains).requires_grad_(trains)
    return module.to(memory_format=LAYOUTS[case.layout])


def network(module: Any) -> Network:
    """Either side's module as a function of the same signature."""
    if isinstance(module, UNet):
        return module
    from benchmarks import theirs

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        copies = len(context) // len(x)
        return theirs.predict(module, torch.cat([x] * copies), torch.cat([t] * copies), context)

    return predict


def compiled(module: Any) -> Any:
    """Either side's module as its library compiles it."""
    return compile_blocks(module) if isinstance(module, UNet) else torch.compile(module)


def step(module: nn.Module, case: Case) -> Callable[[], Tensor]:
    """The timed function: a call returns its output, a training step its loss."""
    x, t, context = inputs(case)
    module = compiled(module) if case.kind == "compiled call" else module
    predict, dtype = network(module), DTYPES[case.precision]
    cast = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    if case.kind != "training step":

        def call() -> Tensor:
            with torch.no_grad(), cast():
                return predict(x, t, context)

        return call

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = F.mse_loss(predict(x, t, context).float(), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def pair(case: Case) -> tuple[UNet, Any]:
    """Our UNet and diffusers' with the same random weights."""
    from benchmarks import theirs

    torch.manual_seed(0)
    ours = ready(randomise(UNet(config_of(case.size))), case)
    return ours, ready(theirs.unet(ours), case)


def timed(case: Case, rounds: int, warmup: int) -> Row:
    """Seconds of both sides in turns, and by how much they differ."""
    ours, theirs = pair(case)
    sides = {"ours": step(ours, case), "diffusers": step(theirs, case)}
    first = {name: alternate({name: side}, 1, 0)[name] for name, side in sides.items()}
    results = {name: timing.result.float() for name, timing in first.items()}  # on equal weights
    if case.kind != "training step":
        difference = float((results["ours"] - results["diffusers"]).abs().max())
    else:
        difference = gradient_difference(ours, theirs)
    measured = alternate(sides, rounds, warmup)
    began = {f"{name}_first": timing.median for name, timing in first.items()}  # with what is compiled then
    return {"difference": difference, **began, **timings(measured["ours"], measured["diffusers"])}


def gradient_difference(ours: UNet, theirs: Any) -> float:
    """|ours - theirs| / |theirs| over all parameters, of the gradients both hold."""
    own = to_diffusers(gradients(ours), ours.config)
    pairs = [(own[name], gradient) for name, gradient in gradients(theirs).items()]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(difference / torch.stack([b.norm() for _, b in pairs]).norm())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter."""
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def peaks(case: Case) -> Row:
    """Peak memory of each side in a process of its own."""
    row: Row = {}
    for side in ("ours", "diffusers"):
        found = in_fresh_process(
            "benchmarks.unet", "memory", side=side, case=list(case), threads=torch.get_num_threads()
        )
        row |= {f"{side}_peak_mib": found["peak"], f"{side}_mib": found["peak"] - found["before"]}
    return row


def memory(side: str, case: list[str], threads: int) -> dict[str, float]:
    """MiB of this process before building one side's model and at the peak of its calls.

    A tiny model goes first: what torch imports or allocates once, at first use, is no cost of the model.
    """
    torch.set_num_threads(threads)
    chosen = Case(*case)
    memory_of(partial(alone, side, chosen._replace(size="tiny")))
    return memory_of(partial(alone, side, chosen))


def alone(side: str, case: Case) -> Callable[[], Tensor]:
    """The timed function of one side, without the other in memory."""
    config = config_of(case.size)
    if side == "ours":
        return step(ready(UNet(config), case), case)
    from benchmarks import theirs

    return step(ready(theirs.unet_of(config), case), case)


def options() -> argparse.ArgumentParser:
    parser = make_parser("unet", "Our UNet beside diffusers' on equal weights.", rounds=10)
    parser.add_argument("--size", default="emoji", choices=["emoji", "sd15"], help="which UNet (%(default)s)")
    parser.add_argument(
        "--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="memory layouts (both)"
    )
    add_kinds(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
