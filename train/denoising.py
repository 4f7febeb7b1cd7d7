"""What all tasks share that train to denoise latents, on one loss, whatever it is they train.

Pretraining (`tasks/diffusion.py`), ControlNet, LoRA, DreamBooth and textual inversion differ in the networks
and in what these are told; pictures, latents, noise, captions, loss and validation are here. One batch:
images' moments -> latents -> `diffusion_loss` -> `self.trained(x_t, t, **told)`. Every draw is a function of
(seed, step, part).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.device import pick_device
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import LossConfig, diffusion_loss, trained_timesteps
from ldm.diffusion.noising import NoiseConfig, training_noise
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import Autoencoder
from ldm.models.clip import TextEncoder
from ldm.models.unet import UNetConfig
from ldm.seeding import generator
from sample.pipeline import Pipeline
from train import bucketed
from train.bad_steps import pictures
from train.bucketed import AnyImages, Ragged, batch_rows, in_parts
from train.captions import data_key
from train.conditioning import FrozenText
from train.data import DataConfig
from train.distributed import parts_of
from train.given import fingerprint
from train.levels import BATCH, denoising_errors, within
from train.loop import RunConfig
from train.streaming import require_whole


@dataclass(frozen=True)
class PreviewConfig:
    """The preview grid: fixed prompts and seeds, so that successive grids show the same pictures improve."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0


