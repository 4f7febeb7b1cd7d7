"""What the benchmarks share: the machine, timing in turns, peak memory of a fresh process, the report.

A machine's speed drifts (other processes, heat), so two implementations are never timed one after the other
but in turns, A B A B, and compared round by round: `ratio` is the median over rounds of their quotient.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.weights.io import write_atomically
from sample.cli import Parser, run

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
M = TypeVar("M", bound=nn.Module)
LIBRARIES = ("torch", "diffusers", "transformers")


# --- the command line ---------------------------------------------------------------------------------------


def make_parser(name: str, description: str, rounds: int) -> Parser:
    """A parser with the options that every benchmark has."""
    parser = Parser(prog=f"benchmarks.{name}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="times each side is timed (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (its own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (outputs/benchmarks/...)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, once: does it run?")
    return parser


def add_kinds(parser: Parser) -> None:
    """Options on which kinds of a side are measured, and whether their memory is."""
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="number formats; bfloat16 is autocast (both)",
    )
    parser.add_argument("--compile", action="store_true", help="compiled ones too (both)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")


def start(args: argparse.Namespace) -> None:
    """Check and apply the common options. Raises ValueError in one line."""
    if args.quick:
        args.rounds = args.warmup = 1
    if args.rounds < 1 or args.warmup < 0:
        raise ValueError(f"--rounds must be at least 1 and --warmup 0, got {args.rounds} and {args.warmup}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def execute(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse and measure; returns the exit status: 2, after one line, for what a user can cause."""
    args = parser.parse_args(argv)

    def body() -> int:
        start(args)
        measure(args)
        return 0

    return run(parser.prog, body)


# --- time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, what the last one returned, and seconds of processor time in each round.

    Processor time, summed over threads, tells a side that waited for other processes from one that worked.
    """

    seconds: list[float]
    result: Any = None
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def __str__(self) -> str:
        """Median and range: `0.123 (0.120 to 0.131)`."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.3g} ({low:.3g} to {high:.3g})"


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Call every side once a round, in the given order; `warmup` rounds before are not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for i in range(warmup + rounds):
        for name, call in sides.items():
            began, worked = time.perf_counter(), time.process_time()
            results[name] = call()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
    return {name: Timing(seconds[name], results[name], cpu[name]) for name in sides}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times as fast the second is: the median over rounds of slow / fast."""
    return median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


class Clock:
    """Seconds spent inside modules, by name. Several modules may share a name; they must not be nested."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.names = list(dict.fromkeys(name for name, _ in modules))
        self.reset()
        for name, module in modules:
            module.register_forward_pre_hook(lambda *_: self._enter())
            module.register_forward_hook(lambda *_, name=name: self._leave(name))

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.names, 0.0)

    def _enter(self) -> None:
        self._began = time.perf_counter()

    def _leave(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self._began


# --- memory -------------------------------------------------------------------------------------------------


def in_fresh_process(module: str, function: str, **arguments: Any) -> Any:
    """`module.function(**arguments)` in a Python of its own; arguments and result are JSON-ready.

    Raises ValueError with the last line of its stderr where that fails, or with the signal that ended it.
    """
    command = [sys.executable, "-m", "benchmarks.common", module, function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode < 0:  # the last line is of something else then; the system kills for want of memory
        name = signal.Signals(-done.returncode).name
        raise ValueError(f"{function} in a process of its own was ended by {name}: too little memory?")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"{function} in a process of its own: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(build: Callable[[], Callable[[], Any]], calls: int = 2) -> dict[str, float]:
    """MiB of this process: `before` building, and `peak` during `calls` calls of what `build` returns.

    The peak is that of the calls alone where the system can reset its mark (Linux), else of everything.
    """
    gc.collect()  # what others left would else be freed in between, and count as less
    before = _memory("VmRSS")
    call = build()
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far
    for _ in range(calls):
        call()
    return {"before": before, "peak": _memory("VmHWM")}


def _memory(key: str) -> float:
    """VmRSS or VmHWM of this process in MiB.

    From /proc: getrusage's peak would begin at that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


# --- the machine --------------------------------------------------------------------------------------------


def machine(quick: bool = False) -> Row:
    """What the numbers were measured on. `matmul_gflops` and `load` tell a busy machine from an idle one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
        "matmul_gflops": round(matmul_gflops(256 if quick else 2048)),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def matmul_gflops(side: int, rounds: int = 5) -> float:
    """Best rate of a plain float32 matrix product, 2 side^3 operations."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    timing = alternate({"matmul": lambda: a @ b}, rounds)["matmul"]
    return 2e-9 * side**3 / min(timing.seconds)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- the report ---------------------------------------------------------------------------------------------


def report(
    name: str,
    args: argparse.Namespace,
    described: Row,
    rows: list[Row],
    columns: Mapping[str, Callable[[Row], str]],
) -> None:
    """Write the JSON file and print the table: a line a row, a column an entry of `columns`."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"benchmark": name, "machine": described, "settings": settings, "rows": rows}
    out = args.out or Path("outputs/benchmarks") / f"{name}{'-quick' if args.quick else ''}.json"
    write_atomically(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(table(rows, columns))
    print()
    print("; ".join(f"{key} {value}" for key, value in described.items()))
    print(out)


def table(rows: list[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """Markdown."""
    lines = [
        list(columns),
        ["---"] * len(columns),
        *[[show(row) for show in columns.values()] for row in rows],
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def timings(ours: Timing, theirs: Timing) -> Row:
    """The part of a row that two timings make."""
    return {
        "ours_seconds": ours.median,
        "diffusers_seconds": theirs.median,
        "times_as_fast": ratio(theirs, ours),
        "ours": str(ours),
        "diffusers": str(theirs),
        "ours_rounds": ours.seconds,
        "diffusers_rounds": theirs.seconds,
        "ours_cpu_rounds": ours.cpu,
        "diffusers_cpu_rounds": theirs.cpu,
    }


# --- random models ------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: M) -> M:
    """Random values where the constructor left zeros, so that every weight has a say in the output."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return module


if __name__ == "__main__":
    called = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    print(json.dumps(called(**json.loads(sys.argv[3]))))
