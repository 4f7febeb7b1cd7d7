"""Measures of pictures, as functions of tensors: PSNR, SSIM, which of a set is nearest to another, and how
far two sets of features cover each other.

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


def line_distances(drawings: Bool[Tensor, "B H W"], others: Bool[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """How far apart the lines of each pair of drawings are, in pixels (chamfer distance, both ways averaged).

        (mean over p in A of min over q in B of |p - q|  +  the same from B to A) / 2

    A, B: where the drawings are True. 0 for equal ones, two empty ones included; where just one is empty, the
    length of the diagonal, which nothing exceeds.
    """
    found = []
    for a, b in zip(drawings, others, strict=True):
        points, targets = a.nonzero().double(), b.nonzero().double()  # (P, 2), (Q, 2)
        if len(points) and len(targets):
            apart = torch.cdist(points, targets)
            found.append((apart.amin(dim=1).mean() + apart.amin(dim=0).mean()) / 2)
        else:
            diagonal = (a.shape[0] ** 2 + a.shape[1] ** 2) ** 0.5 if len(points) + len(targets) else 0.0
            found.append(torch.tensor(diagonal, dtype=torch.float64))
    return torch.stack(found).float() if found else torch.zeros(0)


def nearest_others(features: Float[Tensor, "N D"], k: int = 1) -> Float[Tensor, " N"]:
    """The distance (as in `distances`) of each to its k-th nearest other one of the same set, which must hold
    more than k."""
    return distances(features, features).kthvalue(k + 1, dim=1).values  # the nearest is itself


def precision_recall(
    real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"], k: int = 3
) -> tuple[float, float]:
    """Precision and recall of a set of samples (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 to 3).

    A set stands for the union of balls around its members, each reaching to the k-th nearest other member.
    Precision is the share of `fake` that lies in the balls of `real` (pictures that could be real), recall
    that of `real` in the balls of `fake` (what can be made at all). Both are 1 for equal sets. Balls shrink
    as sets grow, so compare sets of about equal size. Raises ValueError for sets of at most k.
    """
    for name, features in (("real", real), ("fake", fake)):
        if len(features) <= k:
            raise ValueError(
                f"{len(features)} {name} pictures are too few for precision and recall with k = {k}"
            )
    between = distances(fake, real)  # (M, N)
    precision = (between <= nearest_others(real, k)).any(dim=1).float().mean()
    recall = (between <= nearest_others(fake, k)[:, None]).any(dim=0).float().mean()
    return float(precision), float(recall)