@runtime_checkable
class DenoisingConfig(Protocol):
    """What the configuration of such a task says; see `tasks/diffusion.py` for the meanings."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def loss(self) -> LossConfig: ...
    @property
    def noise(self) -> NoiseConfig: ...
    @property
    def caption_dropout(self) -> float: ...
    @property
    def masked(self) -> bool: ...
    @property
    def validation_size(self) -> int: ...
    @property
    def validation_levels(self) -> tuple[float, ...]: ...


@dataclass
class LatentSet:
    """Of a split: posterior moments (N, z, h, w), caption ids (N, T) or classes (N,), masks (N, 1, h, w), and
    what the channels beside the latents are made of (`Concat.source`)."""

    mean: Tensor | Ragged
    std: Tensor | Ragged
    ids: Tensor | None
    masks: Tensor | Ragged | None
    source: Tensor | Ragged | None = None

    def __len__(self) -> int:
        return len(self.mean)


def check_size(data: DataConfig, unet: UNetConfig, autoencoder: Autoencoder) -> None:
    """Raises ValueError where the pictures are not of the size that the UNet is trained on."""
    latent, factor = unet.sample_size, autoencoder.factor
    if data.size != latent * factor:
        raise ValueError(
            f"data.size is {data.size}, but must be unet.sample_size times the autoencoder's factor: "
            f"{latent} x {factor} = {latent * factor}"
        )
    data.buckets.require_step(factor, unet.factor)


def of_rows(tensor: Tensor | Ragged | None, rows: Tensor) -> Tensor | None:
    """A copy of these rows of what a set may not have."""
    return None if tensor is None else tensor[rows]


class DenoisingTask:
    """The part of a task that is the same for all.

    A task sets `network` (`(x_t, t, **told) -> prediction`), `trained` (the same, maybe compiled, that
    gradients go through) and `text_encoder`, and says by `_told` what they are told. read: what makes of
    captions the numbers that a batch carries (a tokenizer, or features by caption); None: nothing is read.
    """

    network: Callable[..., Tensor]
    trained: Callable[..., Tensor]
    text_encoder: Callable[[Tensor], Tensor] | None = None
    frozen_text: FrozenText | None = None

    def __init__(self, config: DenoisingConfig, autoencoder: Autoencoder, schedule: Schedule):
        self.config = config
        self.device = pick_device(config.run.device)
        self.autoencoder, self.schedule = autoencoder, schedule
        self.images = self._images("train")
        self.data_key = data_key(self.images.files, self.images.captions)
        self.heldout_images = self._images("heldout_image", self.images)
        self.read: Callable[[list[str]], Tensor] | None = None
        self.newest: tuple[int, int, Tensor] = (-1, -1, torch.zeros(0))  # step, part, loss of each picture

    def pipeline(self) -> Pipeline:
        """The model as it stands, ready to sample; shares the weights in training."""
        raise NotImplementedError

    def _images(self, split: str, like: AnyImages | None = None) -> AnyImages:
        return bucketed.load(self.config.data, split, self.config.run.batch, like)

    @cached_property
    def data(self) -> LatentSet:
        """The training set, encoded when it is first asked for: a dry run writes no cache."""
        return self._encoded("train", self.images, len(self.images))

    @cached_property
    def heldout(self) -> LatentSet:
        return self._encoded("heldout", self.heldout_images, self.config.validation_size)

    @cached_property
    def empty(self) -> Tensor | None:
        """What a dropped caption becomes, (T,) or (); None where none is ever dropped."""
        return None if self.read is None or self.config.caption_dropout == 0 else self.read([""])[0]

    @cached_property
    def given(self) -> dict[str, str]:
        """Hashes of the files that are read and not trained, by their keys (`given.py`)."""
        frozen: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if self.frozen_text is not None:
            frozen["tower.checkpoint"] = self.frozen_text.tower
        return {key: fingerprint(module) for key, module in frozen.items()}

    def prepare(self) -> None:
        """Encode the training set; of several processes the first does it alone, and the others read it."""
        _ = self.data

    def _encoded(self, name: str, images: AnyImages, count: int) -> LatentSet:
        """The first `count` pictures of a split."""
        cache = Path(self.config.run.out) / "cache"
        pixels, files = images.pixels[:count], images.files[:count]
        mean, std = bucketed.moments(cache, name, pixels, self.autoencoder)
        ids = self.read(images.captions[:count]) if self.read else None
        weights = None
        if self.config.masked:
            weights = bucketed.masks(self.config.data, files, pixels, self.autoencoder.factor)
        return LatentSet(mean, std, ids, weights, self._source(name, files, pixels))

    def _source(self, name: str, files: list[str], pixels: Tensor | Ragged) -> Tensor | Ragged | None:
        """What `_told` needs of these pictures besides, a row a picture."""
        return None

    def _rows(self, step: int, part: int) -> Tensor:
        """Which training pictures are in this part of the batch of a step."""
        run = self.config.run
        require_whole(self.data.mean, self.data.source)
        return batch_rows(self.data.mean, run.batch, run.seed, step).chunk(parts_of(run.accumulate))[part]

    def _draw(self, data: LatentSet, rows: Tensor, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps and noise of `rows`, a function of (seed, key)."""
        rng = generator(self.config.run.seed, *key)
        z = data.mean[rows] + data.std[rows] * torch.randn(data.mean[rows].shape, generator=rng)
        x0 = self.autoencoder.scale_latents(z)
        t = torch.randint(self.schedule.num_timesteps, (len(rows),), generator=rng)
        return x0, t, torch.randn(x0.shape, generator=rng)

    def _context(self, ids: Tensor | None) -> Tensor | None:
        if self.text_encoder is None or ids is None:
            return None
        if self.frozen_text is not None:
            return self.frozen_text.context(ids).to(self.device)
        return self.text_encoder(ids.to(self.device))

    def _told(self, data: LatentSet, rows: Tensor, ids: Tensor | None, *key: int | str) -> dict[str, Tensor]:
        """What the network is told of `rows` besides x_t and t, by keyword; draws are of (seed, key)."""
        context = self._context(ids)
        return {} if context is None else {"context": context}

    def _told_to_learn(self, rows: Tensor, step: int, part: int) -> dict[str, Tensor]:
        """`_told` of training pictures, some without their captions."""
        ids = of_rows(self.data.ids, rows)
        if ids is not None and self.empty is not None:
            chance = torch.rand(len(rows), generator=generator(self.config.run.seed, "caption", step, part))
            ids[chance < self.config.caption_dropout] = self.empty
        return self._told(self.data, rows, ids, "train", step, part)

    def _told_in_rehearsal(self, images: int) -> dict[str, Tensor]:
        """As `_told`, of captions as long as the tower reads: for `rehearsal.py`."""
        if self.read is None or self.text_encoder is None:
            return {}
        if self.frozen_text is not None:
            tower = self.frozen_text.tower.config
            shape = (images, tower.context_length, tower.width)
            return {"context": torch.zeros(shape, device=self.device)}
        ids = self.read(self.images.captions[:1])
        ids = ids.new_zeros(images, *ids.shape[1:]).to(self.device)
        if isinstance(self.text_encoder, TextEncoder):
            return {"context": self.text_encoder.hidden(ids, self.text_encoder.config.skip_layers)}
        return {"context": self.text_encoder(ids)}

    def _losses(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        told: dict[str, Tensor],
        mask: Tensor | None,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, (B,)."""
        x0, noise = x0.to(self.device), noise.to(self.device)
        network = self.trained if torch.is_grad_enabled() else self.network
        return diffusion_loss(
            lambda x_t, t: network(x_t, t, **told),
            x0,
            t,
            noise,
            self.schedule,
            self.config.loss,
            perturbation=None if perturbation is None else perturbation.to(self.device),
            mask=None if mask is None else mask.to(self.device),
        )

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """Of one part of a batch, for the loop's `Player`."""
        rows = self._rows(step, part)
        x0, t, noise = self._draw(self.data, rows, "train", step, part)
        noise, perturbation = training_noise(noise, self.config.noise, self.config.run.seed, step, part)
        told = self._told_to_learn(rows, step, part)
        losses = self._losses(x0, t, noise, told, of_rows(self.data.masks, rows), perturbation)
        self.newest = (step, part, losses.detach())
        return losses.mean(), {}

    def seen(self, step: int, parts: Iterable[int]) -> str:
        """The pictures in these parts of a batch and their noise levels; where the newest loss is of one of
        the parts and not finite for some pictures, of those alone."""
        files, levels = [], []
        for part in parts:
            rows = self._rows(step, part)
            t = trained_timesteps(
                self._draw(self.data, rows, "train", step, part)[1], self.schedule, self.config.loss
            )
            bad = torch.ones_like(t, dtype=torch.bool)
            if self.newest[:2] == (step, part) and not bool(self.newest[2].isfinite().all()):
                bad = ~self.newest[2].isfinite().cpu()
            files += [self.images.files[row] for row in rows[bad].tolist()]
            levels += [f"t {at} (sigma {self.schedule.sigmas[at]:.3g})" for at in t[bad].tolist()]
        return pictures(files, levels)

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out images, each on fixed noise and a fixed timestep; and their errors by
        level, which can be compared between runs of other losses, predictions and seeds too.
        """
        if len(self.heldout) == 0:
            return {}
        losses = []
        for part, rows in enumerate(in_parts(self.heldout.mean, 64)):
            x0, t, noise = self._draw(self.heldout, rows, "validation", part)
            ids, mask = of_rows(self.heldout.ids, rows), of_rows(self.heldout.masks, rows)
            told = self._told(self.heldout, rows, ids, "validation", part)
            losses.append(self._losses(x0, t, noise, told, mask))
        return {"validation_loss": float(torch.cat(losses).mean()), **self._level_errors()}

    def _level_errors(self) -> dict[str, float]:
        """`validation_error@SIGMA` of the held-out latents, the means of their posteriors."""

        def batches() -> Iterator[tuple[Tensor, dict[str, Any]]]:
            for part, rows in enumerate(in_parts(self.heldout.mean, BATCH)):
                x0 = self.autoencoder.scale_latents(self.heldout.mean[rows].to(self.device))
                ids = of_rows(self.heldout.ids, rows)
                yield x0, self._told(self.heldout, rows, ids, "levels", part)

        levels = within(self.config.validation_levels, self.schedule)
        errors = denoising_errors(Denoiser(self.network, self.schedule), batches(), levels, seed=0)
        return {f"validation_error@{level:g}": error for level, error in errors.items()}
