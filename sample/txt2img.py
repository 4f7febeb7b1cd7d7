"""`ldm-sample txt2img PROMPT...`: prompts to PNG files, each with all it takes to make it again, and a grid.

Follows `__main__` in the walk and goes on to `pipeline`. The pictures of a prompt come together, in the
order of the prompts; picture i of the whole call is image i of the seed. They are written batch by batch,
so that CTRL-C keeps what is done; `--preview` shows those in the making.
"""

import argparse
import importlib.metadata
import sys
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.weights.folder import weights_hash
from sample.cli import load_pipeline
from sample.images import grid, output_folder, save_new, to_pil
from sample.pipeline import Pipeline, batches
from sample.preview import PREVIEW, due, make_previewer, save_preview


def run(args: argparse.Namespace) -> None:
    """Make `args.n` pictures a prompt and say where they are. Raises ValueError and OSError in one line."""
    if args.n < 1:
        raise ValueError(f"-n must be at least 1 picture a prompt, got {args.n}")
    if args.preview_every < 1:
        raise ValueError(f"--preview-every must be at least 1 step, got {args.preview_every}")
    out = output_folder(args.out)
    pipe = load_pipeline(args)
    warn(pipe, args)
    preview = None if args.preview is None else make_previewer(args.preview, pipe.autoencoder, pipe.device)
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    how = {name: getattr(args, name) for name in ("negative", "seed", "steps", "sampler", "guidance", "size")}
    common = parameters(pipe, args.model, how)
    pictures: list[Image.Image] = []
    parts = batches(len(prompts), args.batch)
    with tqdm(total=len(parts) * args.steps, unit="step", disable=None) as bar:  # None: only on a terminal
        for part in parts:
            for step in pipe.stream(prompts[part.start : part.stop], first=part.start, **how):
                latents = step.sample
                if preview is not None and due(step.index, args.steps, args.preview_every):
                    save_preview(preview(step.denoised), out / PREVIEW)
                    if step.index == part.start == 0:  # told once, when it is there
                        bar.write(str(out / PREVIEW))
                bar.update()
            for i, picture in zip(part, to_pil(pipe.decode(latents)), strict=True):
                pictures.append(picture)
                text = {"command": "txt2img", "prompt": prompts[i], "image": i, **common}
                bar.write(str(save_new(picture, out, "", 5, text)))
    if len(pictures) > 1:
        columns = args.n if len(args.prompts) > 1 else None  # a row a prompt
        text = {"command": "txt2img", "prompts": args.prompts, "n": args.n, **common}
        print(save_new(grid(pictures, columns), out, "grid-", 4, text))


def parameters(pipe: Pipeline, model: str, how: dict[str, Any]) -> dict[str, Any]:
    """What all pictures of a call have in common, JSON-ready, for their text chunks."""
    _, h, w = pipe.latent_shape(how["size"])
    return {
        **how,
        "size": [w * pipe.autoencoder.factor, h * pipe.autoencoder.factor],
        "model": model,
        "weights": weights_hash(pipe.checkpoint.files) if pipe.checkpoint else "",
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of torch and of this package ("unknown" where it runs without being installed)."""
    try:
        own = importlib.metadata.version("latent-diffusion-from-scratch")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {"torch": torch.__version__, "latent-diffusion-from-scratch": own}


def warn(pipe: Pipeline, args: argparse.Namespace) -> None:
    """Say on stderr what will have no effect: words beyond the model's limit, an unused negative prompt."""
    lines = []
    for prompt in [*args.prompts, args.negative]:
        if pipe.tokenizer is not None and (cut := pipe.tokenizer.cut(prompt)):
            limit = pipe.tokenizer.context_length
            lines.append(f"prompt {prompt[:40]!r} exceeds the model's {limit} tokens; not read: {cut!r}")
    if args.negative and args.guidance == 1:
        lines.append("--negative has no effect with --guidance 1")
    for line in lines:
        print(f"ldm-sample: warning: {line}", file=sys.stderr)
