"""Train a ControlNet on a given model, which stays as it is.

Zhang et al. 2023 (arXiv:2302.05543): a copy of the UNet's way down reads a hint and steers the UNet through
convolutions that start at zero (section 3.1), on the loss of the model itself with half of the captions
dropped (section 3.3). For a long time nothing seems to happen, and then within a few hundred steps the model
follows the hint, "sudden convergence" (figure 4); the control error that validation logs shows when. The
finished run writes `controlnet.safetensors` for `ldm-sample --control`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.config import to_dict
from ldm.diffusion.loss import LossConfig
from ldm.diffusion.noising import NoiseConfig
from ldm.models.clip import TextEncoder
from ldm.models.compiled import compile_blocks
from ldm.models.controlled import Control
from ldm.models.controlnet import HINT_WIDTHS, ControlNet
from ldm.models.unet import UNet
from ldm.seeding import derive
from ldm.weights.controlnet import load_controlnet
from ldm.weights.folder import save_part
from sample.annotators import parse_annotator
from sample.control_error import control_errors
from sample.images import save_grid
from train.bucketed import Ragged, in_parts
from train.data import DataConfig
from train.denoising import LatentSet, PreviewConfig
from train.hints import HintConfig, cached_hints, drawn
from train.levels import LEVELS
from train.loop import Player, RunConfig
from train.on_model import OnModelTask
from train.recompute import recompute_blocks


@dataclass(frozen=True)
class ControlNetTaskConfig:
    """`ldm-train controlnet`.

    model: what to steer, as `ldm-sample --model` takes it. hints: see `HintConfig`. init_from: a ControlNet
    to go on from; empty copies the model's UNet. hint_widths: of the hint encoder, see `ControlNetConfig`;
    empty takes the first of Stable Diffusion's, as many as the autoencoder's factor needs.
    unlock_decoder: train the UNet's way up too, which suits data unlike the model's and wants a lower
        learning rate; the run then writes a whole model beside the ControlNet.
    caption_dropout: share of captions replaced by the empty one. controlled: how many held-out pictures
    validation samples to see whether they follow their hints, with `preview`'s seed, steps and guidance.
    The rest as in `tasks/diffusion.py`.
    """

    data: DataConfig
    run: RunConfig
    model: str = "emoji"
    hints: HintConfig = field(default_factory=HintConfig)
    init_from: str = ""
    hint_widths: tuple[int, ...] = ()
    unlock_decoder: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    caption_dropout: float = 0.5
    masked: bool = False
    validation_size: int = 128
    validation_levels: tuple[float, ...] = LEVELS
    controlled: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in 0..1, got {self.caption_dropout}")
        if self.preview.prompts:
            raise ValueError("previews of a ControlNet show held-out hints and captions: preview.prompts=[]")
        if self.controlled < 0:
            raise ValueError(f"controlled must be at least 0 pictures, got {self.controlled}")


class ControlledUNet:
    """UNet and ControlNet as one network: `(x_t, t, hint=..., context=...) -> prediction`."""

    def __init__(self, unet: UNet, controlnet: ControlNet):
        self.unet, self.controlnet = unet, controlnet

    def __call__(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        hint: Float[Tensor, "B 3 H W"],
        context: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        features = self.controlnet.encode_hint(hint)
        return self.unet(x, t, context, control=self.controlnet(x, t, context, features))


class ControlNetTask(OnModelTask):
    config: ControlNetTaskConfig

    def __init__(self, config: ControlNetTaskConfig):
        for annotator in config.hints.annotators:
            parse_annotator(annotator)  # refuses now a kind or an option that is unknown
        super().__init__(config)
        self.read_once(self.images.captions + self.heldout_images.captions)
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        self.controlnet = self._controlnet().requires_grad_(True).train()
        networks = nn.ModuleDict({"controlnet": self.controlnet})
        if config.unlock_decoder:
            networks["decoder"] = decoder_of(self.unet).requires_grad_(True)
        if config.run.activation_checkpointing:
            recompute_blocks(self.controlnet)
            recompute_blocks(self.unet)
        self.network = self.trained = ControlledUNet(self.unet, self.controlnet)
        if config.run.compile:
            self.trained = ControlledUNet(compile_blocks(self.unet), compile_blocks(self.controlnet))
        self.sharded = (self.controlnet,)
        if config.run.parallel == "fsdp" and config.unlock_decoder:
            raise ValueError("run.parallel=fsdp needs unlock_decoder=false: the model itself is not cut up")
        self.players = {"model": Player(networks, self.loss, seen=self.seen)}
        self.uncontrolled: dict[str, float] | None = None  # control error of the model itself

    def _controlnet(self) -> ControlNet:
        config, factor = self.config, self.autoencoder.factor
        if config.init_from:
            controlnet = load_controlnet(config.init_from, self.device)
        else:
            widths = config.hint_widths or HINT_WIDTHS[: factor.bit_length()]
            controlnet = ControlNet.from_unet(self.unet, hint_widths=widths)
        controlnet.config.check_fits(self.unet.config, factor)
        return controlnet

    def _source(self, name: str, files: list[str], pixels: Tensor | Ragged) -> Tensor | Ragged | None:
        cache = Path(self.config.run.out) / "cache"
        return cached_hints(cache, name, pixels, self.config.hints.annotators)

    def _told(self, data: LatentSet, rows: Tensor, ids: Tensor | None, *key: int | str) -> dict[str, Tensor]:
        assert data.source is not None
        told, hints = super()._told(data, rows, ids, *key), data.source[rows]
        varied = drawn(hints, self.config.hints, self.config.run.seed, *key) if key[0] == "train" else None
        told["hint"] = (hints[:, 0].float() / 255 if varied is None else varied).to(self.device)
        return told

    def rehearse(self, player: str, images: int) -> Tensor:
        """For `rehearsal.py`."""
        size, unet = self.config.data.size, self.unet.config
        x0 = torch.empty(images, *self.base.latent_shape((size, size)), device=self.device)
        told = {"hint": torch.empty(images, 3, size, size, device=self.device)}
        if isinstance(self.text_encoder, TextEncoder):
            told["context"] = torch.empty(
                images, self.text_encoder.config.context_length, unet.context_dim or 0, device=self.device
            )
        t = torch.zeros(images, dtype=torch.int64, device=self.device)
        return self.trained(x0, t, **told).square().mean()

    def validate(self) -> dict[str, float]:
        """Losses of held-out pictures, and how far pictures of their hints are from these."""
        if len(self.heldout) == 0 or self.config.controlled == 0:
            return super().validate()
        _, hints, made, plain = self._sampled(self.config.controlled, plain=self.uncontrolled is None)
        annotator = self.config.hints.annotators[0]

        def errors(images: Tensor) -> dict[str, float]:
            found = control_errors(hints, images, annotator)
            return {name: float(values.mean()) for name, values in found.items()}

        if plain is not None:
            self.uncontrolled = errors(plain)
        assert self.uncontrolled is not None
        return {
            **super().validate(),
            **{f"control_{name}": error for name, error in errors(made).items()},
            **{f"uncontrolled_{name}": error for name, error in self.uncontrolled.items()},
        }

    def preview(self, path: Path) -> None:
        """A row a picture: hint, what the model makes of the caption alone, what it makes of both."""
        _, hints, made, plain = self._sampled(8, plain=True)
        assert plain is not None
        rows = torch.stack([hints.float() / 127.5 - 1, plain, made], dim=1)  # (N, 3, 3, H, W)
        save_grid(rearrange(rows, "n k c h w -> (n k) c h w"), path, columns=6)

    def _sampled(
        self, count: int, plain: bool
    ) -> tuple[list[str], Tensor, Float[Tensor, "N 3 H W"], Float[Tensor, "N 3 H W"] | None]:
        """Captions, hints (uint8) and pictures of the first held-out pictures (of one shape; training ones
        where none are held out); the last without control, if `plain`."""
        held = len(self.heldout) > 0
        data, images = (self.heldout, self.heldout_images) if held else (self.data, self.images)
        rows = in_parts(data.mean, count)[0]
        assert data.source is not None
        hints, captions = data.source[rows][:, 0], [images.captions[row] for row in rows.tolist()]
        preview = self.config.preview
        how: dict[str, Any] = {"seed": preview.seed, "steps": preview.steps, "guidance": preview.guidance}
        how |= {"size": (hints.shape[3], hints.shape[2]), "batch": 16}
        pipe, control = self.pipeline(), Control(self.controlnet, hints.float() / 255)
        made = pipe.txt2img(captions, controls=(control,), **how)
        return captions, hints, made, pipe.txt2img(captions, **how) if plain else None

    def export(self, folder: Path) -> None:
        about = {
            "hints": to_dict(self.config.hints),
            "model": {"name": self.config.model, "hash": self.model_hash},
        }
        save_part(folder / "controlnet.safetensors", self.controlnet, torch.float16, **about)
        if self.config.unlock_decoder:
            self.base.save(folder)


def decoder_of(unet: UNet) -> nn.ModuleDict:
    """The UNet's way up, which a ControlNet does not copy."""
    names = ("up_blocks", "norm_out", "conv_out")
    return nn.ModuleDict({name: getattr(unet, name) for name in names})
