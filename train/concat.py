"""What a UNet is given beside its noised latents in training: a masked picture, a small one, one to edit.

Rombach et al. 2022 (arXiv:2112.10752, sections 3.3, 4.4, 4.5) concatenate it to the input. The channels are
made as `ldm-sample inpaint`, `upscale` and `instruct` make them (`ldm/diffusion/editing.py`), so that what is
trained here runs there. Every draw is a function of (seed, step, part), as all of training.

inpainting      Of each picture at each step a new mask, and the latents of the picture without what is under
                it. These cannot be kept on disk, a mask being drawn once: the encoder runs in every step, as
                in the original; in exchange no mask is ever learned by heart.
low_resolution  Each picture made small and bad at each step, one pixel a latent cell. No encoder runs.
edit            A picture of the set's column "source", which the picture shows edited; its latents
                (the posterior's mode, unscaled) are encoded once and kept as those of the pictures are.

Called by `tasks/diffusion.py`.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from ldm.diffusion.editing import (
    inpainting_channels,
    instruct_channels,
    masked_picture,
    superresolution_channels,
)
from ldm.models.autoencoder import Autoencoder
from ldm.models.unet import UNetConfig
from ldm.seeding import generator
from sample.extra_channels import EXTRAS, extra_of
from sample.images import to_pil, to_tensor
from sample.model import reads_text
from sample.pipeline import Pipeline
from sample.start import Start
from train.bucketed import Ragged, beside, in_parts, moments
from train.buckets import Shape
from train.columns import picture_column, place_of
from train.data import DataConfig, to_float
from train.entries import Entry
from train.reading import read_picture, to_pixels

KINDS = ("inpainting", "low_resolution", "edit")
DEGRADATIONS = ("bicubic", "camera")


@dataclass(frozen=True)
class ConcatConfig:
    """What is concatenated.

    kind: "inpainting" (of models with a text as Stable Diffusion's, without as the paper's own), "edit" (with
        a text, InstructPix2Pix) or "low_resolution" (without one).
    dropout: share of steps in which an edit model sees zeros for the picture: what `--image-guidance` needs.
    everywhere: share of masks that cover all of the picture; a quarter in Stable Diffusion's.
    degradation: how a picture is made small: "bicubic", or "camera", which blurs it before and adds noise
        and JPEG artefacts after, each of random strength.
    """

    kind: str
    dropout: float = 0.0
    everywhere: float = 0.25
    degradation: str = "camera"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"concat.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.degradation not in DEGRADATIONS:
            known = " or ".join(map(repr, DEGRADATIONS))
            raise ValueError(f"concat.degradation must be {known}, got {self.degradation!r}")
        for name in ("dropout", "everywhere"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"concat.{name} must be in 0..1, got {getattr(self, name)}")
        if self.dropout and self.kind != "edit":
            raise ValueError(f"concat.dropout is for concat.kind=edit; {self.kind} has none, set it to 0")


def check_channels(config: ConcatConfig | None, unet: UNetConfig, autoencoder: Autoencoder) -> str | None:
    """The key in `EXTRAS` of what the UNet reads besides; None where that is nothing, and so is `config`.

    Raises ValueError where the UNet's channels are not those of `config.kind`.
    """
    if config is None:
        if unet.in_channels != unet.out_channels:
            raise ValueError(
                f"unet.in_channels {unet.in_channels} are more than the latents' {unet.out_channels}: say "
                f"what the others are by concat.kind={'|'.join(KINDS)}"
            )
        return None
    text = reads_text(unet)
    if text != (config.kind == "edit") and config.kind != "inpainting":
        raise ValueError(
            f"concat.kind={config.kind} is for a model {'without' if text else 'with'} a text: what samples "
            "it (ldm-sample instruct, upscale) wants it so"
        )
    kinds = {"edit": "instruct", "low_resolution": "superresolution"}
    kind = kinds.get(config.kind, "inpainting" if text else "ldm_inpainting")
    latents = autoencoder.config.latent_channels
    wanted = latents + EXTRAS[kind].channels(latents)
    if unet.in_channels != wanted:
        raise ValueError(
            f"concat.kind={config.kind}: the UNet reads {latents} channels of latents and "
            f"{wanted - latents} of {EXTRAS[kind].what}; unet.in_channels must be {wanted}, not "
            f"{unet.in_channels}"
        )
    if (taken := extra_of(unet, autoencoder.config)) != kind:  # of two kinds with as many channels the first
        raise ValueError(
            f"concat.kind={config.kind} cannot be told from {taken} with {latents} channels of latents: "
            "sampling would take it for that; take a first stage of another number"
        )
    return kind


class Concat:
    """Makes the channels of a batch. kind: a key of `EXTRAS`."""

    def __init__(self, config: ConcatConfig, kind: str, autoencoder: Autoencoder, seed: int):
        self.config, self.kind, self.autoencoder, self.seed = config, kind, autoencoder, seed

    def source(
        self, data: DataConfig, cache: Path, name: str, files: list[str], pixels: Tensor | Ragged
    ) -> Tensor | Ragged:
        """What the channels of a split are made of, a row a picture: pixels (uint8), or latents to edit.

        Raises ValueError as `source_entries`, and for one that is no picture.
        """
        if self.config.kind != "edit":
            return pixels
        sources = beside(source_entries(data, files), pixels, read_sources)
        return moments(cache, f"{name}-source", sources, self.autoencoder)[0]

    @torch.no_grad()
    def __call__(self, source: Tensor, *key: int | str) -> Float[Tensor, "B D h w"]:
        """Channels of these rows, a function of (seed, key), on the autoencoder's device and in float32."""
        rng = generator(self.seed, "concat", *key)
        device = self.autoencoder.post_quant_conv.weight.device
        if self.config.kind == "edit":
            return instruct_channels(source).to(device)
        images = to_float(source)
        if self.config.kind == "low_resolution":
            small = smaller(images, self.autoencoder.factor, self.config.degradation, rng)
            return superresolution_channels(small).to(device)
        mask = random_masks(len(images), images.shape[-2:], self.config.everywhere, rng)
        with torch.autocast(device.type, enabled=False):  # as the cached moments are
            posterior = self.autoencoder.encode(masked_picture(images, mask, self.kind).to(device))
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        masked = self.autoencoder.scale_latents(posterior.sample(noise))
        return inpainting_channels(mask.to(device), masked, self.kind)

    def without(
        self, channels: Float[Tensor, "B D h w"], caption_dropout: float | int, *key: int | str
    ) -> Float[Tensor, "B D h w"]:
        """The channels with `config.dropout` of the rows at zero, a function of (seed, key).

        As in InstructPix2Pix one number u of each row, that of caption dropout, decides on both: the caption
        goes where u < d = caption_dropout, the picture where d / 2 <= u < d / 2 + dropout. At 0.1 and 0.1
        either is missing alone in 5 % of the rows, and both in 5 %.
        """
        if not self.config.dropout:
            return channels
        u = torch.rand(len(channels), generator=generator(self.seed, "caption", *key))
        low = caption_dropout / 2
        gone = (low <= u) & (u < low + self.config.dropout)
        return channels.masked_fill(gone.to(channels.device)[:, None, None, None], 0)


