"""Prior preservation (DreamBooth, Ruiz et al. 2023, arXiv:2208.12242, section 3.3): pictures of the class
that the model itself makes before it is taught, shown again in every step, so that it does not forget the
class.

    L = mean of the subject's losses + weight * mean of the class's losses        normalisation "sum"
    L = (sum of the subject's + weight * sum of the class's) / number of both     normalisation "mean"

Paper, XavierXiao's code and diffusers have the first, kohya's scripts the second. The pictures are made
once, by all processes of a job, and kept in the run folder's cache; a function of model, prompts and
settings.

What is preserved is what the pictures show. Drawn with guidance they are more of the class than the model's
own distribution, and whoever then draws the class with guidance exaggerates it twice: guidance 1 keeps the
class as it is (measured in `configs/ablations/personalise.md`), with a model that draws well without.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from ldm.device import pick_device
from ldm.distributed import is_first, share, together
from sample.images import save_png, to_pil
from sample.pipeline import Pipeline
from train.data import DataConfig, load_images, read_image

NORMALISATIONS = ("sum", "mean")
AT_ONCE = 8  # pictures; the same batches whatever the number of processes


@dataclass(frozen=True)
class PriorConfig:
    """weight: of the class's loss; 0 is without prior preservation. count: how many pictures of the class.
    batch: how many a step sees, of all processes together; 0 is as many as of the subject. normalisation:
    "sum" or "mean", see above. path: a folder of such pictures, instead of making them. prompts: what they
    are called, in turn; empty says it by the subject's templates with its noun alone. seed, steps,
    guidance, sampler: of making them.
    """

    weight: float = 0.0
    count: int = 100
    batch: int = 0
    normalisation: str = "sum"
    path: str = ""
    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 50
    guidance: float = 5.0
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"prior.weight must be at least 0, got {self.weight}")
        if self.count < 1 or self.batch < 0 or self.steps < 1:
            raise ValueError(
                f"prior.count {self.count} and prior.steps {self.steps} must be at least 1, prior.batch "
                f"{self.batch} at least 0"
            )
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"prior.normalisation must be 'sum' or 'mean', got {self.normalisation!r}")

    @property
    def on(self) -> bool:
        return self.weight > 0


def combined(
    subject: Float[Tensor, " B"], prior: Float[Tensor, " P"], config: PriorConfig
) -> Float[Tensor, ""]:
    """The loss of a step from those of its pictures."""
    if config.normalisation == "sum":
        return subject.mean() + config.weight * prior.mean()
    return (subject.sum() + config.weight * prior.sum()) / (len(subject) + len(prior))


def class_pictures(
    config: PriorConfig,
    prompts: list[str],
    size: int,
    cache: Path,
    model: str,
    model_hash: str,
    device: str,
) -> tuple[UInt8[Tensor, "N 3 H W"], list[str]]:
    """Pictures of the class, `size` large, and their captions. All processes must ask together.

    Raises ValueError for a folder without pictures, and for one that cannot be read.
    """
    if config.path:
        given = load_images(DataConfig(config.path, size, strict=True, heldout=0.0))
        named = [caption or prompts[i % len(prompts)] for i, caption in enumerate(given.captions)]
        return given.pixels[: config.count], named[: config.count]
    told = (model_hash, prompts, size, config.seed, config.steps, config.guidance, config.sampler)
    folder = cache / f"class-{hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()}"
    files = [folder / f"{number:05d}.png" for number in range(config.count)]
    captions = [prompts[number % len(prompts)] for number in range(config.count)]
    with together():
        make_missing(config, captions, size, files, model, device)
    return torch.stack([read_image(file, size) for file in files]), captions


def make_missing(
    config: PriorConfig, captions: list[str], size: int, files: list[Path], model: str, device: str
) -> None:
    """Make this process's share of the pictures, where they are not there already."""
    own = share(len(files), AT_ONCE)
    batches = [range(at, min(at + AT_ONCE, own.stop)) for at in range(own.start, own.stop, AT_ONCE)]
    missing = [batch for batch in batches if not all(files[number].is_file() for number in batch)]
    if not missing:
        return
    how: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "steps", "guidance", "sampler")}
    kind = pick_device(device).type
    # A model of its own, as the one in training may have changed; and no draw of training is another for it
    with torch.random.fork_rng([]), torch.autocast(kind, enabled=False), torch.no_grad():
        base = Pipeline.load(model, device=device)
        bar = tqdm(missing, "making class pictures", unit="batch", disable=not is_first(), leave=False)
        for batch in bar:
            prompts = [captions[number] for number in batch]
            made = base.txt2img(prompts, first=batch.start, batch=AT_ONCE, size=(size, size), **how)
            for number, picture in zip(batch, to_pil(made), strict=True):
                told = {"prompt": captions[number], "model": model, **how, "image": number}
                save_png(picture, files[number], told)
