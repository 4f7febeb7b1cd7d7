"""One step of training a LoRA beside diffusers with peft: peak memory, and seconds.

    python -m benchmarks.lora                 the emoji model's UNet
    python -m benchmarks.lora --size sd15     Stable Diffusion 1.5's, each side alone: some 6 GB

Rank 4 on the attention projections of a frozen UNet, one picture, AdamW. Ours is `add_lora` with `lean`, as
`ldm-train lora` trains; theirs `add_adapter` of UNet2DConditionModel, as diffusers' script does. Both start
from equal weights; `difference` is that of all gradients, relative in norm, in float32. Memory is the peak of
a process of its own, less what it held before it built anything, and must be at most 0.9 of theirs.
`estimated` is what the weights and the tensors that wait for the way back take, without running anything.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    Timing,
    alternate,
    execute,
    in_fresh_process,
    machine,
    make_parser,
    memory_of,
    randomise,
    ratio,
    report,
)
from benchmarks.unet import TOKENS, config_of, network
from ldm.device import DTYPES
from ldm.models.frozen import lean
from ldm.models.lora import LoRA, LoRAConfig, add_lora
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.lora_names import theirs as their_names

BAR = 0.9  # of the memory of diffusers with peft
RANK = 4
OURS, THEIRS = SIDES = ("ours", "diffusers with peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # "attention" of ours, in their names
Step = Callable[[], Tensor]


def measure(args: argparse.Namespace) -> None:
    """Both sides in every number format, one row each; memory first, while this process is small."""
    size, precisions = ("tiny", ["float32"]) if args.quick else (args.size, args.precision)
    described = machine(args.quick)  # before the load is our own
    estimates = {side: estimate(side, config_of(size)) for side in SIDES}
    require_memory(max(estimates.values()))
    rows: list[Row] = []
    for precision in precisions:
        print(f"{size}, {precision}", file=sys.stderr)
        rows += measured(size, precision, args.rounds, args.warmup, estimates)
    columns: dict[str, Callable[[Row], str]] = {
        f"LoRA step, {size}": lambda row: row["what"],
        "precision": lambda row: row["precision"],
        "MiB": lambda row: f"{row['mib']:.0f}",
        "of theirs": lambda row: f"{row['of_theirs']:.2f}",
        "estimated, MiB": lambda row: f"{row['estimated_mib']:.0f}",
        "s": lambda row: row["seconds"],
        "times as fast": lambda row: f"{row['times_as_fast']:.2f}",
        "difference": lambda row: f"{row['difference']:.1e}" if "difference" in row else "-",
    }
    report(f"lora-{size}", args, described, rows, columns)
    for row in rows:
        if row["what"] == OURS:
            told = "met" if row["of_theirs"] <= BAR else "missed"
            print(
                f"{row['precision']}: {row['of_theirs']:.2f}x of the memory (bar {BAR:g}: {told})",
                file=sys.stderr,
            )


def measured(size: str, precision: str, rounds: int, warmup: int, estimates: dict[str, float]) -> list[Row]:
    """A row a side; of Stable Diffusion's size each alone, as one process does not hold both."""
    large = size == "sd15"
    threads, told = torch.get_num_threads(), {"size": size, "precision": precision}
    alone = {
        side: in_fresh_process(
            "benchmarks.lora", "alone", side=side, **told, rounds=rounds if large else 1, threads=threads
        )
        for side in SIDES
    }
    common: Row = {**told, "rank": RANK, "batch": 1}
    if large:
        timings = {side: Timing(found["seconds"], None, found["cpu"]) for side, found in alone.items()}
    else:
        unet, lora, other = pair(config_of(size))
        common |= {"difference": difference(unet, lora, other), "parameters": count(lora.parameters())}
        steps = {OURS: training(unet, precision), THEIRS: training(other, precision)}
        timings = alternate(steps, rounds, warmup)
    memory = {side: found["peak"] - found["before"] for side, found in alone.items()}
    return [
        {
            "what": side,
            **common,
            "mib": memory[side],
            "of_theirs": memory[side] / memory[THEIRS],
            "estimated_mib": estimates[side],
            "estimated_of_theirs": estimates[side] / estimates[THEIRS],
            "bar": BAR,
            "seconds": str(timing),
            "times_as_fast": ratio(timings[THEIRS], timing),
            "rounds": timing.seconds,
            "cpu_rounds": timing.cpu,
        }
        for side, timing in timings.items()
    ]


