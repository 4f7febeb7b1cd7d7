"""`ldm-sample txt2img PROMPT...`: prompts to PNG files, each with all it takes to make it again, and a grid.

Follows `__main__` in the walk and goes on to `stream`. The pictures of a prompt come together, in the order
of the prompts; picture i of the whole call is image i of the seed. They are written batch by batch, so that
CTRL-C keeps what is done. The other commands that make pictures (`img2img.py`, `inpaint.py`, ...) read what
they start from and come back here; `again.py` repeats what a picture's text chunk says.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.editing import cut, require_choice, upscale_latents
from sample.arguments import prompts_of, sampling_of, weaker_of
from sample.cli import load_pipeline
from sample.depth import read_depth
from sample.embeddings import use
from sample.hints import RECORD, read_controls, read_hints, require_same, tell_sizes
from sample.images import grid, output_folder, save_new, to_pil, to_tensor
from sample.looking import Look, Looking, looking_of
from sample.loras import Called, call
from sample.parts import Parts
from sample.pipeline import Pipeline, batches
from sample.preview import PREVIEW
from sample.recording import common_parameters, tell_differences
from sample.settings import Sampling
from sample.speed import speed_up, speed_up_controls
from sample.start import Start, depth_start, reads
from sample.stream import checked_levels
from sample.words import length_told

LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Given:
    """What a command has besides its prompts.

    size: (W, H) of the pictures to make. start: numbers of pictures -> what they start from. strength,
    exact_steps: of these starts. finish: what is done to the images made, in [-1, 1].
    """

    size: tuple[int, int]
    start: Callable[[Sequence[int]], Start]
    strength: float | int = 1.0
    exact_steps: bool = False
    finish: Callable[[Tensor], Tensor] = lambda images: images


@dataclass(frozen=True)
class Repeated:
    """What `again` repeats: the text chunk of a picture, and the number of the one picture to write.

    Where that is None, all that are made are written, and (grid) their grid. dry: nothing is made, only
    checked. weak: reads the model of `--autoguide`. The last three are for `sweep`.
    """

    recorded: Mapping[str, Any]
    only: int | None = None
    dry: bool = False
    grid: bool = True
    weak: Callable[[argparse.Namespace], Parts | None] = weaker_of

    def leaves_out(self, number: int) -> bool:
        return self.only not in (None, number)


Read = Callable[[Pipeline, Sampling], Given]


def run(
    args: argparse.Namespace,
    repeated: Repeated | None = None,
    read: Read | None = None,
    pipe: Pipeline | None = None,
) -> list[Path]:
    """Make `args.n` pictures a prompt and say where they are. Raises ValueError and OSError in one line.

    read: gives what the command starts from, once the model is there. pipe: the model, where it is loaded
    already. Returns the pictures' files.
    """
    job = prepare(args, repeated or Repeated({}), read or from_noise(args), pipe)
    if job.repeated.dry:
        return []
    pipe, sampling, total = job.pipe, job.sampling, sum(steps for _, steps in job.passes)
    with tqdm(total=len(job.parts) * total, unit="step", disable=None) as bar:  # None: only on a terminal
        for part in job.parts:
            prompts, negative = [job.asked[i][0] for i in part], job.asked[part[0]][1]
            numbers, latents = [args.first + i for i in part], torch.empty(0)
            how = {**vars(sampling), "negative": negative}
            texts = job.called.start(prompts)
            with job.looking.batch(texts, sampling.wording, total) as look:
                for start_of, _ in job.passes:
                    start = start_of(numbers, latents)
                    latents = latents if start.latents is None else start.latents  # the result of no step
                    for step in pipe.stream(texts, first=numbers[0], start=start, **how):
                        latents = step.sample
                        if look.see(step) and look.done == 1 and part[0] == 0:  # told once, when it is there
                            bar.write(str(job.out / PREVIEW))
                        bar.update()
            images = job.given.finish(pipe.decode(latents, tile=args.tile))
            job.write(prompts, negative, numbers, to_pil(images), look, bar)
    job.write_grid()
    return job.files


@dataclass(frozen=True)
class Job:
    """A command ready to run: everything but the sampling itself."""

    args: argparse.Namespace
    repeated: Repeated
    pipe: Pipeline
    sampling: Sampling
    asked: list[tuple[str, str]]  # (prompt, negative prompt) of each picture
    given: Given
    passes: list["Pass"]
    looking: Looking
    out: Path
    common: dict[str, Any]  # what the text chunks of all pictures say
    called: Called
    files: list[Path] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)

    @property
    def parts(self) -> list[list[int]]:
        """The pictures that are made together: at most a batch, of one negative prompt and the same LoRAs."""

        def alike(i: int) -> tuple[object, ...]:
            prompt, negative = self.asked[i]
            return negative, self.called.of(prompt)

        runs = [list(run) for _, run in groupby(range(len(self.asked)), key=alike)]
        return [[run[i] for i in part] for run in runs for part in batches(len(run), self.args.batch)]

    def write(
        self,
        prompts: list[str],
        negative: str,
        numbers: list[int],
        made: list[Image.Image],
        look: Look,
        bar: tqdm,
    ) -> None:
        """The files of one batch, each name told."""
        for row, (number, picture) in enumerate(zip(numbers, made, strict=True)):
            if self.repeated.leaves_out(number):
                continue
            text = {
                "command": self.args.command,
                "prompt": prompts[row],
                "negative": negative,
                "image": number,
            }
            if len(prompts) > 1:  # whose pixels it shares the rounding of
                text["together"] = {"first": numbers[0], "prompts": prompts}
            path = save_new(picture, self.out, "", 5, {**text, **self.common})
            self.files.append(path)
            self.pictures.append(picture)
            for file in [path, *look.save(path, row, picture, self.sampling.wording)]:
                bar.write(str(file))

    def write_grid(self) -> None:
        """All pictures in one, a row a prompt."""
        if len(self.pictures) < 2 or not self.repeated.grid:
            return
        prompts, n = [prompt for prompt, _ in self.asked], self.args.n
        if self.args.wildcards is None:  # else each picture has a prompt of its own
            prompts = prompts[::n]
        negatives = [negative for _, negative in self.asked]
        text: dict[str, Any] = {"command": self.args.command, "prompts": prompts, "negative": negatives[0]}
        if len(set(negatives)) > 1:  # a study's or wildcards', beyond what one command line says
            text["negative"] = negatives
        text |= {"n": len(self.asked) // len(prompts), "batch": self.args.batch, "first": self.args.first}
        columns = n if len(self.asked) > n else None
        print(save_new(grid(self.pictures, columns), self.out, "grid-", 4, {**text, **self.common}))


def prepare(args: argparse.Namespace, repeated: Repeated, read: Read, pipe: Pipeline | None) -> Job:
    """Check the options, load the model, read what is given: all that can fail before any work is done."""
    if args.n < 1:
        raise ValueError(f"-n must be at least 1 picture a prompt, got {args.n}")
    if args.first < 0:
        raise ValueError(f"--first must be at least 0, got {args.first}")
    out, sampling, asked = output_folder(args.out), sampling_of(args), prompts_of(args)
    cut(1, args.hires_strength)
    require_choice("--hires-mode", args.hires_mode, HIRES_MODES)
    if args.tile is not None and args.tile < 1:
        raise ValueError(f"--tile must be at least 1 latent cell, got {args.tile}")
    hinted = read_hints(args)
    pipe = load_pipeline(args) if pipe is None else pipe
    controls, control_files = read_controls(hinted, pipe, args.allow_nan)
    guidance = replace(sampling.guide, weak=repeated.weak(args))
    sampling = replace(sampling, guidance=guidance, controls=controls)
    words = use([pipe, guidance.weak], args, [text for pair in asked for text in pair])
    called = call(pipe, args, asked)
    warn(pipe, [(called.text(prompt), negative) for prompt, negative in asked], sampling)
    given = read(pipe, sampling)
    speed_up(pipe, args, given.size)
    controls = speed_up_controls(pipe, controls, args, given.size)
    sampling = replace(sampling, size=given.size, controls=controls)
    looking = looking_of(args, pipe, out)
    common = {**common_parameters(args, pipe, given.size), **words, **called.record}
    tell_differences(repeated.recorded, common)
    if hinted:
        tell_sizes(hinted, [given.size, args.hires])
        require_same(repeated.recorded, control_files)
        common[RECORD] = control_files
    passes = passes_of(args, pipe, given, sampling)
    checked_levels(pipe, sampling, Start(strength=given.strength, exact_steps=given.exact_steps))
    return Job(args, repeated, pipe, sampling, asked, given, passes, looking, out, common, called)


# --- what is sampled ----------------------------------------------------------------------------------------

# From numbers of pictures and the latents of the pass before to what the pass starts from; its steps
Pass = tuple[Callable[[Sequence[int], Tensor], Start], int]
HIRES_MODES = ("nearest", "bilinear", "bicubic", "pixels")


def from_noise(args: argparse.Namespace) -> Read:
    """What a prompt alone starts from, and the depth that some models read."""

    def given(pipe: Pipeline, sampling: Sampling) -> Given:
        _, h, w = pipe.latent_shape(sampling.size)
        size = (w * pipe.autoencoder.factor, h * pipe.autoencoder.factor)
        if getattr(args, "depth", None) is None:
            return Given(size, lambda numbers: Start())
        depth = read_depth(Path(args.depth), size)
        return Given(size, lambda numbers: depth_start(pipe, depth, size, Start(), numbers))

    return given


def passes_of(args: argparse.Namespace, pipe: Pipeline, given: Given, sampling: Sampling) -> list[Pass]:
    """One pass, or two with `--hires`: the second starts from the enlarged result of the first."""
    steps = cut(sampling.steps, given.strength, given.exact_steps)[1]
    passes: list[Pass] = [(lambda numbers, latents: given.start(numbers), steps)]
    if args.hires is None:
        return passes
    if reads(pipe) is not None:
        raise ValueError("--hires needs a model that reads a prompt alone")
    pipe.latent_shape(args.hires)
    return [
        *passes,
        (partial(second_start, args, pipe, sampling), cut(sampling.steps, args.hires_strength)[1]),
    ]


def second_start(
    args: argparse.Namespace, pipe: Pipeline, sampling: Sampling, numbers: Sequence[int], latents: Tensor
) -> Start:
    """The result of the first pass at the size of the second."""
    _, h, w = pipe.latent_shape(args.hires)
    if args.hires_mode != "pixels":
        return Start(upscale_latents(latents, (h, w), args.hires_mode), args.hires_strength)
    small = pipe.decode(latents, tile=args.tile)
    images = torch.stack([to_tensor(picture.resize(args.hires, LANCZOS)) for picture in to_pil(small)])
    return pipe.start(
        images,
        numbers,
        strength=args.hires_strength,
        seed=sampling.seed,
        variation=sampling.variation,
    )


def warn(pipe: Pipeline, asked: Sequence[tuple[str, str]], sampling: Sampling) -> None:
    """Say on stderr what will have no effect: words beyond the model's limit, an unused negative prompt."""
    lines = []
    for prompt in dict.fromkeys(text for pair in asked for text in pair):
        if told := length_told(pipe, prompt, sampling.wording):
            lines.append(told)
    if any(negative for _, negative in asked) and sampling.guide == replace(
        sampling.guide, scale=1, rule="linear"
    ):
        lines.append("--negative has no effect with --guidance 1")
    for line in lines:
        print(f"ldm-sample: warning: {line}", file=sys.stderr)
