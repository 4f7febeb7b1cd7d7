"""What each speed option gains and costs: guided trajectories beside diffusers' UNet, all in turns.

    python -m benchmarks.options                 the shipped model, 4 pictures
    python -m benchmarks.options --size sd15     Stable Diffusion 1.5's sizes, random weights, 1 picture

Every side samples the same pictures from the same noise with guided DDIM steps; decoding is left out. `times
as fast` is against diffusers' eager UNet. `error` is |x - x_exact| / |x_exact| of the final latents against
ours without options in float32, which for diffusers' is the difference between the two. Before the timed
rounds every side runs two steps, in which what compiles does: their seconds are the last column. With random
weights the error of an approximation tells little of pictures: read it for the shipped model.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, alternate, execute, machine, make_parser, ratio, report
from benchmarks.sampling import PROMPT, random_model, sd15_model
from ldm.models.unet import UNet
from sample.pipeline import Pipeline
from sample.settings import Guidance
from sample.speed import OPTIONS, speed_up

EXACT = "none"
# Settings of `speed.py`'s options; "interval" and "bfloat16" are of the sampling and of the model
SIDES: dict[str, dict[str, Any]] = {
    EXACT: {},
    "--fast-conv 1": {"fast_conv": 1.0},
    "--fast-conv 9": {"fast_conv": 9.0},
    "--compile": {"compile": True},
    "--compile --fast-conv 9": {"compile": True, "fast_conv": 9.0},
    "--deep-cache 3": {"deep_cache": "3"},
    "--deep-cache 3:1": {"deep_cache": "3:1"},
    "--token-merging 0.5": {"token_merging": 0.5},
    "--guidance-interval 0.3:5": {"interval": (0.3, 5.0)},
    "--dtype bfloat16": {"dtype": torch.bfloat16},
    "--fast-conv 9 --deep-cache 3:1": {"fast_conv": 9.0, "deep_cache": "3:1"},
}


def measure(args: argparse.Namespace) -> None:
    """All sides in turns, one row each."""
    unknown = set(args.only) - set(SIDES)
    if unknown:
        raise ValueError(f"--only knows {', '.join(map(repr, SIDES))}, got {min(unknown)!r}")
    if args.quick:
        args.size, args.steps = "tiny", 3
        args.only = args.only or [EXACT, "--fast-conv 1", "--deep-cache 3", "--dtype bfloat16"]
    described = machine(args.quick)  # before the load is our own
    pipe, pictures = model(args.size)
    steps = args.steps or {"emoji": 25, "sd15": 6, "tiny": 3}[args.size]
    names = [name for name in SIDES if name in args.only or not args.only or name == EXACT]
    noise = pipe.noise(pipe.latent_shape(), *[(args.seed, "image", i) for i in range(pictures)])
    sides: dict[str, Callable[[int], Tensor]] = {
        "diffusers": diffusers(pipe, noise, args.guidance, args.compiled),
        **{name: ours(pipe, pictures, SIDES[name], args) for name in names},
    }
    first: dict[str, float] = {}  # seconds
    for name, call in sides.items():
        print(f"warming up {name}", file=sys.stderr)
        started = time.perf_counter()
        call(2)
        first[name] = time.perf_counter() - started
    timed = {name: (lambda call=call: call(steps)) for name, call in sides.items()}
    timings = alternate(timed, args.rounds, 0)
    exact = timings[EXACT].result
    rows: list[Row] = [
        {
            "what": name,
            "size": args.size,
            "pictures": pictures,
            "steps": steps,
            "seconds_per_step": timing.median / steps,
            "times_as_fast": ratio(timings["diffusers"], timing),
            "error": float((timing.result - exact).norm() / exact.norm()),
            "first_two_steps": first[name],
            "rounds": timing.seconds,
            "cpu_rounds": timing.cpu,
        }
        for name, timing in timings.items()
    ]
    columns: dict[str, Callable[[Row], str]] = {
        f"{args.size}, {pictures} guided": lambda row: row["what"],
        "seconds a step": lambda row: f"{row['seconds_per_step']:.3g}",
        "times as fast": lambda row: f"{row['times_as_fast']:.2f}",
        "error": lambda row: f"{row['error']:.1e}",
        "first two steps (s)": lambda row: f"{row['first_two_steps']:.3g}",
    }
    compiled = "-compiled" if args.compiled else ""
    report(f"options-{args.size}{compiled}", args, described, rows, columns)


def model(size: str) -> tuple[Pipeline, int]:
    """The model and how many pictures are made at once."""
    if size == "emoji":
        return Pipeline.load("emoji", "cpu"), 4
    if size == "tiny":
        return random_model("tiny"), 2
    return sd15_model(), 1


def ours(
    pipe: Pipeline, pictures: int, settings: dict[str, Any], args: argparse.Namespace
) -> Callable[[int], Tensor]:
    """Our sampling with these settings; weights are shared with the other sides, but for another format."""
    if "dtype" in settings:
        chosen = in_format(pipe, settings["dtype"])
    else:
        chosen = fast(pipe, pictures, settings.get("fast_conv", 0.0))
    formed(chosen, pictures, {**settings, "fast_conv": 0.0})
    guidance = Guidance(args.guidance, interval=settings.get("interval"))

    def call(steps: int) -> Tensor:
        *_, last = chosen.stream([PROMPT] * pictures, seed=args.seed, steps=steps, guidance=guidance)
        return last.sample.float()

    return call


FAST: dict[float, UNet] = {}  # by gigabytes: a network of its own for each side would fill the memory


def fast(pipe: Pipeline, pictures: int, gigabytes: float) -> Pipeline:
    """A copy on the same parts, with the fast convolutions of so many gigabytes."""
    chosen = copy(pipe)
    if gigabytes:
        if gigabytes not in FAST:
            formed(chosen, pictures, {"fast_conv": gigabytes})
            assert isinstance(chosen.network, UNet)
            FAST[gigabytes] = chosen.network
        chosen.unet = FAST[gigabytes]
    return chosen


def in_format(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """A copy in another number format."""
    chosen = deepcopy(pipe)
    for module in (chosen.unet, chosen.text_encoder):
        assert module is not None, "the models here read a text"
        module.to(dtype)
    return chosen


def formed(pipe: Pipeline, pictures: int, settings: dict[str, Any]) -> None:
    """Apply the options of `speed.py` among the settings."""
    defaults = {"fast_conv": 0.0, "compile": False, "deep_cache": None, "token_merging": 0.0}
    options = {name: settings.get(name, defaults[name]) for name in OPTIONS}
    side = pipe.latent_shape()[1] * pipe.autoencoder.factor
    speed_up(pipe, argparse.Namespace(**options, batch=pictures, n=pictures), (side, side))


def diffusers(pipe: Pipeline, noise: Tensor, guidance: float, compiled: bool) -> Callable[[int], Tensor]:
    """The loop of diffusers' pipeline over its UNet; compiled as a whole and with frozen weights if wanted,
    which is the fastest that torch makes of it."""
    from benchmarks import theirs

    unet, scheduler = theirs.unet(pipe.unet, share=True), theirs.scheduler(pipe.schedule.config)
    network = torch.compile(unet, options={"freezing": True}) if compiled else unet

    @torch.no_grad()
    def call(steps: int) -> Tensor:
        context = torch.cat([pipe.encode_prompts([text] * len(noise)) for text in ("", PROMPT)])
        scheduler.set_timesteps(steps)
        latents = noise
        for t in scheduler.timesteps:
            uncond, cond = theirs.predict(network, torch.cat([latents] * 2), t, context).chunk(2)
            prediction = uncond + guidance * (cond - uncond)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        return latents

    return call


def options() -> argparse.ArgumentParser:
    parser = make_parser("options", "What each speed option gains and costs, beside diffusers.", rounds=2)
    parser.add_argument(
        "--size", default="emoji", choices=["emoji", "sd15"], help="which model (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="guided DDIM steps (emoji 25, sd15 6)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the pictures (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some of the options")
    parser.add_argument("--compiled", action="store_true", help="diffusers' UNet compiled as a whole")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
