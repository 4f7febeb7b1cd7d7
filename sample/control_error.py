"""Do pictures follow their hints? The control error, of training a ControlNet and of `ldm-sample evaluate`.

A picture made from a hint is annotated again, as the hint was; what the two hints are apart is the error.
Its scale is that of a model that never saw the hint, which is asked for beside it (scale 0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.metrics import line_distances
from ldm.models.controlled import Control
from ldm.models.controlnet import ControlNet
from sample.annotators import parse_annotator
from sample.images import to_pil
from sample.pipeline import Pipeline

SCALES = (0.0, 0.5, 1.0)


def hints_of(images: Float[Tensor, "N 3 H W"], annotator: str) -> UInt8[Tensor, "N 3 H W"]:
    """The hint of each image in [-1, 1]. annotator: a kind with options, as `parse_annotator` takes it."""
    annotate = parse_annotator(annotator)
    made = [torch.from_numpy(np.array(annotate(picture))) for picture in to_pil(images)]
    if not made:
        return torch.zeros(images.shape, dtype=torch.uint8)
    return rearrange(torch.stack(made), "n h w c -> n c h w").contiguous()


def control_errors(
    hints: UInt8[Tensor, "N 3 H W"], images: Float[Tensor, "N 3 H W"], annotator: str
) -> dict[str, float]:
    """Means over the pictures of what is between `hints` and those that `annotator` makes of `images`.

    error: pixels from line to line, see `line_distances`, where a hint is brighter than the middle.
    difference: mean absolute difference, 0 to 1, for hints that are no lines.
    """
    again = hints_of(images, annotator)
    lines = line_distances(hints.float().mean(dim=1) > 127.5, again.float().mean(dim=1) > 127.5)
    difference = (hints.float() - again.float()).abs().mean() / 255
    return {"error": float(lines.mean()), "difference": float(difference)}


def by_scale(
    pipe: Pipeline,
    controlnet: ControlNet,
    annotator: str,
    images: Float[Tensor, "N 3 H W"],
    captions: Sequence[str],
    scales: Sequence[float] = SCALES,
    **how: Any,
) -> dict[str, dict[str, float]]:
    """`control_errors` by scale of pictures made from captions and from the hints of `images`.

    "reconstructed": of `images` through the autoencoder alone, below which nothing can come. how: as of
    `Pipeline.txt2img`.
    """
    hints = hints_of(images, annotator)
    size = (images.shape[3], images.shape[2])
    found = {"reconstructed": control_errors(hints, reconstructed(pipe, images), annotator)}
    for scale in scales:
        controls = (Control(controlnet, hints.float() / 255, scale),)
        made = pipe.txt2img(list(captions), controls=controls, size=size, **how)
        found[f"{scale:g}"] = control_errors(hints, made, annotator)
    return found


@torch.no_grad()
def reconstructed(pipe: Pipeline, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    weight, made = pipe.autoencoder.post_quant_conv.weight, []
    for part in images.split(16):
        posterior = pipe.autoencoder.encode(part.to(weight))
        made.append(pipe.decode(pipe.autoencoder.scale_latents(posterior.mode())))
    return torch.cat(made)
