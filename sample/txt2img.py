"""`ldm-sample txt2img PROMPT...`: prompts to PNG files, each with all it takes to make it again, and a grid.

Follows `__main__` in the walk and goes on to `pipeline`. The pictures of a prompt come together, in the
order of the prompts; picture i of the whole call is image i of the seed. They are written batch by batch,
so that CTRL-C keeps what is done; `--preview` shows those in the making. `img2img.py` and `inpaint.py` read
their pictures and come back here; `again.py` repeats what a picture's text chunk says.
"""

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.editing import cut
from ldm.weights.folder import weights_hash
from sample.cli import load_pipeline
from sample.images import grid, output_folder, save_new, to_pil
from sample.pipeline import Pipeline, Variation, batches
from sample.preview import PREVIEW, due, make_previewer, save_preview


@dataclass(frozen=True)
class Given:
    """What a command has besides its prompts: a picture in [-1, 1] of a legal size to start from.

    options: for `Pipeline.start`, strength and exact_steps among them. painted: True where the result is
    shown, the picture's own pixels elsewhere; None is everywhere. told: what the text chunks say of all this.
    """

    image: Float[Tensor, "1 3 H W"]
    options: dict[str, Any]
    told: dict[str, Any]
    painted: Bool[Tensor, "1 H W"] | None = None

    def finish(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return images if self.painted is None else torch.where(self.painted, images, self.image)


@dataclass(frozen=True)
class Repeated:
    """What `again` repeats: the text chunk of a picture, and the number of the one picture to write.

    Where that is None, all that are made are written, and their grid.
    """

    recorded: Mapping[str, Any]
    only: int | None = None


def run(
    args: argparse.Namespace,
    repeated: Repeated | None = None,
    read: Callable[[Pipeline], Given] | None = None,
) -> None:
    """Make `args.n` pictures a prompt and say where they are. Raises ValueError and OSError in one line.

    read: gives what the command starts from, once the model is there.
    """
    if args.n < 1:
        raise ValueError(f"-n must be at least 1 picture a prompt, got {args.n}")
    if args.preview_every < 1:
        raise ValueError(f"--preview-every must be at least 1 step, got {args.preview_every}")
    if args.first < 0:
        raise ValueError(f"--first must be at least 0, got {args.first}")
    out = output_folder(args.out)
    variation = variation_of(args)
    pipe = load_pipeline(args)
    warn(pipe, args)
    given = None if read is None else read(pipe)
    preview = None if args.preview is None else make_previewer(args.preview, pipe.autoencoder, pipe.device)
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    how = {name: getattr(args, name) for name in ("negative", "seed", "steps", "sampler", "guidance", "size")}
    own = {"eta": args.eta, "schedule": args.schedule, "options": named_values(args.sampler_option or [])}
    if given is not None:
        how["size"] = (given.image.shape[3], given.image.shape[2])
    common = {**parameters(pipe, args.model, how), **more_parameters(args), **(given.told if given else {})}
    if repeated:
        tell_differences(repeated.recorded, common)
    pictures: list[Image.Image] = []
    parts = batches(len(prompts), args.batch)
    steps = args.steps
    if given is not None:
        steps = cut(args.steps, given.options["strength"], given.options["exact_steps"])[1]
    with tqdm(total=len(parts) * steps, unit="step", disable=None) as bar:  # None: only on a terminal
        for part in parts:
            those = prompts[part.start : part.stop]
            numbers = range(args.first + part.start, args.first + part.stop)
            start = None
            if given is not None:
                start = pipe.start(given.image, numbers, seed=args.seed, variation=variation, **given.options)
                latents = start.latents  # the result where no step is taken
            for step in pipe.stream(those, first=numbers[0], variation=variation, start=start, **how, **own):
                latents = step.sample
                if preview is not None and due(step.index, steps, args.preview_every):
                    save_preview(preview(step.denoised), out / PREVIEW)
                    if step.index == part.start == 0:  # told once, when it is there
                        bar.write(str(out / PREVIEW))
                bar.update()
            images = pipe.decode(latents)
            for i, picture in zip(numbers, to_pil(given.finish(images) if given else images), strict=True):
                if repeated and repeated.only not in (None, i):
                    continue
                pictures.append(picture)
                text = {"command": args.command, "prompt": those[i - numbers[0]], "image": i, **common}
                if len(those) > 1:  # whose pixels it shares the rounding of
                    text["together"] = {"first": numbers[0], "prompts": those}
                bar.write(str(save_new(picture, out, "", 5, text)))
    if len(pictures) > 1:
        columns = args.n if len(args.prompts) > 1 else None  # a row a prompt
        text = {"command": args.command, "prompts": args.prompts, "n": args.n, "batch": args.batch}
        text |= {"first": args.first, **common}
        print(save_new(grid(pictures, columns), out, "grid-", 4, text))


def named_values(pairs: Sequence[str]) -> dict[str, float | int | str]:
    """`NAME=VALUE` texts as a dict, whole numbers and numbers as such. Raises ValueError for another form."""
    values: dict[str, float | int | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--sampler-option must be like order=3, got {pair!r}")
        values[name] = value
        for kind in (float, int):  # the last that fits
            with contextlib.suppress(ValueError):
                values[name] = kind(value)
    return values


def variation_of(args: argparse.Namespace) -> Variation | None:
    """The other seed and the share of its noise. Raises ValueError where one comes without the other."""
    if (args.variation_seed is None) != (args.variation_strength is None):
        raise ValueError("--variation-seed and --variation-strength need each other")
    if args.variation_seed is None:
        return None
    if not 0 <= args.variation_strength <= 1:
        raise ValueError(f"--variation-strength must be between 0 and 1, got {args.variation_strength}")
    return args.variation_seed, args.variation_strength


def tell_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say on stderr why a picture made again may not be the same, where nobody asked for the difference."""
    told = ["versions", "init_hash", "mask_hash"] + ["weights"] * (recorded.get("model") == now["model"])
    for name in told:
        was, now_is = recorded.get(name), now.get(name)
        if was is not None and was != now_is:
            print(
                f"ldm-sample: warning: {name} differ: the picture was made with {was}, now {now_is}",
                file=sys.stderr,
            )


def more_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What is told only where it is used: a variation, how the checkpoint is read."""
    names = ("eta", "schedule", "sampler_option", "variation_seed", "variation_strength")
    told = {name: getattr(args, name) for name in names}
    told = {name: value for name, value in told.items() if value is not None}
    reading = {name: getattr(args, name) for name in READING}
    reading = {name: value for name, value in reading.items() if value not in (None, False, "auto")}
    return {**told, "reading": reading} if reading else told


READING = ("kind", "prediction", "weights", "vocabulary", "allow_nan")  # options of the checkpoint


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