def source_entries(data: DataConfig, files: list[str]) -> list[Entry]:
    """Where the pictures of column "source" of `files` stand, none opened.

    Raises ValueError where one is missing, and as `columns.picture_column`.
    """
    entries = []
    for file, entry in zip(files, picture_column(data, "source", files) if files else [], strict=True):
        if entry is None:
            raise ValueError(f"{place_of(data)}: {file} has no source, the picture that it is an edit of")
        if not entry.stored and not entry.path.is_file():
            raise ValueError(f"{entry.path}: no such file, the source of {file}")
        entries.append(entry)
    return entries


def read_sources(sources: list[Entry], shape: Shape) -> UInt8[Tensor, "N 3 H W"]:
    """Pictures cut and resized to `shape` (W, H), as those are that they were edited to."""
    pictures = [read_picture(entry, shape) for entry in sources]
    return to_pixels(pictures) if pictures else torch.zeros(0, 3, shape[1], shape[0], dtype=torch.uint8)


def preview(
    concat: Concat,
    pipeline: Pipeline,
    source: Tensor | Ragged,
    mean: Tensor | Ragged,
    captions: list[str],
    **how: Any,
) -> Float[Tensor, "N2 3 H W"]:
    """The first four pictures (of one bucket) as the autoencoder keeps them, then as the model makes them of
    their channels and captions. mean: of their posteriors. how: fields of `Sampling`."""
    rows = in_parts(source, 4)[0]
    channels = concat(source[rows], "preview").to(pipeline.device)
    factor = pipeline.autoencoder.factor
    size = (channels.shape[3] * factor, channels.shape[2] * factor)
    text = reads_text(pipeline.unet.config)
    prompts = [captions[row] if text else "" for row in rows.tolist()]
    *_, last = pipeline.stream(prompts, start=Start(channels=channels), size=size, **how)
    kept = pipeline.autoencoder.scale_latents(mean[rows].to(pipeline.device))
    return torch.cat([pipeline.decode(kept), pipeline.decode(last.sample)])


# --- masks --------------------------------------------------------------------------------------------------


