"""`ldm-sample invert IMAGE [PROMPT]`: the noise that a picture comes from, and how exactly it comes back.

DDIM inversion with the prompt that describes the picture, and DDIM back to it (`inversion.py`); prints what
was lost on the way and writes the picture that came back. `--edit` goes back with another prompt.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.grids import make_grid
from ldm.diffusion.guidance import classifier_free
from ldm.metrics import psnr
from sample.cli import load_pipeline
from sample.embeddings import use
from sample.images import cover, output_folder, read_rgb, save_new, to_pil, to_tensor
from sample.img2img import fitting_size
from sample.inversion import invert_and_return
from sample.pipeline import Pipeline
from sample.recording import source
from sample.start import reads


def run(args: argparse.Namespace) -> None:
    """Print the errors and where the pictures are. Raises ValueError and OSError in one line."""
    if args.iterations < 1:
        raise ValueError(f"--iterations must be at least 1, got {args.iterations}")
    if args.edit is None and args.guidance != 1:
        raise ValueError("--guidance is for the way back to another prompt: give it with --edit")
    out, picture = output_folder(args.out), read_rgb(Path(args.init))
    pipe = load_pipeline(args)
    words = use([pipe], args, [args.prompt, args.edit or ""])
    if reads(pipe) is not None:
        raise ValueError(f"{args.model} reads more than a prompt; invert needs a model that does not")
    size = fitting_size(args, picture, pipe)
    image = to_tensor(cover(picture, size))[None]
    with torch.no_grad():
        latents = pipe.autoencoder.encode_latents(image.to(pipe.device, pipe.dtype)).float()  # the mode
    sigmas = make_grid(pipe.schedule, args.schedule, args.steps)
    with tqdm(total=2 * args.steps, unit="step", disable=None) as bar:
        inverted = invert_and_return(
            denoiser(pipe, args.prompt, 1.0),
            latents,
            sigmas,
            args.iterations,
            back=None if args.edit is None else denoiser(pipe, args.edit, args.guidance),
            decode=pipe.decode,
            progress=lambda done, _: told(bar, done),
        )
    assert inverted.psnr is not None, "decoded"
    back, first_stage = pipe.decode(inverted.back), float(psnr(pipe.decode(latents), image))
    names = ("command", "prompt", "edit", "steps", "iterations", "schedule", "guidance", "model")
    recorded: dict[str, Any] = {name: getattr(args, name) for name in names}
    recorded |= {**source(args.init, "init"), **words}
    [made] = to_pil(back)
    path = save_new(made, out, "inverted-", 4, recorded)
    if args.edit is None:
        print(
            f"{path}: there and back in 2 x {args.steps} steps the latents lose {float(inverted.rmse):.4f} "
            f"(root mean square), the picture comes back at {float(inverted.psnr):.2f} dB; the autoencoder "
            f"alone keeps it at {first_stage:.2f} dB"
        )
    else:
        noise = inverted.noise / sigmas[0].to(inverted.noise)
        print(f"{path}: from noise of mean {noise.mean():.3f} and deviation {noise.std():.3f}")


def told(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)


@torch.no_grad()
def denoiser(pipe: Pipeline, prompt: str, guidance: float | int) -> Denoise:
    """The model with a plain prompt. Inversion is exact only without guidance, which is for the way back."""

    def context(text: str) -> dict[str, Tensor]:
        silent = pipe.text_encoder is None and not text
        return {} if silent else {"context": pipe.encode_prompts([text])}

    network = Denoiser(pipe.unet, pipe.schedule, pipe.dtype)
    cond = context(prompt)
    return classifier_free(network, cond, cond if guidance == 1 else context(""), guidance)
