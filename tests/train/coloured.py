"""A small made set and a first stage of random weights, for tests of diffusion training through the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.config import to_dict
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.weights.io import save_weights

TINY = "configs/train/tiny.yaml"
SHORT = [
    "run.steps=6",
    "run.checkpoint_every=3",
    "run.validate_every=3",
    "run.preview_every=0",
    "run.batch=4",
    "run.device=cpu",
    "preview.steps=1",
]
CLASSES = [  # also quicker than a text tower, whose table has 49,408 rows
    "text=null",
    "classes.num_classes=4",
    "classes.dim=32",
    "classes.null_class=3",
    "caption_dropout=0.5",
    "preview.prompts=[]",
]


def write_set(folder: Path, captions: list[str] | None = None) -> str:
    """Ten pictures of one colour each, the last two held out; returns the override that names them."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(10):
        picture = np.full((32, 32, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        split = "heldout_image" if number > 7 else "train"
        text = f"colour {number}" if captions is None else captions[number]
        rows.append({"file_name": f"{number}.png", "text": text, "split": split, "label": number % 3})
    write_rows(folder, rows)
    return f"data.path={folder}"


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_first_stage(folder: Path) -> str:
    """Returns the override that names it."""
    torch.manual_seed(0)
    config = AutoencoderConfig(base_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4)
    put(folder / "autoencoder.safetensors", AutoencoderKL(config))
    return f"autoencoder={folder / 'autoencoder.safetensors'}"


def write_small_stage(folder: Path) -> None:
    """One that halves the sides."""
    torch.manual_seed(0)
    config = AutoencoderConfig(base_channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    put(folder / "autoencoder.safetensors", AutoencoderKL(config))


def put(path: Path, module: Any) -> None:
    """A part of a model as a file."""
    save_weights(path, module.state_dict(), {"config": to_dict(module.config)})


def made_in(folder: Path) -> list[str]:
    return [write_set(folder), write_first_stage(folder), *SHORT]
