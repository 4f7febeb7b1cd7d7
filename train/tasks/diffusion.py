"""Train a latent diffusion model: frozen autoencoder, cached moments, UNet and (where there are captions)
text tower jointly.

Rombach et al. 2022 (arXiv:2112.10752), section 3.2, eq. 2 and 3; the text tower is trained from scratch
with the UNet as in the paper's text-to-image model (section 4.3.1); captions are dropped for
classifier-free guidance (Ho & Salimans 2022). A table of classes may stand in for the text tower
(appendix E.2.1). One batch: images' moments -> latents -> `diffusion_loss` -> UNet. The finished run writes a
model folder for `ldm-sample`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.device import pick_device, place
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import LossConfig, diffusion_loss
from ldm.diffusion.noising import NoiseConfig, training_noise
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.class_embedder import ClassEmbedder, ClassEmbedderConfig, ClassTokenizer
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.seeding import derive, generator
from ldm.weights.reading import open_checkpoint
from sample.images import save_grid
from sample.model import check_fit
from sample.pipeline import Pipeline
from train.cache import cached_moments
from train.columns import load_labels, load_masks
from train.data import DataConfig, Images, batch_indices, load_images
from train.levels import BATCH, LEVELS, denoising_errors, within
from train.loop import Player, RunConfig


@dataclass(frozen=True)
class PreviewConfig:
    """The preview grid: fixed prompts and seeds, so that successive grids show the same pictures improve."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class DiffusionTaskConfig:
    """`ldm-train diffusion`.

    autoencoder: file of the frozen first stage, as `ldm-train autoencoder` writes it.
    text: the text tower; None trains an unconditional model, or with `classes` a class-conditional one (the
    column "label" of metadata.jsonl). caption_dropout: share of captions replaced by the empty one, and of
    classes by the null class. masked: weigh the loss by the pictures that the column "mask" names.
    noise: in the training steps; validation has white noise, so that losses can be compared.
    validation_size: how many held-out images the validation loss is measured on. validation_levels: noise
    levels sigma at which the error of denoising them is logged as well, see `levels.py`; what lies outside
    of the schedule's levels is left out.
    """

    data: DataConfig
    run: RunConfig
    autoencoder: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig | None = field(default_factory=TextConfig)
    classes: ClassEmbedderConfig | None = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    caption_dropout: float = 0.1
    masked: bool = False
    validation_size: int = 256
    validation_levels: tuple[float, ...] = LEVELS

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in 0..1, got {self.caption_dropout}")
        if not all(0 < level < math.inf for level in self.validation_levels):
            raise ValueError(f"validation_levels must be above 0, got {list(self.validation_levels)}")
        if self.classes is not None:
            self._check_classes(self.classes)
            return
        if self.text is None and self.unet.context_dim is not None and self.unet.attention == "transformer":
            raise ValueError("text=null trains an unconditional model, which needs unet.context_dim=null")
        if self.text is not None and self.unet.context_dim != self.text.width:
            raise ValueError(
                f"unet.context_dim {self.unet.context_dim} must equal text.width {self.text.width}"
            )

    def _check_classes(self, classes: ClassEmbedderConfig) -> None:
        if self.text is not None:
            raise ValueError("a model reads captions or classes: with classes, text=null is needed")
        if self.unet.context_dim != classes.dim:
            raise ValueError(f"unet.context_dim {self.unet.context_dim} must equal classes.dim {classes.dim}")
        if classes.null_class is None and (self.caption_dropout > 0 or self.preview.guidance != 1):
            raise ValueError(
                f"caption_dropout {self.caption_dropout} and preview.guidance {self.preview.guidance} need "
                "classes.null_class; without one they must be 0 and 1"
            )


@dataclass
class LatentSet:
    """Of a split: posterior moments (N, z, h, w), caption ids (N, T) or classes (N,), masks (N, 1, h, w)."""

    mean: Tensor
    std: Tensor
    ids: Tensor | None
    masks: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)


def of_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """A copy of these rows of what a set may not have."""
    return None if tensor is None else tensor[rows]


