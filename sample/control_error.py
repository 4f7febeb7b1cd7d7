"""Do pictures follow their hints? The control error, of training a ControlNet and of `ldm-sample evaluate`.

A picture made from a hint is annotated again, as the hint was; what the two hints are apart is the error.
Its scale is that of a model that never saw the hint, which is asked for beside it (scale 0).
"""

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.metrics import line_distances
from sample.annotators import parse_annotator
from sample.images import to_pil
from sample.pipeline import Pipeline


def hints_of(images: Float[Tensor, "N 3 H W"], annotator: str) -> UInt8[Tensor, "N 3 H W"]:
    """The hint of each image in [-1, 1]. annotator: a kind with options, as `parse_annotator` takes it."""
    annotate = parse_annotator(annotator)
    made = [torch.from_numpy(np.array(annotate(picture))) for picture in to_pil(images)]
    if not made:
        return torch.zeros(images.shape, dtype=torch.uint8)
    return rearrange(torch.stack(made), "n h w c -> n c h w").contiguous()


def control_errors(
    hints: UInt8[Tensor, "N 3 H W"], images: Float[Tensor, "N 3 H W"], annotator: str
) -> dict[str, Float[Tensor, " N"]]:
    """What is between each of `hints` and that which `annotator` makes of its image in [-1, 1].

    error: pixels from line to line, see `line_distances`, where a hint is brighter than the middle.
    difference: mean absolute difference, 0 to 1, for hints that are no lines.
    """
    again = hints_of(images, annotator)
    lines = line_distances(hints.float().mean(dim=1) > 127.5, again.float().mean(dim=1) > 127.5)
    return {"error": lines, "difference": (hints.float() - again.float()).abs().mean(dim=(1, 2, 3)) / 255}


@torch.no_grad()
def reconstructed(pipe: Pipeline, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Through the autoencoder and back: below the error of these no picture can come, but by chance."""
    weight, made = pipe.autoencoder.post_quant_conv.weight, [images[:0]]
    for part in images.split(16) if len(images) else ():
        posterior = pipe.autoencoder.encode(part.to(weight))
        made.append(pipe.decode(pipe.autoencoder.scale_latents(posterior.mode())))
    return torch.cat(made)