def random_masks(
    count: int, size: tuple[int, ...], everywhere: float | int, rng: torch.Generator
) -> Bool[Tensor, "count 1 H W"]:
    """Masks of `size` (H, W), True where there is nothing to see: all of it, boxes, or strokes of a brush.

    After LaMa (Suvorov et al. 2021, arXiv:2109.07161), whose masks both inpainting models were trained with,
    of simpler make: with probability `everywhere` all; else by halves 1 to 3 boxes with sides of 1/8 to 5/8
    of the picture's, or a stroke of 2 to 5 straight lines with a width of 1/16 to 1/4 of it. Never empty.
    """
    masks = torch.zeros(count, 1, *size, dtype=torch.bool)
    for mask in masks:
        kind, number = torch.rand(2, generator=rng).tolist()
        if kind < everywhere:
            mask[:] = True
        elif kind < everywhere + (1 - everywhere) / 2:
            for box in torch.rand(1 + int(3 * number), 4, generator=rng):
                mask |= _box(size, *box.tolist())
        else:
            corners = torch.rand(3 + int(4 * number), 2, generator=rng) * torch.tensor(size)
            width = (1 / 16 + 3 / 16 * float(torch.rand((), generator=rng))) * min(size)
            mask |= _strokes(size, corners, width)
    return masks


def _box(size: tuple[int, ...], top: float, left: float, height: float, width: float) -> Bool[Tensor, "h w"]:
    """A box, of which the numbers in [0, 1) say place and size; all of it lies in the picture."""
    spans = []
    for side, at, share in zip(size, (top, left), (height, width), strict=True):
        length = max(1, round((1 / 8 + share / 2) * side))
        start = int(at * (side - length + 1))
        spans.append(slice(start, start + length))
    box = torch.zeros(*size, dtype=torch.bool)
    box[spans[0], spans[1]] = True
    return box


def _strokes(size: tuple[int, ...], corners: Float[Tensor, "P 2"], width: float) -> Bool[Tensor, "h w"]:
    """The pixels whose centres are within width / 2 of the lines from corner to corner."""
    at = [torch.arange(side) + 0.5 for side in size]
    points = torch.stack(torch.meshgrid(at, indexing="ij"), dim=-1)[None]  # (1, h, w, 2)
    starts, ends = corners[:-1, None, None], corners[1:, None, None]  # (P - 1, 1, 1, 2)
    along = ends - starts
    share = ((points - starts) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    nearest = starts + share.clamp(0, 1)[..., None] * along
    return ((points - nearest).square().sum(-1).sqrt() <= max(width / 2, math.sqrt(0.5))).any(dim=0)


# --- small pictures -----------------------------------------------------------------------------------------


def smaller(
    images: Float[Tensor, "B 3 H W"], factor: int, degradation: str, rng: torch.Generator
) -> Float[Tensor, "B 3 h w"]:
    """Pictures in [-1, 1] with sides `factor` times shorter, in whole steps of 1/255 as a file has them.

    "bicubic": with antialiasing. "camera": before it a blur of deviation 0 to 1/2 of the factor, after it
    white noise of deviation 0 to 0.1 and, in every second picture, JPEG of quality 50 to 95: the steps of
    BSRGAN (Zhang et al. 2021, arXiv:2103.14006), which the paper's model for degraded pictures was trained
    with, each once and in a fixed order.
    """
    strength = torch.rand(len(images), 4, generator=rng) if degradation == "camera" else None
    if strength is not None:
        images = torch.cat(
            [_blurred(image[None], s * factor / 2) for image, s in _pairs(images, strength, 0)]
        )
    size = (images.shape[-2] // factor, images.shape[-1] // factor)
    small = F.interpolate(images, size, mode="bicubic", antialias=True)
    if strength is not None:
        noise = torch.randn(small.shape, generator=rng)
        small = small + 0.1 * strength[:, 1, None, None, None] * noise
    small = small.clamp(-1, 1)
    pictures = to_pil(small)
    if strength is not None:
        for index, (jpeg, quality) in enumerate(strength[:, 2:].tolist()):
            if jpeg < 0.5:
                pictures[index] = _through_jpeg(pictures[index], 50 + int(46 * quality))
    return torch.stack([to_tensor(picture) for picture in pictures])


def _pairs(images: Tensor, strength: Tensor, column: int) -> list[tuple[Tensor, float]]:
    return list(zip(images, strength[:, column].tolist(), strict=True))


def _blurred(image: Float[Tensor, "1 3 H W"], deviation: float) -> Float[Tensor, "1 3 H W"]:
    """Gaussian blur, edges repeated; none below a tenth of a pixel."""
    radius = math.ceil(3 * deviation)
    if deviation < 0.1:
        return image
    at = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (at / deviation).square())
    kernel = (kernel / kernel.sum()).repeat(3, 1)  # (3, K)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, None, None], groups=3), kernel[:, None, :, None], groups=3)


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
