"""Columns of metadata.jsonl beyond caption and style: "mask", how much each place of a picture counts in the
loss, and "label", the number of its class. Read by `tasks/diffusion.py` for the pictures that `data.py` kept.
"""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float32
from torch import Tensor

from train.buckets import Shape, read_cut
from train.data import METADATA, DataConfig


def read_column(config: DataConfig, column: str, files: list[str]) -> list[Any]:
    """What metadata.jsonl says in `column` of each of `files` (paths in its folder), None where nothing.

    The rows themselves are checked by `data.load_images`. Raises ValueError for a folder without
    metadata.jsonl, where no row has that column, and where two rows of one picture differ in it.
    """
    path = Path(config.path).expanduser() / METADATA
    if not path.is_file():
        raise ValueError(f"{path} does not exist, and so no picture has a {column!r}")
    values: dict[str, Any] = {}
    for line in path.read_bytes().split(b"\n"):
        row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
        if column not in row:
            continue
        file = PurePosixPath(row["file_name"]).as_posix()
        if values.setdefault(file, row[column]) != row[column]:
            raise ValueError(f"{path}: two rows of {file} differ in {column!r}")
    if not values:
        raise ValueError(f"{path}: no row has a column {column!r}")
    return [values.get(file) for file in files]


def load_masks(
    config: DataConfig, files: list[str], factor: int, shape: Shape | None = None
) -> Float32[Tensor, "N 1 h w"]:
    """Weights in [0, 1] of the latents' places: the mask's mean over the `factor` x `factor` pixels of each.

    A mask is a picture file of the folder, white where the picture counts, of its picture's proportions (it
    is cut and resized as the picture is: to a square, or to `shape`). A picture without one counts
    everywhere. Raises ValueError for a mask that is no such file, and as `read_column`.
    """
    names, root = read_column(config, "mask", files), Path(config.path).expanduser()
    width, height = shape or (config.size, config.size)
    masks = torch.ones(len(files), 1, height // factor, width // factor)
    for index, name in enumerate(names):
        if name is None:
            continue
        if not isinstance(name, str) or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
            raise ValueError(f"{root / METADATA}: mask {name!r:.60} is no file name inside the folder")
        picture = read_cut(root / name, (width, height))
        pixels = torch.from_numpy(np.array(picture)).float() / 255  # (H, W, 3)
        masks[index, 0] = reduce(pixels, "(h f) (w g) c -> h w", "mean", f=factor, g=factor)
    return masks


def load_labels(config: DataConfig, files: list[str], classes: int) -> list[int]:
    """Classes of the pictures. Raises ValueError where one is not in 0..classes-1, and as `read_column`."""
    labels = read_column(config, "label", files)
    for file, label in zip(files, labels, strict=True):
        if type(label) is not int or not 0 <= label < classes:
            told = "no label" if label is None else f"label {label!r:.60}"
            raise ValueError(
                f"{config.path}/{METADATA}: {file} has {told}, a whole number in 0..{classes - 1} is needed"
            )
    return labels