def require_memory(mib: float) -> None:
    """Raises ValueError where a side would not fit: half an hour of swapping measures nothing."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = int(line.split()[1]) / 1024
    if available < 1.2 * mib:
        raise ValueError(f"a step needs some {1.2 * mib:.0f} MiB, of which {available:.0f} are free")


# --- the two sides ------------------------------------------------------------------------------------------


def ours(config: UNetConfig) -> tuple[UNet, LoRA]:
    """A UNet with random weights and a LoRA, ready to train."""
    torch.manual_seed(0)
    unet = randomise(UNet(config)).train()
    lora = add_lora(unet, LoRAConfig(rank=RANK))
    return lean(unet), lora


def theirs(config: UNetConfig) -> Any:
    """The same of diffusers and peft, with weights of its own."""
    from benchmarks import theirs as library

    return adapted(library.unet_of(config).train())


def adapted(unet: Any) -> Any:
    """Their UNet with a LoRA that can be trained."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    return unet


def training(module: nn.Module, precision: str = "float32", optimised: bool = True) -> Step:
    """A step of either side: prediction, loss, way back, and AdamW unless it is left out."""
    config: Any = module.config
    predict = network(module)
    width = config.context_dim if isinstance(module, UNet) else config.cross_attention_dim
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    t, context = torch.tensor([500]), torch.randn(1, TOKENS, width, generator=generator)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    dtype = DTYPES[precision]
    cast = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = F.mse_loss(predict(x, t, context).float(), noise)
        loss.backward()
        if optimised:
            optimizer.step()
        return loss.detach()

    return step


def pair(config: UNetConfig) -> tuple[UNet, LoRA, Any]:
    """Both sides with the same weights, those of the LoRA too, none of them zero."""
    from benchmarks import theirs as library

    unet, lora = ours(config)
    with torch.no_grad():
        for adapter in lora.adapters.values():
            adapter.up.normal_(std=0.02)
    torch.manual_seed(0)
    other = adapted(library.unet(randomise(UNet(config)).train()))
    with torch.no_grad():
        for name, adapter in lora.adapters.items():
            layer = other.get_submodule(their_names(config)[name])
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_B["default"].weight.copy_(adapter.up)
    return unet, lora, other


def difference(unet: UNet, lora: LoRA, other: Any) -> float:
    """|ours - theirs| / |theirs| of the gradients of a step, in float32."""
    for module in (unet, other):
        training(module, optimised=False)()
    pairs = []
    for name, adapter in lora.adapters.items():
        layer = other.get_submodule(their_names(unet.config)[name])
        pairs.append((adapter.down.grad, layer.lora_A["default"].weight.grad))
        pairs.append((adapter.up.grad, layer.lora_B["default"].weight.grad))
    off = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(off / torch.stack([b.norm() for _, b in pairs]).norm())


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


# --- memory -------------------------------------------------------------------------------------------------


def alone(side: str, size: str, precision: str, rounds: int, threads: int) -> Row:
    """MiB of this process before building one side and at the peak of `rounds` + 1 steps; the seconds of all
    but the first.

    A tiny model goes first: what torch imports or allocates once, at first use, is no cost of the model.
    """
    torch.set_num_threads(threads)
    seconds: list[float] = []
    cpu: list[float] = []

    def start(size: str) -> Step:
        config = config_of(size)
        step = training(ours(config)[0] if side == OURS else theirs(config), precision)

        def timed() -> Tensor:
            began, began_cpu = time.perf_counter(), time.process_time()
            loss = step()
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
            return loss

        return timed

    if size != "tiny":
        memory_of(partial(start, "tiny"))
    seconds.clear(), cpu.clear()
    found: Row = memory_of(partial(start, size), calls=rounds + 1)
    return {**found, "seconds": seconds[1:], "cpu": cpu[1:]}


class _Fused(torch.autograd.Function):
    """What fused attention keeps, without values: the device "meta" has but the form with whole maps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out


def estimate(side: str, config: UNetConfig) -> float:
    """MiB of the weights and of all tensors that a prediction keeps for the way back, in float32."""
    found: dict[Any, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes(), tensor  # held, so that its place is not another's later
        return tensor

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return _Fused.apply(q, k, v)  # type: ignore[no-any-return]

    with torch.device("meta"), mock.patch.object(F, "scaled_dot_product_attention", attention):
        # Values are nothing here, so neither is `randomise`
        module = theirs(config) if side == THEIRS else bare(config)
        x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
        t, context = torch.empty(1, dtype=torch.long), torch.empty(1, TOKENS, config.context_dim or 0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(module)(x, t, context)
    for parameter in module.parameters():
        note(parameter.detach())
    return sum(size for size, _ in found.values()) / 2**20


def bare(config: UNetConfig) -> UNet:
    unet = UNet(config).train()
    add_lora(unet, LoRAConfig(rank=RANK))
    return lean(unet)


def options() -> argparse.ArgumentParser:
    parser = make_parser("lora", "A step of training a LoRA, beside diffusers with peft.", rounds=5)
    sizes = ["emoji", "tiny", "sd15"]
    parser.add_argument("--size", default="emoji", choices=sizes, help="which UNet (%(default)s)")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["float32"],
        choices=["float32", "bfloat16"],
        help="number formats; bfloat16 is autocast (both)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
