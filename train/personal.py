"""What the tasks share that teach a model a new thing from a few pictures: textual inversion, DreamBooth,
LoRA.

They differ in what is trained (`_networks`) and in what a finished run writes. The few pictures, their
captions (`subject.py`), the class's pictures (`prior.py`), the loss and its validation are here.

A step: pictures, maybe flipped -> latents; a caption for each, drawn -> tower -> UNet -> loss. Where
nothing that is trained stands in the tower, what it makes of the captions, which are finitely many, is
computed once.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.loss import LossConfig
from ldm.diffusion.noising import NoiseConfig, training_noise
from ldm.distributed import first_then_others
from ldm.models.compiled import compile_blocks
from ldm.models.tokenizer import Tokenizer
from ldm.seeding import derive, generator
from sample.images import save_grid
from train import bucketed
from train.bucketed import AnyImages, Ragged, batch_rows
from train.captions import check_captions, data_key
from train.data import DataConfig
from train.denoising import LatentSet, PreviewConfig, of_rows
from train.distributed import parts_of
from train.levels import LEVELS
from train.loop import Player, RunConfig
from train.on_model import OnModelTask
from train.prior import PriorConfig, class_pictures, combined
from train.recompute import recompute_blocks
from train.subject import Captions, SubjectConfig


@dataclass(frozen=True)
class PersonalConfig:
    """What the three commands have in common.

    data: the folder of pictures, all of which are trained on but those of another "split" in
    metadata.jsonl; one that cannot be read is an error. model: as `ldm-sample --model` takes it. subject:
    see `SubjectConfig`. prior: see `PriorConfig`. flip: how often a picture is mirrored. validation_size:
    how many noisy pictures the losses of validation are of: of the subject (fixed noise on the same
    pictures), of the class, of held-out ones. The rest as in `tasks/diffusion.py`.
    """

    data: DataConfig
    run: RunConfig
    model: str = "emoji"
    subject: SubjectConfig = field(default_factory=SubjectConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    flip: float = 0.0
    loss: LossConfig = field(default_factory=LossConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    caption_dropout: float = 0.0
    masked: bool = False
    validation_size: int = 32
    validation_levels: tuple[float, ...] = LEVELS

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1 or not 0 <= self.flip <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} and flip {self.flip} must be in 0..1")
        if self.data.buckets.on:
            raise ValueError("a few pictures are cut to squares: data.buckets.on=false")
        if self.validation_size < 0:
            raise ValueError(f"validation_size must be at least 0 pictures, got {self.validation_size}")


class PersonalTask(OnModelTask):
    """`_networks` says what is trained, `tower_moves` whether the tower gives other numbers then."""

    config: PersonalConfig
    tower_moves: bool = False

    def __init__(self, config: PersonalConfig, identifier: str = ""):
        """identifier: what the subject is called where the configuration does not say it."""
        super().__init__(config)
        unet = self.unet.config
        if unet.in_channels != unet.out_channels:
            raise ValueError(
                f"{config.model} reads {unet.in_channels - unet.out_channels} channels besides its latents; "
                "such models are taught by ldm-train diffusion with init_from and concat"
            )
        parts, self.class_batch = parts_of(config.run.accumulate), config.prior.batch or config.run.batch
        if config.prior.on and self.class_batch % parts:
            raise ValueError(
                f"prior.batch {self.class_batch} must be a multiple of the {parts} parts of a batch"
            )
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        networks = self._networks()
        images = self.images
        self.captions = Captions(config.subject, images.captions, images.concepts, images.files, identifier)
        self.class_prompts = list(config.prior.prompts) if config.prior.on else []
        if config.prior.on and not self.class_prompts:
            self.class_prompts = self.captions.of_class()
        self._check_captions()
        if not self.tower_moves:
            self.read_once([*self.captions.all, *self.class_prompts, *self._heldout_captions().all])
        self.data_key = data_key(images.files, self.captions.all)
        if config.run.activation_checkpointing:
            recompute_blocks(self.unet)
            if isinstance(self.text_encoder, nn.Module):
                recompute_blocks(self.text_encoder)
        if config.run.compile:
            self.trained = compile_blocks(self.unet)
        self.players = {"model": Player(networks, self.loss, seen=self.seen, rates=self._rates())}

    def _networks(self) -> nn.ModuleDict:
        """What is trained, ready for it: its parameters alone want gradients."""
        raise NotImplementedError

    def _rates(self) -> dict[str, float]:
        """By the name of a network, what its learning rate is of `run.lr`."""
        return {}

    def _begin(self, step: int) -> None:
        """What changes from step to step besides the weights."""

    # --- pictures and captions ------------------------------------------------------------------------------

    def _images(self, split: str, like: AnyImages | None = None) -> AnyImages:
        """Of so few pictures none is held out that is not marked, and none is left out."""
        data = replace(self.config.data, strict=True, heldout=0.0)
        return bucketed.load(data, split, self.config.run.batch, like)

    def _heldout_captions(self) -> Captions:
        images = self.heldout_images
        return Captions(
            self.config.subject, images.captions, images.concepts, images.files, self.captions.identifier
        )

    def _check_captions(self) -> None:
        if isinstance(self.base.tokenizer, Tokenizer):
            shown = self.captions.first(torch.arange(len(self.images)))
            check_captions(shown, self.images.files, self.base.tokenizer, self.config.data.path)
        elif self.base.tokenizer is not None:
            self.base.tokenizer([*self.captions.all, *self.class_prompts])  # refuses now what a step would

    def _encoded(self, name: str, images: AnyImages, count: int) -> LatentSet:
        """As it is; of training pictures, where some are flipped, all mirrored ones behind all others."""
        cache = Path(self.config.run.out) / "cache"
        pixels, files = images.pixels[:count], images.files[:count]
        weights = None
        if self.config.masked:
            weights = bucketed.masks(self.config.data, files, pixels, self.autoencoder.factor)
        assert isinstance(pixels, Tensor)
        assert not isinstance(weights, Ragged)
        if name == "train" and self.config.flip:
            pixels = torch.cat([pixels, pixels.flip(3)])
            weights = None if weights is None else torch.cat([weights, weights.flip(3)])
        mean, std = bucketed.moments(cache, name, pixels, self.autoencoder)
        return LatentSet(mean, std, None, weights)

    def _rows(self, step: int, part: int) -> Tensor:
        run = self.config.run
        return batch_rows(self.images.pixels, run.batch, run.seed, step).chunk(parts_of(run.accumulate))[part]

    @cached_property
    def class_set(self) -> tuple[LatentSet, list[str]]:
        """Latents of the class's pictures and what these are called, made when they are first asked for."""
        config, cache = self.config, Path(self.config.run.out) / "cache"
        how = (config.data.size, cache, config.model, self.model_hash, config.run.device)
        pixels, captions = class_pictures(config.prior, self.class_prompts, *how)
        if not self.tower_moves and (new := set(captions) - {*self.captions.all, *self.class_prompts}):
            assert config.prior.path, "made pictures are called by their prompts"
            self.read_once([*self.captions.all, *self.class_prompts, *sorted(new)])
        first_then_others(lambda: bucketed.moments(cache, "class", pixels, self.autoencoder))
        mean, std = bucketed.moments(cache, "class", pixels, self.autoencoder)
        return LatentSet(mean, std, None, None), captions

    def _class_rows(self, step: int, part: int) -> Tensor:
        run = self.config.run
        rows = batch_rows(self.class_set[0].mean, self.class_batch, derive(run.seed, "class"), step)
        return rows.chunk(parts_of(run.accumulate))[part]

    # --- the loss -------------------------------------------------------------------------------------------

    def _draw(self, data: LatentSet, rows: Tensor, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
        return super()._draw(data, self._flipped(rows, *key) if data is self.data else rows, *key)

    def _flipped(self, rows: Tensor, *key: int | str) -> Tensor:
        """The rows of `self.data` for these pictures, some mirrored in training."""
        if not self.config.flip or key[0] != "train":
            return rows
        chance = torch.rand(len(rows), generator=generator(self.config.run.seed, "flip", *key))
        return rows + len(self.images) * (chance < self.config.flip)

    def _told_of(
        self, captions: list[str], data: LatentSet, rows: Tensor, *key: int | str
    ) -> dict[str, Tensor]:
        """What the network is told of pictures with these captions; in training, some without theirs."""
        ids = None if self.read is None else self.read(captions)
        if ids is not None and self.empty is not None and key[0] == "train":
            chance = torch.rand(len(rows), generator=generator(self.config.run.seed, "caption", *key[1:]))
            ids[chance < self.config.caption_dropout] = self.empty
        return super()._told(data, rows, ids, *key)

    def _told(self, data: LatentSet, rows: Tensor, ids: Tensor | None, *key: int | str) -> dict[str, Tensor]:
        """Of held-out pictures, for validation."""
        return self._told_of(self._heldout_captions().first(rows), data, rows, *key)

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        config, seed = self.config, self.config.run.seed
        self._begin(step)
        rows = self._rows(step, part)
        drawn = self._draw(self.data, rows, "train", step, part)
        captions = self.captions.drawn(rows, seed, "template", step, part)
        mask = of_rows(self.data.masks, self._flipped(rows, "train", step, part))
        if config.prior.on:
            more, (others, named) = self._class_rows(step, part), self.class_set
            theirs = self._draw(others, more, "class", step, part)
            drawn = tuple(torch.cat(pair) for pair in zip(drawn, theirs, strict=True))  # type: ignore[assignment]
            captions += [named[row] for row in more.tolist()]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(more), *mask.shape[1:])])
        x0, t, noise = drawn
        noise, perturbation = training_noise(noise, config.noise, seed, step, part)
        told = self._told_of(captions, self.data, torch.arange(len(x0)), "train", step, part)
        losses = self._losses(x0, t, noise, told, mask, perturbation)
        self.newest = (step, part, losses[: len(rows)].detach())
        if not config.prior.on:
            return losses.mean(), {}
        subject, prior = losses[: len(rows)], losses[len(rows) :]
        told_apart = {"subject": subject.mean().item(), "prior": prior.mean().item()}
        return combined(subject, prior, config.prior), told_apart

    def validate(self) -> dict[str, float]:
        """Losses on fixed noise: of held-out pictures, of the subject's own, of the class's."""
        captions = self.captions.first(torch.arange(len(self.images)))
        found = {**super().validate(), **self._fixed_loss("subject", self.data, captions, len(self.images))}
        if self.config.prior.on:
            others, named = self.class_set
            found |= self._fixed_loss("prior", others, named, len(others))
        return found

    def _fixed_loss(self, name: str, data: LatentSet, captions: list[str], count: int) -> dict[str, float]:
        """`{name}_loss`: the mean over `validation_size` noisy pictures, the same ones each time."""
        losses = []
        for at, numbers in enumerate(torch.arange(self.config.validation_size).split(16)):
            rows = numbers % count
            x0, t, noise = self._draw(data, rows, name, at)
            told = self._told_of([captions[row] for row in rows.tolist()], data, rows, name, at)
            losses.append(self._losses(x0, t, noise, told, of_rows(data.masks, rows)))
        return {f"{name}_loss": float(torch.cat(losses).mean())} if losses else {}

    def rehearse(self, player: str, images: int) -> Tensor:
        size, config = self.config.data.size // self.autoencoder.factor, self.unet.config
        if self.config.prior.on:
            images += self.class_batch // parts_of(self.config.run.accumulate)
        x_t = torch.zeros(images, config.in_channels, size, size, device=self.device)
        t = torch.zeros(images, dtype=torch.int64, device=self.device)
        return self.network(x_t, t, **self._told_in_rehearsal(images)).float().square().mean()

    def preview(self, path: Path) -> None:
        preview = self.config.preview
        prompts = list(preview.prompts) or self.captions.all[:1] * 4
        how: dict[str, Any] = {"seed": preview.seed, "steps": preview.steps, "guidance": preview.guidance}
        size = self.config.data.size
        save_grid(self.pipeline().txt2img(prompts, size=(size, size), batch=16, **how), path)
