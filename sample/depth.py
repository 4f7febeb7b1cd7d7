"""Depth pictures for models that read depth: any grey picture file, with all its precision.

White is near, as in the inverse depth of MiDaS, the network that the depth model was trained with.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sample.images import cover, decoded


def read_depth(path: Path, size: tuple[int, int] | None = None) -> Float[Tensor, "1 H W"]:
    """A grey picture of 8 or 16 bits as float32 in 0..255; 16 bits keep their steps of 1/257.

    size: (W, H) to scale and cut it to, as the picture it belongs to is. A coloured file is taken where its
    channels are equal. Raises ValueError, with the file's name and what is wrong with it.
    """
    grey = decoded(path, _grey, "depth picture")
    picture = Image.fromarray(grey)  # of mode "F": Pillow scales it without rounding
    scaled = picture if size is None else cover(picture, size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(scaled))[None]


def _grey(image: Image.Image) -> np.ndarray:
    """float32 (H, W) in 0..255. Raises ValueError for what has no fixed range, and for colours."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit grey ("I;16", "I;16B", ...), in 32-bit form ("I") for some files
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError("32-bit pixels have no fixed range; save it with 8 or 16 bit")
        return (deep / 257).astype(np.float32)
    levels = np.asarray(image.convert("RGB")).astype(np.float32)
    if (levels != levels[..., :1]).any():
        raise ValueError("it has colours, of which none is depth; save it as a grey picture, white is near")
    return np.ascontiguousarray(levels[..., 0])
