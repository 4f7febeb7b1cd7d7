"""Hints of training pictures, made by annotators, kept on disk, and varied from step to step.

Zhang et al. 2023 (ControlNet, arXiv:2302.05543, section 3.3 and supplement) train on hints whose thresholds
are random, and drop half of the captions. Here every picture has a hint by each of `annotators`, made once
and kept as the pictures' moments are; a step draws one of them and may spoil it, so that drawings with thick,
broken or missing lines are followed too. Every draw is a function of (seed, step, part).

Called by `tasks/controlnet.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from ldm.seeding import generator
from ldm.weights.io import load_weights, save_weights
from sample.control_error import hints_of
from train.bucketed import Ragged
from train.data import to_float


@dataclass(frozen=True)
class HintConfig:
    """Which hints.

    annotators: kinds as `ldm-sample annotate` knows them, with options, `canny:low=50,high=150`; a step draws
        one for each picture, validation has the first.
    dropout: share of hints that become black. thick: share whose lines grow by a pixel to every side, as a
    pen's are. erased: share from which a box, with sides of 1/4 to 3/4 of the picture's, is erased.
    """

    annotators: tuple[str, ...] = ("canny",)
    dropout: float = 0.0
    thick: float = 0.0
    erased: float = 0.0

    def __post_init__(self) -> None:
        if not self.annotators:
            raise ValueError("hints.annotators is empty; name at least one, such as canny")
        for name in ("dropout", "thick", "erased"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"hints.{name} must be in 0..1, got {getattr(self, name)}")


def cached_hints(
    folder: Path, name: str, pixels: Tensor | Ragged, annotators: Sequence[str]
) -> Tensor | Ragged:
    """Hints (N, V, 3, H, W) uint8 of `pixels`, one by each annotator; of several shapes, for each of them.

    In a file of `folder` whose name is a hash of what made it; made now where there is none. Raises
    ValueError as `parse_annotator`.
    """
    if isinstance(pixels, Ragged):
        parts = [cached_hints(folder, name, part, annotators) for part in pixels.parts]
        return Ragged([part for part in parts if isinstance(part, Tensor)], pixels.which)
    digest = hashlib.blake2b(repr((tuple(pixels.shape), list(annotators))).encode(), digest_size=16)
    for part in pixels.split(1024):
        digest.update(part.contiguous().numpy().data)
    path = folder / f"{name}-hints-{digest.hexdigest()}.safetensors"
    if not path.is_file():
        made = [annotated(pixels, annotator) for annotator in annotators]
        save_weights(path, {"hints": torch.stack(made, dim=1)})
    return load_weights(path)[0]["hints"]


def annotated(pixels: UInt8[Tensor, "N 3 H W"], annotator: str) -> UInt8[Tensor, "N 3 H W"]:
    """The hint of each picture."""
    parts = tqdm(pixels.split(64), desc=annotator, unit="batch", leave=False)
    return torch.cat([hints_of(to_float(part), annotator) for part in parts])


def drawn(hints: UInt8[Tensor, "B V 3 H W"], config: HintConfig, *key: int | str) -> Float[Tensor, "B 3 H W"]:
    """One hint of each row in [0, 1], varied as `config` says: a function of the key (seed, step, part)."""
    seed, *step = key
    rng = generator(int(seed), "hints", *step)
    which = torch.randint(hints.shape[1], (len(hints),), generator=rng)
    made = hints[torch.arange(len(hints)), which].float() / 255  # (B, 3, H, W)
    thick, erased, dropped = torch.rand(3, len(hints), 1, 1, 1, generator=rng)
    made = torch.where(thick < config.thick, F.max_pool2d(made, 3, stride=1, padding=1), made)
    boxes = random_boxes(len(hints), hints.shape[3], hints.shape[4], rng)
    made = made.masked_fill(boxes & (erased < config.erased), 0)
    return made.masked_fill(dropped < config.dropout, 0)


def random_boxes(count: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """(count, 1, height, width), True in a box with sides of 1/4 to 3/4 of the whole, anywhere inside."""
    sides = 0.25 + 0.5 * torch.rand(count, 2, generator=rng)
    start = torch.rand(count, 2, generator=rng) * (1 - sides)
    inside = []
    for axis, length in enumerate((height, width)):
        at = (torch.arange(length) + 0.5) / length
        low, high = start[:, axis, None], (start + sides)[:, axis, None]
        inside.append((low <= at) & (at < high))  # (count, length)
    return rearrange(inside[0][:, :, None] & inside[1][:, None, :], "n h w -> n 1 h w")
