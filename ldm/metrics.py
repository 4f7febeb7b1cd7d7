"""Measures of pictures, as functions of tensors: PSNR, SSIM, and which of a set is nearest to another.

Used by the autoencoder's training, `ldm-sample reconstruct` and `ldm-sample evaluate`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels


def psnr(images: Float[Tensor, "B C H W"], reconstructions: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each picture in dB, 10 log10(2^2 / MSE), both clamped to [-1, 1]."""
    error = (images.clamp(-1, 1) - reconstructions.float().clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp(min=1e-10))


def ssim(
    images: Float[Tensor, "B C H W"], others: Float[Tensor, "B C H W"], data_range: float = 2.0
) -> Float[Tensor, " B"]:
    """Structural similarity of each pair (Wang et al. 2004, IEEE Trans. Image Process. 13(4), eq. 13).

        (2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2))

    averaged over the channels and over all places where a window of 11x11 fits: means, variances and
    covariance under a Gaussian of deviation 1.5, C1 = (0.01 L)^2, C2 = (0.03 L)^2, L = `data_range`. 1 for
    equal pictures. Nothing is clamped. Raises ValueError for pictures under 11 pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"pictures of {width}x{height} are too small for SSIM, which needs {WINDOW} px")
    x, y = images.double(), others.double()  # the variances are differences of nearly equal numbers
    mu_x, mu_y = smooth(x), smooth(y)  # (B, C, H - 10, W - 10)
    var_x, var_y, cov = smooth(x * x) - mu_x**2, smooth(y * y) - mu_y**2, smooth(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2)
    similarity = similarity / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3)).to(images.dtype)


def smooth(maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """The mean under SSIM's Gaussian window at each place where all of it fits."""
    kernel = torch.exp(-0.5 * ((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) / SIGMA) ** 2)
    weights = (kernel / kernel.sum()).tolist()
    for axis in (2, 3):
        places = maps.shape[axis] - WINDOW + 1
        maps = sum(weight * maps.narrow(axis, i, places) for i, weight in enumerate(weights))  # type: ignore[assignment]
    return maps


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
