"""Train a latent diffusion model: frozen autoencoder, cached moments, UNet and (where there are captions)
text tower jointly.

Rombach et al. 2022 (arXiv:2112.10752), section 3.2, eq. 2 and 3; the text tower is trained from scratch
with the UNet as in the paper's text-to-image model (section 4.3.1); captions are dropped for
classifier-free guidance (Ho & Salimans 2022). A table of classes may stand in for the text tower
(appendix E.2.1). One batch: images' moments -> latents -> `diffusion_loss` -> UNet. The finished run writes a
model folder for `ldm-sample`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.device import pick_device, place
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated
from ldm.diffusion.loss import LossConfig, diffusion_loss, trained_timesteps
from ldm.diffusion.noising import NoiseConfig, training_noise
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.class_embedder import ClassEmbedder, ClassEmbedderConfig, ClassTokenizer
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.compiled import compile_blocks
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.seeding import derive, generator
from ldm.weights.reading import open_checkpoint
from sample.images import save_grid
from sample.model import check_fit
from sample.pipeline import Pipeline
from train import bucketed
from train.bad_steps import pictures
from train.bucketed import AnyImages, Ragged, batch_rows, in_parts
from train.captions import check_captions, data_key
from train.columns import load_labels
from train.concat import Concat, ConcatConfig, check_channels, source_files
from train.concat import preview as preview_of_pictures
from train.conditioning import (
    FrozenText,
    TowerConfig,
    check_width,
    load_tower,
    start_from,
    trained_networks,
)
from train.data import DataConfig
from train.distributed import parts_of
from train.levels import BATCH, LEVELS, denoising_errors, within
from train.loop import Player, RunConfig
from train.recompute import recompute_blocks
from train.streaming import require_whole


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
    column "label" of metadata.jsonl). tower: a given text tower in its place, frozen by default, see
    `conditioning.py`. init_from: file or folder of a model whose weights all that is trained starts from, but
    for a tower of its own. concat: what the UNet reads besides its latents, see `concat.py`; its previews are
    of held-out pictures. caption_dropout: share of captions replaced by the empty one, and of
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
    tower: TowerConfig | None = None
    init_from: str = ""
    concat: ConcatConfig | None = None
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
        if self.run.compile and self.data.buckets.on:
            raise ValueError("data.buckets.on=true needs run.compile=false, which is for one shape")
        if self.concat is not None and self.preview.prompts:
            raise ValueError("with concat the previews show pictures with their captions: preview.prompts=[]")
        if self.tower is not None and (self.text is not None or self.classes is not None):
            raise ValueError("with a tower, which reads the captions, text=null and classes=null are needed")
        if self.classes is not None:
            self._check_classes(self.classes)
            return
        if self.tower is not None:
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
    """Of a split: posterior moments (N, z, h, w), caption ids (N, T) or classes (N,), masks (N, 1, h, w), and
    what the channels beside the latents are made of (`Concat.source`)."""

    mean: Tensor | Ragged
    std: Tensor | Ragged
    ids: Tensor | None
    masks: Tensor | Ragged | None
    source: Tensor | Ragged | None = None

    def __len__(self) -> int:
        return len(self.mean)


def of_rows(tensor: Tensor | Ragged | None, rows: Tensor) -> Tensor | None:
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
        given = None if config.tower is None else load_tower(config.tower).to(self.device)
        if config.tower is not None and given is not None:
            check_width(config.unet, given.config, config.tower.checkpoint)
        text = config.text if given is None else given.config
        context = text or config.classes
        check_fit(config.unet, self.autoencoder.config, context.width if context else None)
        self._check_size()
        kind = check_channels(config.concat, config.unet, self.autoencoder)
        self.concat: Concat | None = None
        if config.concat is not None and kind is not None:
            self.concat = Concat(config.concat, kind, self.autoencoder, config.run.seed)
        self.tokenizer: Tokenizer | ClassTokenizer | None = None
        if text is not None:
            self.tokenizer = Tokenizer(text.context_length, text.padding)
        elif config.classes is not None:
            self.tokenizer = ClassTokenizer(config.classes)
            self.tokenizer(list(config.preview.prompts))  # refuses now what the first preview would refuse
        self.images = self._images("train")
        self.data_key = data_key(self.images.files, self.images.captions)
        self.heldout_images = self._images("heldout_image", self.images)
        if isinstance(self.tokenizer, Tokenizer) and config.caption_dropout < 1:
            check_captions(self.images.captions, self.images.files, self.tokenizer, config.data.path)
        if config.concat is not None and config.concat.kind == "edit":  # refuses now what a step would refuse
            source_files(config.data, self.images.files + self.heldout_images.files)
        self.frozen_text: FrozenText | None = None
        if config.tower is not None and given is not None and config.tower.frozen:
            captions = self.images.captions + self.heldout_images.captions[: config.validation_size]
            cache = Path(config.run.out) / "cache" if config.tower.cache else None
            self.frozen_text = FrozenText(given, captions, cache)
        self.empty: Tensor | None = None
        if self.tokenizer is not None and config.caption_dropout > 0:
            self.empty = self._ids([""])[0]  # (T,) or ()
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        # Contiguous: on a CPU in bfloat16 a training step is faster than channels-last (benchmarks/unet.py).
        self.unet = UNet(config.unet).to(self.device)
        self.network = self.unet if self.concat is None else concatenated(self.unet)
        self.text_encoder: TextEncoder | ClassEmbedder | None = given
        if config.text is not None:
            self.text_encoder = TextEncoder(config.text).to(self.device)
        elif config.classes is not None:
            self.text_encoder = ClassEmbedder(config.classes).to(self.device)
        if config.init_from:
            start_from(
                config.init_from,
                self.unet,
                self.text_encoder if given is None else None,
                config.diffusion,
                more_channels=config.unet.in_channels - config.unet.out_channels,
            )
        if config.run.activation_checkpointing:
            recompute_blocks(self.unet)
            if self.text_encoder is not None:
                recompute_blocks(self.text_encoder)
        self.trained = self.network  # validation and preview have other shapes: those are never compiled
        if config.run.compile:
            compiled = compile_blocks(self.unet)  # on the same tensors
            self.trained = compiled if self.concat is None else concatenated(compiled)
        self.networks = trained_networks(self.unet, self.text_encoder)
        self.sharded = tuple(self.networks.values())
        self.players = {"model": Player(self.networks, self.loss, seen=self.seen)}
        self.newest: tuple[int, int, Tensor] = (-1, -1, torch.zeros(0))  # step, part, loss of each picture

    def _check_size(self) -> None:
        size, latent, factor = self.config.data.size, self.config.unet.sample_size, self.autoencoder.factor
        if size != latent * factor:
            raise ValueError(
                f"data.size is {size}, but must be unet.sample_size times the autoencoder's factor: "
                f"{latent} x {factor} = {latent * factor}"
            )
        self.config.data.buckets.require_step(factor, self.config.unet.factor)

    def _images(self, split: str, like: AnyImages | None = None) -> AnyImages:
        """A split of the set; where the model reads classes, their numbers are its captions."""
        images = bucketed.load(self.config.data, split, self.config.run.batch, like)
        classes = self.config.classes
        if classes is None:
            return images
        labels = load_labels(self.config.data, images.files, classes.num_classes)
        return replace(images, captions=[str(label) for label in labels])

    def _ids(self, captions: list[str]) -> Tensor:
        """What a batch carries of its captions: token ids, classes, numbers of cached features."""
        read = self.frozen_text or self.tokenizer
        assert read is not None
        return read(captions)

    @cached_property
    def data(self) -> LatentSet:
        """The training set, encoded when it is first asked for: a dry run writes no cache."""
        return self._encoded("train", self.images, len(self.images))

    @cached_property
    def heldout(self) -> LatentSet:
        return self._encoded("heldout", self.heldout_images, self.config.validation_size)

    def prepare(self) -> None:
        """Encode the training set; of several processes the first does it alone, and the others read it."""
        _ = self.data

    def _encoded(self, name: str, images: AnyImages, count: int) -> LatentSet:
        """The first `count` pictures of a split."""
        cache = Path(self.config.run.out) / "cache"
        pixels = images.pixels[:count]
        mean, std = bucketed.moments(cache, name, pixels, self.autoencoder)
        ids = self._ids(images.captions[:count]) if self.tokenizer else None
        weights = None
        if self.config.masked:
            weights = bucketed.masks(self.config.data, images.files[:count], pixels, self.autoencoder.factor)
        source = None
        if self.concat is not None:
            source = self.concat.source(self.config.data, cache, name, images.files[:count], pixels)
        return LatentSet(mean, std, ids, weights, source)

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
        told = {} if context is None else {"context": context}
        if self.concat is not None and data.source is not None:
            told["channels"] = self.concat(data.source[rows], *key).to(self.device)
        return told

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
        run, rows = self.config.run, self._rows(step, part)
        x0, t, noise = self._draw(self.data, rows, "train", step, part)
        noise, perturbation = training_noise(noise, self.config.noise, run.seed, step, part)
        ids, mask = of_rows(self.data.ids, rows), of_rows(self.data.masks, rows)
        if ids is not None and self.empty is not None:
            chance = torch.rand(len(rows), generator=generator(run.seed, "caption", step, part))
            ids[chance < self.config.caption_dropout] = self.empty
        told = self._told(self.data, rows, ids, "train", step, part)
        if self.concat is not None:
            told["channels"] = self.concat.without(told["channels"], self.config.caption_dropout, step, part)
        losses = self._losses(x0, t, noise, told, mask, perturbation)
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
        how: dict[str, Any] = {"seed": preview.seed, "steps": preview.steps, "guidance": preview.guidance}
        if self.concat is not None:
            shown, captions = self.data, self.images.captions
            if len(self.heldout):
                shown, captions = self.heldout, self.heldout_images.captions
            assert shown.source is not None
            sheet = preview_of_pictures(
                self.concat, self.pipeline(), shown.source, shown.mean, captions, **how
            )
            save_grid(sheet, path, columns=len(sheet) // 2)
            return
        sizes, pipeline = bucketed.preview_sizes(self.images), self.pipeline()
        images = [pipeline.txt2img(prompts, size=size, **how) for size in sizes]
        save_grid(bucketed.on_one_sheet(images), path, columns=len(prompts) if len(sizes) > 1 else None)

    def export(self, folder: Path) -> None:
        self.pipeline().save(folder)
