"""What the notebooks share: whether they run in reduced time, and how pictures and curves are shown.

No model and no formula is here: those come from the packages `ldm`, `sample` and `train`.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

# LDM_QUICK=1 runs the same cells with fewer steps, pictures or samples: `steps = 5 if QUICK else 50`
QUICK = os.environ.get("LDM_QUICK") == "1"

plt.rcParams.update(
    {
        "figure.dpi": 72,
        "figure.constrained_layout.use": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.3,
        "image.interpolation": "nearest",
        "font.size": 10,
    }
)


def show(
    images: Tensor | Iterable[Tensor],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    size: float = 1.5,
    rows: Sequence[str] | None = None,
) -> None:
    """One figure of images (N, 3, H, W) or (N, 1, H, W) in [-1, 1], clamped.

    titles: one an image. columns: images in a line, of `size` inches each. rows: a label for each line.
    """
    images = list(images)
    lines = -(-len(images) // columns)
    columns = min(columns, len(images))
    extent = (size * columns, (size + 0.25) * lines)
    _, axes = plt.subplots(lines, columns, figsize=extent, squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
        if place < len(images):
            pixels = (images[place].detach().float().cpu().clamp(-1, 1) + 1) / 2
            axis.imshow(pixels.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
        if titles is not None and place < len(titles):
            axis.set_title(titles[place], fontsize=9)
    for line, text in enumerate(rows or []):
        axes[line, 0].set_ylabel(text, fontsize=9)
    plt.show()


def heat(values: Tensor | Sequence[Tensor], titles: Sequence[str] | None = None, size: float = 1.6) -> None:
    """One figure of maps (h, w) side by side in false colours, on one scale: blue below 0, red above."""
    maps = [np.asarray(each.detach().float().cpu()) for each in values]
    top = max(float(np.abs(each).max()) for each in maps)
    _, axes = plt.subplots(1, len(maps), figsize=(size * len(maps), size + 0.25), squeeze=False)
    for place, axis in enumerate(axes.flat):
        axis.imshow(maps[place], cmap="RdBu_r", vmin=-top, vmax=top)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        if titles is not None:
            axis.set_title(titles[place], fontsize=9)
    plt.show()


def curves(axis: Axes, x: Any, lines: dict[str, Any], xlabel: str, ylabel: str, **style: Any) -> None:
    """Each of `lines` over x on one axis, with a legend. style: of `Axes.set`, as xscale="log"."""
    for name, y in lines.items():
        axis.plot(np.asarray(torch.as_tensor(x)), np.asarray(torch.as_tensor(y)), label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, **style)
    if len(lines) > 1:
        axis.legend(fontsize=8)
