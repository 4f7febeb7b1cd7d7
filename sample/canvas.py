"""A picture on a larger canvas, and the mask of what inpainting is to paint there (outpainting).

+-------------+      white: the new border, and the outermost `overlap` pixels of the picture
| white       |             towards it, which are painted anew so that no seam is left
|    +-----+  |      black: the rest of the picture, which stays as it is
|    |black|  |
+----+-----+--+
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.seeding import generator

FILLS = ("edge", "noise", "grey")


class Extended(NamedTuple):
    """Pictures of one size: RGB, and "L" with 255 (paint) or 0 (keep)."""

    canvas: Image.Image
    mask: Image.Image


def extend(
    picture: Image.Image,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    unit: int = 1,
    fill: str = "edge",
    overlap: int = 16,
    seed: int = 0,
) -> Extended:
    """An RGB picture with so many pixels more on each side.

    unit: sides of the canvas are rounded up to multiples of it; what is added for that goes to the right and
    to the bottom, but to the left or the top where the picture is extended only there.
    fill: what is on the border until it is painted: "edge" (the picture's edge drawn out and blurred),
    "noise" (uniform, of `seed`), "grey". overlap: pixels of the picture to paint anew, at extended sides.
    Raises ValueError for a negative extension, for none at all, for another fill, a unit below 1, a negative
    overlap, one that leaves nothing of the picture, and a canvas of more pixels than Pillow opens.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if any(pixels < 0 for pixels in sides.values()) or not any(sides.values()):
        told = ", ".join(f"{name} {pixels}" for name, pixels in sides.items())
        raise ValueError(f"a picture is extended by 0 pixels or more, on one side at least; got {told}")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill}")
    if unit < 1 or overlap < 0:
        raise ValueError(f"unit must be at least 1 and overlap at least 0, got {unit} and {overlap}")
    left, right = _rounded(picture.width, left, right, unit)
    top, bottom = _rounded(picture.height, top, bottom, unit)
    width, height = left + picture.width + right, top + picture.height + bottom
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise ValueError(
            f"a canvas of {width}x{height} has more pixels than a picture may have, "
            f"{Image.MAX_IMAGE_PIXELS}; extend by less"
        )
    kept = (  # the box that stays
        left + overlap * (left > 0),
        top + overlap * (top > 0),
        left + picture.width - overlap * (right > 0),
        top + picture.height - overlap * (bottom > 0),
    )
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise ValueError(
            f"an overlap of {overlap} pixels leaves nothing of a picture of {picture.width}x{picture.height}"
        )
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, kept)
    canvas = _border(picture, (left, top, right, bottom), fill, seed)
    canvas.paste(picture, (left, top))
    return Extended(canvas, mask)


def _rounded(length: int, before: int, after: int, unit: int) -> tuple[int, int]:
    """(before, after) with what makes the sum a multiple of `unit`."""
    extra = -(length + before + after) % unit
    return (before + extra, after) if before and not after else (before, after + extra)


def _border(picture: Image.Image, sides: tuple[int, int, int, int], fill: str, seed: int) -> Image.Image:
    """The canvas before the picture is put on it."""
    left, top, right, bottom = sides
    width, height = left + picture.width + right, top + picture.height + bottom
    if fill == "grey":
        return Image.new("RGB", (width, height), (128, 128, 128))
    if fill == "noise":
        drawn = torch.randint(0, 256, (height, width, 3), generator=generator(seed, "outpaint"))
        return Image.fromarray(drawn.to(torch.uint8).numpy())
    padded = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return Image.fromarray(padded).filter(ImageFilter.GaussianBlur(max(sides) / 8))


def feathered(mask: Bool[Tensor, "1 H W"], pixels: int) -> Float[Tensor, "1 H W"]:
    """How much of what was painted is taken, for putting it back over the picture: made w + picture (1 - w).

    0 where the mask is False, so that what is kept stays exactly; inside it rises to 1 over so many pixels
    from what is kept, d / (pixels + 1) at a distance of d (of the larger coordinate). 0 pixels: the mask.
    Raises ValueError for a negative number.
    """
    if pixels < 0:
        raise ValueError(f"feather must be at least 0 pixels, got {pixels}")
    keep = (~mask).float()[None]  # (1, 1, H, W)
    weight = 1 - keep
    for _ in range(pixels):
        keep = F.max_pool2d(keep, 3, stride=1, padding=1)  # grown by a pixel; beyond the picture is nothing
        weight = weight + (1 - keep)
    return weight[0] / (pixels + 1)