class DiffusionTask:
    def __init__(self, config: DiffusionTaskConfig):
        self.config = config
        self.device = pick_device(config.run.device)
        self.autoencoder = place(
            open_checkpoint(config.autoencoder).require("autoencoder").load(), self.device
        )
        self.schedule = Schedule(config.diffusion)
        context = config.text or config.classes
        check_fit(config.unet, self.autoencoder.config, context.width if context else None)
        self._check_size()
        self.tokenizer: Tokenizer | ClassTokenizer | None = None
        if config.text is not None:
            self.tokenizer = Tokenizer(config.text.context_length, config.text.padding)
        elif config.classes is not None:
            self.tokenizer = ClassTokenizer(config.classes)
            self.tokenizer(list(config.preview.prompts))  # refuses now what the first preview would refuse
        self.images, self.heldout_images = self._images("train"), self._images("heldout_image")
        self.empty: Tensor | None = None
        if self.tokenizer is not None and config.caption_dropout > 0:
            self.empty = self.tokenizer([""])[0]  # (T,) or ()
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        # Contiguous: on a CPU in bfloat16 a training step is faster than channels-last (benchmarks/unet.py).
        self.unet = UNet(config.unet).to(self.device)
        self.text_encoder: TextEncoder | ClassEmbedder | None = None
        if config.text is not None:
            self.text_encoder = TextEncoder(config.text).to(self.device)
        elif config.classes is not None:
            self.text_encoder = ClassEmbedder(config.classes).to(self.device)
        self.networks = nn.ModuleDict({"unet": self.unet})
        if self.text_encoder is not None:
            self.networks["text_encoder"] = self.text_encoder
        self.players = {"model": Player(self.networks, self.loss)}

    def _check_size(self) -> None:
        size, latent, factor = self.config.data.size, self.config.unet.sample_size, self.autoencoder.factor
        if size != latent * factor:
            raise ValueError(
                f"data.size is {size}, but must be unet.sample_size times the autoencoder's factor: "
                f"{latent} x {factor} = {latent * factor}"
            )

    def _images(self, split: str) -> Images:
        """A split of the set; where the model reads classes, their numbers are its captions."""
        images, classes = load_images(self.config.data, split), self.config.classes
        if classes is None:
            return images
        labels = load_labels(self.config.data, images.files, classes.num_classes)
        return replace(images, captions=[str(label) for label in labels])

    @cached_property
    def data(self) -> LatentSet:
        """The training set, encoded when it is first asked for: a dry run writes no cache."""
        return self._encoded("train", self.images, len(self.images))

    @cached_property
    def heldout(self) -> LatentSet:
        return self._encoded("heldout", self.heldout_images, self.config.validation_size)

    def _encoded(self, name: str, images: Images, count: int) -> LatentSet:
        """The first `count` pictures of a split."""
        cache = Path(self.config.run.out) / "cache"
        mean, std = cached_moments(cache, name, images.pixels[:count], self.autoencoder)
        ids = self.tokenizer(images.captions[:count]) if self.tokenizer else None
        masks = None
        if self.config.masked:
            masks = load_masks(self.config.data, images.files[:count], self.autoencoder.factor)
        return LatentSet(mean, std, ids, masks)

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
        return self.text_encoder(ids.to(self.device))

    def _losses(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        ids: Tensor | None,
        mask: Tensor | None,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, (B,)."""
        context = self._context(ids)
        x0, noise = x0.to(self.device), noise.to(self.device)
        return diffusion_loss(
            lambda x_t, t: self.unet(x_t, t, context),
            x0,
            t,
            noise,
            self.schedule,
            self.config.loss,
            perturbation=None if perturbation is None else perturbation.to(self.device),
            mask=None if mask is None else mask.to(self.device),
        )

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        run = self.config.run
        rows = batch_indices(len(self.data), run.batch, run.seed, step).chunk(run.accumulate)[part]
        x0, t, noise = self._draw(self.data, rows, "train", step, part)
        noise, perturbation = training_noise(noise, self.config.noise, run.seed, step, part)
        ids, mask = of_rows(self.data.ids, rows), of_rows(self.data.masks, rows)
        if ids is not None and self.empty is not None:
            chance = torch.rand(len(rows), generator=generator(run.seed, "caption", step, part))
            ids[chance < self.config.caption_dropout] = self.empty
        return self._losses(x0, t, noise, ids, mask, perturbation).mean(), {}

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out images, each on fixed noise and a fixed timestep; and their errors by level,
        which are comparable between runs of other losses, predictions and seeds."""
        if len(self.heldout) == 0:
            return {}
        losses = []
        for part, rows in enumerate(torch.arange(len(self.heldout)).split(64)):
            x0, t, noise = self._draw(self.heldout, rows, "validation", part)
            ids, mask = of_rows(self.heldout.ids, rows), of_rows(self.heldout.masks, rows)
            losses.append(self._losses(x0, t, noise, ids, mask))
        return {"validation_loss": float(torch.cat(losses).mean()), **self._level_errors()}

    def _level_errors(self) -> dict[str, float]:
        """`validation_error@SIGMA` of the held-out latents, the means of their posteriors."""

        def batches() -> Iterator[tuple[Tensor, dict[str, Any]]]:
            for rows in torch.arange(len(self.heldout)).split(BATCH):
                x0 = self.autoencoder.scale_latents(self.heldout.mean[rows].to(self.device))
                context = self._context(of_rows(self.heldout.ids, rows))
                yield x0, {} if context is None else {"context": context}

        levels = within(self.config.validation_levels, self.schedule)
        errors = denoising_errors(Denoiser(self.unet, self.schedule), batches(), levels, seed=0)
        return {f"validation_error@{level:g}": error for level, error in errors.items()}

    def pipeline(self) -> Pipeline:
        """The model as it stands, ready to sample; shares the weights in training."""
        return Pipeline(
            self.unet, self.autoencoder, self.text_encoder, self.config.diffusion, device=self.device
        )

    def preview(self, path: Path) -> None:
        preview = self.config.preview
        prompts = list(preview.prompts) or [""] * 4
        if self.config.classes is not None and not preview.prompts:
            prompts = [str(number) for number in range(min(4, self.config.classes.num_classes))]
        images = self.pipeline().txt2img(
            prompts, seed=preview.seed, steps=preview.steps, guidance=preview.guidance
        )
        save_grid(images, path)

    def export(self, folder: Path) -> None:
        self.pipeline().save(folder)
