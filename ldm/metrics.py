"""Measures of pictures, as functions of tensors: PSNR, and which picture of a set is nearest to another.

Used by the autoencoder's training and by `ldm-sample evaluate`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def psnr(images: Float[Tensor, "B C H W"], reconstructions: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each picture in dB, 10 log10(2^2 / MSE), both clamped to [-1, 1]."""
    error = (images.clamp(-1, 1) - reconstructions.float().clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp(min=1e-10))


def thumbnails(images: Float[Tensor, "N C H W"], side: int = 16) -> Float[Tensor, "N D"]:
    """Pictures averaged down to `side` x `side`, as flat vectors: what is left is colour, shape and place."""
    return rearrange(F.interpolate(images, size=(side, side), mode="area"), "n c h w -> n (c h w)")


def distances(queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "N D"]) -> Float[Tensor, "Q N"]:
    """Root mean square difference of every query to every candidate; exactly 0 where they are equal."""
    return torch.stack([(candidates - query).square().mean(dim=1).sqrt() for query in queries])


def nearest_ranks(
    distance: Float[Tensor, "Q N"], allowed: Bool[Tensor, "Q N"], right: Bool[Tensor, "Q N"]
) -> Int[Tensor, " Q"]:
    """How many allowed candidates are nearer than the nearest right and allowed one: 0 where it is nearest.

    One just as near does not count against it: where a picture has two names, both are true. Without any
    candidate that is right and allowed the rank is N.
    """
    distance = distance.masked_fill(~allowed, torch.inf)
    best = distance.masked_fill(~right, torch.inf).amin(dim=1, keepdim=True)  # (Q, 1)
    ranks = (distance < best).sum(dim=1)
    return torch.where(best[:, 0].isinf(), distance.shape[1], ranks)
