"""From a prompt to four pictures: `ldm-sample` from a cold start, and warm beside diffusers in turns.

    python -m benchmarks.sampling                     the shipped model, 50 guided DDIM steps
    python -m benchmarks.sampling --model random      random weights of the same sizes
    python -m benchmarks.sampling --model sd15 --pictures 1 --steps 20 --sampler dpmpp_2m --cold 0 --rounds 1
                                                      Stable Diffusion 1.5's sizes, random weights, 512 pixels

Cold is the wall time of the whole command, in a Python of its own, pictures written. Warm, both sides make
the same pictures from the same noise and hidden states of the text, with the same weights: ours by
`Pipeline.txt2img`, theirs by the loop of diffusers' StableDiffusionPipeline with its UNet2DConditionModel,
scheduler and AutoencoderKL, less the pipeline's checks and options. `difference` is the largest between
their pictures, in [-1, 1]; with `dpmpp_2m` diffusers rounds the timesteps, which shows there. The share
outside the networks is what is left of the wall time beside the UNet, the decoder and the text tower.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    ROOT,
    Clock,
    Row,
    Timing,
    alternate,
    execute,
    machine,
    make_parser,
    randomise,
    report,
    timings,
)
from ldm.config import find_config, load_config
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from sample.model import find_model
from sample.pipeline import Pipeline
from sample.speed import speed_up
from train.tasks.autoencoder import AutoencoderTaskConfig
from train.tasks.diffusion import DiffusionTaskConfig

PROMPT = "a red apple, noto emoji"
COLD_BAR = 30.0  # seconds, of the cold start
SCHEDULES = {"ddim": None, "dpmpp_2m": "sgm_uniform"}  # the noise levels of diffusers' schedulers
NETWORKS = ("unet", "decoder", "text")


def measure(args: argparse.Namespace) -> None:
    """Cold start, then warm in turns."""
    if args.cold < 0:
        raise ValueError(f"--cold must be at least 0, got {args.cold}")
    if args.quick:
        args.model, args.steps, args.cold = "random", 2, 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if args.model == "sd15":
            if args.cold:
                raise ValueError("sd15 has no file to start from; give --cold 0")
        elif args.model == "random":
            random_model("tiny" if args.quick else "emoji").save(folder)
        else:
            folder = find_model(args.model).resolve()
        described = machine(args.quick)  # before the load is our own
        rows = [cold(folder, Path(scratch), args)] if args.cold else []
        pipe = sd15_model() if args.model == "sd15" else Pipeline.load(folder, "cpu")
        rows.append(warm(pipe, args))
    columns = {
        f"{args.pictures} pictures, {args.steps} guided {args.sampler} steps": lambda row: row["what"],
        "ours, s": lambda row: row["ours"],
        "diffusers, s": lambda row: row.get("diffusers", "-"),
        "times as fast": lambda row: f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else "-",
        "outside the networks": lambda row: f"{row['ours_outside']:.1%}" if "ours_outside" in row else "-",
        "diffusers": lambda row: f"{row['diffusers_outside']:.1%}" if "diffusers_outside" in row else "-",
        "decoder, s": lambda row: f"{row['ours_decoder_seconds']:.2f}" if "difference" in row else "-",
        "diffusers' decoder, s": lambda row: (
            f"{row['diffusers_decoder_seconds']:.2f}" if "difference" in row else "-"
        ),
        "difference": lambda row: f"{row['difference']:.1e}" if "difference" in row else "-",
        "bar, s": lambda row: f"{row['bar_seconds']:g}" if "bar_seconds" in row else "-",
    }
    report("sampling", args, described, rows, columns)


def random_model(name: str) -> Pipeline:
    """A model of the sizes in the shipped configurations `name`, untrained."""
    torch.manual_seed(0)
    task = load_config(DiffusionTaskConfig, find_config(f"configs/train/{name}.yaml"))
    stage = load_config(AutoencoderTaskConfig, find_config(f"configs/train/{name}_autoencoder.yaml"))
    assert task.text is not None, "the shipped configurations read a text"
    unet, text = randomise(UNet(task.unet)), TextEncoder(task.text)
    return Pipeline(unet, AutoencoderKL(stage.autoencoder), text, task.diffusion, device="cpu")


def sd15_model() -> Pipeline:
    """Stable Diffusion 1.5's sizes, untrained."""
    torch.manual_seed(0)
    parts = (randomise(UNet(UNetConfig())), AutoencoderKL(AutoencoderConfig()), TextEncoder(TextConfig()))
    for part in parts:
        part.eval().requires_grad_(False)
    return Pipeline(*parts, DiffusionConfig(), device="cpu")


