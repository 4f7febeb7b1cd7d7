"""What `ldm-train ablate` asks finished diffusion models, so that runs of other losses can be compared."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated
from sample.pipeline import Pipeline
from sample.questions import Picture, Question, pick, read_images, read_rows
from train import levels
from train.bucketed import Ragged
from train.concat import Concat, check_channels
from train.data import DataConfig, load_images, to_float
from train.tasks.diffusion import DiffusionTaskConfig

BATCH = 16  # pictures sampled at once in an evaluation


@dataclass(frozen=True)
class Evaluation:
    """What finished diffusion models are asked; all of it is fixed by `seed` and the same for every run.

    levels: noise levels sigma, each of which gives `error@SIGMA`, that of denoising held-out images.
    guidance: scales, each of which gives `fidelity@SCALE`, the share of `captions` training captions whose
        picture is nearest to one of its concept. steps: of the DDIM sampler.
    """

    levels: tuple[float, ...] = ()
    guidance: tuple[float, ...] = ()
    captions: int = 60
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.captions < 1 or self.steps < 1:
            raise ValueError(
                f"evaluate.captions {self.captions} and evaluate.steps {self.steps} must be at least 1"
            )
        if not all(level > 0 for level in self.levels):
            raise ValueError(f"evaluate.levels must be noise levels above 0, got {list(self.levels)}")

    @property
    def metrics(self) -> list[str]:
        levels = [f"error@{level:g}" for level in self.levels]
        return levels + [f"fidelity@{scale:g}" for scale in self.guidance]


def evaluate(folder: Path, config: DiffusionTaskConfig, asked: Evaluation) -> dict[str, float]:
    """The metrics that `asked` names, of the exported model of a run."""
    pipe = Pipeline.load(folder.resolve() / "model", config.run.device)
    kind = check_channels(config.concat, pipe.unet.config, pipe.autoencoder)
    concat = Concat(config.concat, kind, pipe.autoencoder, asked.seed) if config.concat and kind else None
    values = denoising_errors(pipe, config.data, asked, concat, folder / "cache") if asked.levels else {}
    for scale in asked.guidance:
        values[f"fidelity@{scale:g}"] = fidelity(pipe, config.data, asked, scale)
    return values


@torch.no_grad()
def denoising_errors(
    pipe: Pipeline, data: DataConfig, asked: Evaluation, concat: Concat | None = None, cache: Path = Path()
) -> dict[str, float]:
    """The error of denoising held-out images by level, see `levels.py`.

    concat: makes what the network reads besides latents, a function of `asked.seed`. cache: the run's.
    """
    images = load_images(data, "heldout_image")
    if not len(images):
        raise ValueError(f"evaluate.levels needs held-out images, of which {data.path} has none")
    network: Callable[..., Tensor] = pipe.network
    source: Tensor | Ragged = images.pixels
    if concat is not None:
        network = concatenated(network)
        source = concat.source(data, cache, "heldout", images.files, images.pixels)

    def batches() -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for part, rows in enumerate(torch.arange(len(images)).split(levels.BATCH)):
            x0 = pipe.autoencoder.encode_latents(to_float(images.pixels[rows]).to(pipe.device))
            captions = [images.captions[row] if pipe.text_encoder else "" for row in rows.tolist()]
            channels = {} if concat is None else {"channels": concat(source[rows], "levels", part)}
            yield x0, {**pipe.conditioning(captions), **channels}

    denoise = Denoiser(network, pipe.schedule)
    errors = levels.denoising_errors(denoise, batches(), asked.levels, asked.seed)
    return {f"error@{level:g}": error for level, error in errors.items()}


def fidelity(pipe: Pipeline, data: DataConfig, asked: Evaluation, scale: float) -> float:
    """The share of pictures of training captions that show the concept, see `sample/evaluate.py`."""
    rows, images = pictures(data.path, pipe.latent_shape()[1] * pipe.autoencoder.factor)
    shown = [i for i, row in enumerate(rows) if row.split == "train"]
    taught = [i for i in shown if not data.concepts or rows[i].concept in data.concepts]
    queries = pick(taught, asked.captions, asked.seed)
    question = Question.ask("train", rows, shown, queries, same_style=True)
    captions = [rows[i].text for i in queries]
    samples = pipe.txt2img(captions, seed=asked.seed, steps=asked.steps, guidance=scale, batch=BATCH)
    return question.measure(images, samples)[0].right


@functools.lru_cache(maxsize=1)
def pictures(path: str, side: int) -> tuple[list[Picture], Tensor]:
    """The rows of a data set and its pictures, read once for all runs."""
    folder = Path(path).expanduser()
    rows = read_rows(folder)
    return rows, read_images(folder, rows, side)
