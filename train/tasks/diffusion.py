"""Train a latent diffusion model: frozen autoencoder, cached moments, UNet and (where there are captions)
text tower jointly.

Rombach et al. 2022 (arXiv:2112.10752), section 3.2, eq. 2 and 3; the text tower is trained from scratch
with the UNet as in the paper's text-to-image model (section 4.3.1); captions are dropped for
classifier-free guidance (Ho & Salimans 2022). A table of classes may stand in for the text tower
(appendix E.2.1). One batch: images' moments -> latents -> `diffusion_loss` -> UNet. The finished run writes a
model folder for `ldm-sample`.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.device import pick_device, place
from ldm.diffusion.editing import concatenated
from ldm.diffusion.loss import LossConfig
from ldm.diffusion.noising import NoiseConfig
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.class_embedder import ClassEmbedder, ClassEmbedderConfig, ClassTokenizer
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.compiled import compile_blocks
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.seeding import derive
from ldm.weights.reading import open_checkpoint
from sample.images import save_grid
from sample.model import check_fit
from sample.pipeline import Pipeline
from train import bucketed
from train.bucketed import AnyImages, Ragged, largest
from train.captions import check_captions
from train.columns import load_labels
from train.concat import Concat, ConcatConfig, check_channels, source_entries
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
from train.denoising import DenoisingTask, LatentSet, PreviewConfig, check_size
from train.levels import LEVELS
from train.loop import Player, RunConfig
from train.recompute import recompute_blocks
from train.sharded import building_device


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


class DiffusionTask(DenoisingTask):
    config: DiffusionTaskConfig
    unet: UNet
    text_encoder: TextEncoder | ClassEmbedder | None

    def __init__(self, config: DiffusionTaskConfig):
        device = pick_device(config.run.device)
        autoencoder = place(open_checkpoint(config.autoencoder).require("autoencoder").load(), device)
        moves = config.tower is not None and not config.tower.frozen
        where = building_device(config.run) if moves else device
        given = None if config.tower is None else load_tower(config.tower).to(where)
        if config.tower is not None and given is not None:
            check_width(config.unet, given.config, config.tower.checkpoint)
        text = config.text if given is None else given.config
        context = text or config.classes
        check_fit(config.unet, autoencoder.config, context.width if context else None)
        check_size(config.data, config.unet, autoencoder)
        kind = check_channels(config.concat, config.unet, autoencoder)
        self.concat: Concat | None = None
        if config.concat is not None and kind is not None:
            self.concat = Concat(config.concat, kind, autoencoder, config.run.seed)
        tokenizer: Tokenizer | ClassTokenizer | None = None
        if text is not None:
            tokenizer = Tokenizer(text.context_length, text.padding)
        elif config.classes is not None:
            tokenizer = ClassTokenizer(config.classes)
            tokenizer(list(config.preview.prompts))  # refuses now what the first preview would refuse
        super().__init__(config, autoencoder, Schedule(config.diffusion))
        self.read = tokenizer
        if isinstance(tokenizer, Tokenizer) and config.caption_dropout < 1:
            check_captions(self.images.captions, self.images.files, tokenizer, config.data.path)
        if config.concat is not None and config.concat.kind == "edit":  # refuses now what a step would refuse
            source_entries(config.data, self.images.files + self.heldout_images.files)
        if config.tower is not None and given is not None and config.tower.frozen:
            captions = self.images.captions + self.heldout_images.captions[: config.validation_size]
            cache = Path(config.run.out) / "cache" if config.tower.cache else None
            self.read = self.frozen_text = FrozenText(given, captions, cache)
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        # Contiguous: on a CPU in bfloat16 a training step is faster than channels-last (benchmarks/unet.py).
        self.unet = UNet(config.unet).to(building_device(config.run))
        self.network = self.unet if self.concat is None else concatenated(self.unet)
        self.text_encoder = given
        if config.text is not None:
            self.text_encoder = TextEncoder(config.text).to(building_device(config.run))
        elif config.classes is not None:
            self.text_encoder = ClassEmbedder(config.classes).to(building_device(config.run))
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

    def _images(self, split: str, like: AnyImages | None = None) -> AnyImages:
        """A split of the set; where the model reads classes, their numbers are its captions."""
        images = super()._images(split, like)
        classes = self.config.classes
        if classes is None:
            return images
        labels = load_labels(self.config.data, images.files, classes.num_classes)
        return replace(images, captions=[str(label) for label in labels])

    def _source(self, name: str, files: list[str], pixels: Tensor | Ragged) -> Tensor | Ragged | None:
        if self.concat is None:
            return None
        cache = Path(self.config.run.out) / "cache"
        return self.concat.source(self.config.data, cache, name, files, pixels)

    def _told(self, data: LatentSet, rows: Tensor, ids: Tensor | None, *key: int | str) -> dict[str, Tensor]:
        told = super()._told(data, rows, ids, *key)
        if self.concat is not None and data.source is not None:
            told["channels"] = self.concat(data.source[rows], *key).to(self.device)
        return told

    def _told_to_learn(self, rows: Tensor, step: int, part: int) -> dict[str, Tensor]:
        told = super()._told_to_learn(rows, step, part)
        if self.concat is not None:
            told["channels"] = self.concat.without(told["channels"], self.config.caption_dropout, step, part)
        return told

    def rehearse(self, player: str, images: int) -> Tensor:
        config = self.config.unet
        width, height = (side // self.autoencoder.factor for side in largest(self.images.pixels))
        x_t = torch.zeros(images, config.out_channels, height, width, device=self.device)
        told = self._told_in_rehearsal(images)
        if self.concat is not None:
            more = config.in_channels - config.out_channels
            told["channels"] = x_t.new_zeros(images, more, height, width)
        t = torch.zeros(images, dtype=torch.int64, device=self.device)
        return self.network(x_t, t, **told).float().square().mean()

    def pipeline(self) -> Pipeline:
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