def cold(folder: Path, scratch: Path, args: argparse.Namespace) -> Row:
    """Wall seconds of `ldm-sample txt2img` from start to exit. Raises ValueError where it fails."""
    names = ("steps", "sampler", "seed", "guidance")
    options = {"-n": args.pictures, **{f"--{name}": getattr(args, name) for name in names}}
    command = [sys.executable, "-m", "sample", "txt2img", PROMPT, "--model", str(folder), "--device", "cpu"]
    command += [str(word) for option in options.items() for word in option]
    environment = dict(os.environ)
    if args.threads is not None:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    seconds = []
    for i in range(args.cold):
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--out", str(scratch / f"pictures-{i}")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise ValueError(f"ldm-sample failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    timing = Timing(seconds)
    return {
        "what": "cold start, the whole command",
        "ours_seconds": timing.median,
        "ours": str(timing),
        "ours_rounds": seconds,
        "bar_seconds": COLD_BAR,
    }


def warm(pipe: Pipeline, args: argparse.Namespace) -> Row:
    """Both sides in one process, in turns, and where their time goes."""
    from benchmarks import theirs

    unet, vae = theirs.unet(pipe.unet, share=True), theirs.autoencoder(pipe.autoencoder)
    scheduler = theirs.scheduler(pipe.schedule.config, args.sampler)
    if args.fast_conv:
        speed = argparse.Namespace(fast_conv=args.fast_conv, batch=args.pictures, n=args.pictures)
        speed.compile, speed.deep_cache, speed.token_merging = False, None, 0.0
        side = pipe.latent_shape()[1] * pipe.autoencoder.factor
        speed_up(pipe, speed, (side, side))
    clock = Clock(
        [
            *[("unet", module) for module in (pipe.network, unet)],
            *[("decoder", module) for module in (pipe.autoencoder.decoder, vae.decoder)],
            *[("text", module) for module in [pipe.text_encoder] if module is not None],
        ]
    )
    splits: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}

    def watched(name: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            clock.reset()
            images = make()
            splits[name].append(clock.seconds)
            return images

        return call

    def ours() -> Tensor:
        prompts = [PROMPT] * args.pictures
        how = {"sampler": args.sampler, "schedule": SCHEDULES[args.sampler], "batch": args.pictures}
        return pipe.txt2img(prompts, seed=args.seed, steps=args.steps, guidance=args.guidance, **how)

    def diffusers() -> Tensor:
        noise = pipe.noise(pipe.latent_shape(), *[(args.seed, "image", i) for i in range(args.pictures)])
        cond, uncond = (pipe.encode_prompts([text] * args.pictures) for text in (PROMPT, ""))
        return loop(unet, scheduler, vae, noise, torch.cat([uncond, cond]), args.steps, args.guidance)

    sides = {"ours": watched("ours", ours), "diffusers": watched("diffusers", diffusers)}
    measured = alternate(sides, args.rounds, args.warmup)
    row: Row = {"what": "warm, in one process"}
    row["difference"] = float((measured["ours"].result - measured["diffusers"].result).abs().max())
    for name, timing in measured.items():
        row |= shares(name, timing, splits[name][args.warmup :])
    return row | timings(measured["ours"], measured["diffusers"])


@torch.no_grad()
def loop(
    unet: Any, scheduler: Any, vae: Any, noise: Tensor, context: Tensor, steps: int, guidance: float
) -> Tensor:
    """Text to image with diffusers' parts; context is [uncond, cond]. Images (B, 3, H, W) in [-1, 1]."""
    from benchmarks.theirs import predict

    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        uncond, cond = predict(unet, x, t, context).chunk(2)
        prediction = uncond + guidance * (cond - uncond)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(z, return_dict=False)[0].clamp(-1, 1)


def shares(name: str, timing: Timing, splits: list[dict[str, float]]) -> Row:
    """Median seconds inside each network, and the share of the wall time that is in none."""
    rounds = list(zip(timing.seconds, splits, strict=True))
    row: Row = {
        f"{name}_{part}_seconds": median(split.get(part, 0.0) for split in splits) for part in NETWORKS
    }
    row[f"{name}_outside"] = median(1 - sum(split.values()) / wall for wall, split in rounds)
    return row


def options() -> argparse.ArgumentParser:
    parser = make_parser("sampling", "From a prompt to four pictures, beside diffusers.", rounds=5)
    parser.add_argument("--model", default="emoji", metavar="NAME|PATH|random|sd15", help="(%(default)s)")
    parser.add_argument("--pictures", type=int, default=4, help="at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="guided steps (%(default)s)")
    parser.add_argument("--sampler", default="ddim", choices=SCHEDULES, help="(%(default)s)")
    parser.add_argument("--fast-conv", type=float, default=0.0, metavar="GB", help="as of ldm-sample")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the pictures (%(default)s)")
    parser.add_argument(
        "--cold", type=int, default=3, metavar="N", help="cold starts, 0 for none (%(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
