"""Train a latent diffusion model: frozen autoencoder, cached moments, UNet and (where there are captions)
text tower jointly.

Rombach et al. 2022 (arXiv:2112.10752), section 3.2, eq. 2 and 3; the text tower is trained from scratch
with the UNet as in the paper's text-to-image model (section 4.3.1); captions are dropped for
classifier-free guidance (Ho & Salimans 2022). One batch: images' moments -> latents -> `diffusion_loss` ->
UNet. The finished run writes a model folder for `ldm-sample`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ldm.device import pick_device, place
from ldm.diffusion.loss import LossConfig, diffusion_loss
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.seeding import derive, generator
from ldm.weights.reading import open_checkpoint
from sample.images import save_grid
from sample.model import check_fit
from sample.pipeline import Pipeline
from train.cache import cached_moments
from train.data import DataConfig, batch_indices, load_images
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
    text: the text tower; None trains an unconditional model. caption_dropout: share of captions replaced by
    the empty one. validation_size: how many held-out images the validation loss is measured on.
    """

    data: DataConfig
    run: RunConfig
    autoencoder: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig | None = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    caption_dropout: float = 0.1
    validation_size: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in 0..1, got {self.caption_dropout}")
        if self.text is None and self.unet.context_dim is not None and self.unet.attention == "transformer":
            raise ValueError("text=null trains an unconditional model, which needs unet.context_dim=null")
        if self.text is not None and self.unet.context_dim != self.text.width:
            raise ValueError(
                f"unet.context_dim {self.unet.context_dim} must equal text.width {self.text.width}"
            )


@dataclass
class LatentSet:
    """Posterior moments (N, z, h, w) and caption ids (N, T) of a split."""

    mean: Tensor
    std: Tensor
    ids: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)


class DiffusionTask:
    def __init__(self, config: DiffusionTaskConfig):
        self.config = config
        self.device = pick_device(config.run.device)
        self.autoencoder = place(
            open_checkpoint(config.autoencoder).require("autoencoder").load(), self.device
        )
        self.schedule = Schedule(config.diffusion)
        check_fit(config.unet, self.autoencoder.config, config.text.width if config.text else None)
        self._check_size()
        self.tokenizer = Tokenizer(config.text.context_length, config.text.padding) if config.text else None
        self.images = load_images(config.data, "train")
        self.heldout_images = load_images(config.data, "heldout_image")
        self.empty = self.tokenizer([""]) if self.tokenizer else None  # (1, T)
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        # Contiguous: on a CPU in bfloat16 a training step is faster than channels-last (benchmarks/unet.py).
        self.unet = UNet(config.unet).to(self.device)
        self.text_encoder = None if config.text is None else TextEncoder(config.text).to(self.device)
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

    @cached_property
    def data(self) -> LatentSet:
        """The training set, encoded when it is first asked for: a dry run writes no cache."""
        return self._encoded("train", self.images.pixels, self.images.captions)

    @cached_property
    def heldout(self) -> LatentSet:
        images, first = self.heldout_images, slice(self.config.validation_size)
        return self._encoded("heldout", images.pixels[first], images.captions[first])

    def _encoded(self, name: str, pixels: Tensor, captions: list[str]) -> LatentSet:
        mean, std = cached_moments(Path(self.config.run.out) / "cache", name, pixels, self.autoencoder)
        return LatentSet(mean, std, self.tokenizer(captions) if self.tokenizer else None)

    def _draw(self, data: LatentSet, rows: Tensor, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps and noise of `rows`, a function of (seed, key)."""
        rng = generator(self.config.run.seed, *key)
        z = data.mean[rows] + data.std[rows] * torch.randn(data.mean[rows].shape, generator=rng)
        x0 = self.autoencoder.scale_latents(z)
        t = torch.randint(self.schedule.num_timesteps, (len(rows),), generator=rng)
        return x0, t, torch.randn(x0.shape, generator=rng)

    def _losses(self, x0: Tensor, t: Tensor, noise: Tensor, ids: Tensor | None) -> Tensor:
        """The loss of each sample, (B,)."""
        context = None
        if self.text_encoder is not None and ids is not None:
            context = self.text_encoder(ids.to(self.device))
        x0, noise = x0.to(self.device), noise.to(self.device)
        return diffusion_loss(
            lambda x_t, t: self.unet(x_t, t, context), x0, t, noise, self.schedule, self.config.loss
        )

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        run = self.config.run
        rows = batch_indices(len(self.data), run.batch, run.seed, step).chunk(run.accumulate)[part]
        x0, t, noise = self._draw(self.data, rows, "train", step, part)
        ids = self.data.ids[rows] if self.data.ids is not None else None
        if ids is not None:
            chance = torch.rand(len(rows), generator=generator(run.seed, "caption", step, part))
            ids = torch.where((chance < self.config.caption_dropout)[:, None], cast(Tensor, self.empty), ids)
        return self._losses(x0, t, noise, ids).mean(), {}

    def validate(self) -> dict[str, float]:
        """Mean loss over held-out images, each on fixed noise and a fixed timestep."""
        if len(self.heldout) == 0:
            return {}
        losses = []
        for part, rows in enumerate(torch.arange(len(self.heldout)).split(64)):
            x0, t, noise = self._draw(self.heldout, rows, "validation", part)
            losses.append(
                self._losses(x0, t, noise, self.heldout.ids[rows] if self.heldout.ids is not None else None)
            )
        return {"validation_loss": float(torch.cat(losses).mean())}

    def pipeline(self) -> Pipeline:
        """The model as it stands, ready to sample; shares the weights in training."""
        return Pipeline(
            self.unet, self.autoencoder, self.text_encoder, self.config.diffusion, device=self.device
        )

    def preview(self, path: Path) -> None:
        preview = self.config.preview
        prompts = list(preview.prompts) or [""] * 4
        images = self.pipeline().txt2img(
            prompts, seed=preview.seed, steps=preview.steps, guidance=preview.guidance
        )
        save_grid(images, path)

    def export(self, folder: Path) -> None:
        self.pipeline().save(folder)
