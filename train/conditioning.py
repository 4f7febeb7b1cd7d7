"""Networks that a diffusion run does not start from scratch: a given text tower, frozen or not, a given UNet.

Rombach et al. 2022 (arXiv:2112.10752) train the text tower with the UNet (section 4.3.1); Stable Diffusion
reads that of CLIP as it is. What a frozen tower makes of a caption never changes, so that it is computed
once for the set and kept on disk (`FrozenText`). `start_from` fills networks with the weights of a
checkpoint before fine-tuning. Called by `tasks/diffusion.py`.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import differences, to_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.class_embedder import ClassEmbedder
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.io import appearing, load_strict
from ldm.weights.reading import open_checkpoint

# So many captions pass the tower at once. On a CPU one, so that a caption's features do not depend on its
# neighbours, bit for bit; elsewhere that would take ten times as long and cannot be had anyway.
AT_ONCE = {"cpu": 1}
AT_ONCE_ELSEWHERE = 64


@dataclass(frozen=True)
class TowerConfig:
    """The text tower of a checkpoint (CLIP's form), instead of a new one.

    checkpoint: a file or folder that `open_checkpoint` reads and that holds one.
    frozen: only the UNet is trained; else the tower with it.
    skip_layers: 1 reads the penultimate layer (clip skip 2); None is what the checkpoint says.
    cache: keep a frozen tower's features on disk: of SD's 236 kB a caption. Without, each step computes them.
    """

    checkpoint: str
    frozen: bool = True
    skip_layers: int | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("tower.checkpoint is empty, it must be a file or folder with a text encoder")


def load_tower(config: TowerConfig) -> TextEncoder:
    """The tower on the CPU, in float32; frozen in evaluation mode, else ready to train.

    Raises ValueError or FileNotFoundError, in one line, as `open_checkpoint`, and for skip_layers that leave
    no layer.
    """
    part = open_checkpoint(config.checkpoint).require("text")
    assert isinstance(part.config, TextConfig)
    tower: TextEncoder = part.load()
    if config.skip_layers is not None:
        tower.config = replace(tower.config, skip_layers=config.skip_layers)
    return tower if config.frozen else tower.requires_grad_(True).train()


def check_width(unet: UNetConfig, tower: TextConfig, checkpoint: str) -> None:
    """Raises ValueError where the UNet reads a context of another width than the tower gives."""
    if unet.context_dim != tower.width:
        raise ValueError(
            f"unet.context_dim {unet.context_dim} must equal the width {tower.width} of the text encoder in "
            f"{checkpoint}"
        )


@torch.no_grad()
def features(tower: TextEncoder, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T D"]:
    """What the tower makes of token ids, float32 on its device, whatever the run's precision.

    On a CPU every row is a function of its own ids alone.
    """
    device = tower.final_norm.weight.device
    parts = ids.to(device).split(AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE))
    with torch.autocast(device.type, enabled=False):
        return torch.cat([tower(part) for part in parts])


class FrozenText:
    """A frozen tower as a table over the distinct captions of a set: texts to numbers, these to `context`.

    Number 0 is the empty caption. With `folder` the table is a file there, memory-mapped, whose name is a
    hash of what made it: one of other captions or of another tower is never used, it is made anew.
    """

    def __init__(self, tower: TextEncoder, captions: Sequence[str], folder: Path | None):
        """captions: all that will be asked for; the features are made when they first are."""
        self.tower, self.folder = tower, folder
        self.row = {text: row for row, text in enumerate(dict.fromkeys(["", *captions]))}
        tokenizer = Tokenizer(tower.config.context_length, tower.config.padding)
        self.ids = tokenizer(list(self.row))  # (U, T)

    def __call__(self, texts: list[str]) -> Int[Tensor, " N"]:
        """The captions' numbers."""
        return torch.tensor([self.row[text] for text in texts], dtype=torch.int64)

    def context(self, numbers: Int[Tensor, " B"]) -> Float[Tensor, "B T D"]:
        """Features of captions by number."""
        if self.folder is not None:
            return self.table[numbers]
        distinct, inverse = numbers.unique(return_inverse=True)
        return features(self.tower, self.ids[distinct])[inverse.to(self.tower.final_norm.weight.device)]

    @property
    def key(self) -> str:
        """A hash of the captions' tokens and of the tower, configuration and weights."""
        digest = hashlib.blake2b(repr((tuple(self.ids.shape), self.tower.config)).encode(), digest_size=16)
        digest.update(self.ids.numpy().tobytes())
        for name, tensor in self.tower.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def table(self) -> Float[Tensor, "U T D"]:
        """Features of all captions, mapped from the file; made now where there is none."""
        assert self.folder is not None
        path = self.folder / f"captions-{self.key}.npy"
        shape = (*self.ids.shape, self.tower.config.width)
        if (kept := _mapped(path, shape)) is not None:
            return kept
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with appearing(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            parts = self.ids.split(64)
            for part in tqdm(parts, desc="reading captions", unit="batch", leave=False):
                file.write(features(self.tower, part).cpu().contiguous().numpy().data)
        made = _mapped(path, shape)
        assert made is not None, "just written"
        return made


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The array in a file, None where there is no such file or it is not whole."""
    if not path.is_file():
        return None
    try:
        array = np.lib.format.open_memmap(path, mode="c")  # "c": torch wants it writable
    except (ValueError, OSError):
        return None
    whole = array.shape == shape and array.dtype == np.float32
    return torch.from_numpy(array) if whole and os.path.getsize(path) >= array.nbytes else None


# --- fine-tuning --------------------------------------------------------------------------------------------


def start_from(
    path: str,
    unet: UNet,
    tower: TextEncoder | ClassEmbedder | None,
    diffusion: DiffusionConfig,
    more_channels: int = 0,
) -> None:
    """Fill networks with the weights of a checkpoint, which must fit strictly.

    tower: what is trained with the UNet and starts from there as well; None where there is none, or where it
    comes from elsewhere. more_channels: how many of the UNet's last input channels the checkpoint may lack;
    their weights start at zero, as those of Stable Diffusion's inpainting model did. Warns where the
    checkpoint was trained for another noise schedule or prediction. Raises ValueError, which names the keys
    that differ, and as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    part = checkpoint.require("unet")
    plain = replace(unet.config, in_channels=unet.config.in_channels - more_channels)
    grown = bool(more_channels) and part.config == replace(plain, sample_size=_size(part.config))
    _check_same(path, "unet", part.config, plain if grown else unet.config)
    tensors = part.tensors(torch.float32)
    if grown:
        weight, old = unet.conv_in.weight, tensors["conv_in.weight"]
        zeros = torch.zeros(weight.shape[0], more_channels, *weight.shape[2:])
        tensors = {**tensors, "conv_in.weight": torch.cat([old, zeros], dim=1)}
    load_strict(unet, tensors, path)
    if tower is not None:
        name = "classes" if isinstance(tower, ClassEmbedder) else "text"
        _check_same(path, name, checkpoint.require(name).config, tower.config)
        load_strict(tower, checkpoint.require(name).tensors(torch.float32), path)
    _warn_of_diffusion(checkpoint, diffusion)


def _size(config: object) -> int:
    assert isinstance(config, UNetConfig)
    return config.sample_size


def _check_same(path: str, name: str, theirs: object, ours: object) -> None:
    """Raises ValueError where two configurations differ in more than the size of pictures."""
    changed = differences(to_dict(ours), to_dict(theirs), f"{name}.")
    changed = [line for line in changed if not line.startswith("unet.sample_size")]
    if changed:
        raise ValueError(
            f"init_from: the network in {path} is another one than is configured: {'; '.join(changed)}"
        )


def _warn_of_diffusion(checkpoint: Checkpoint, ours: DiffusionConfig) -> None:
    theirs = checkpoint.config.diffusion
    changed = [] if theirs is None else differences(to_dict(theirs), to_dict(ours), "diffusion.")
    if changed:
        told = "; ".join(changed)
        warnings.warn(f"init_from {checkpoint.path}: trained otherwise, what changes: {told}", stacklevel=3)


def trained_networks(unet: nn.Module, tower: nn.Module | None) -> nn.ModuleDict:
    """What is trained, by the names that a run's states have."""
    networks = nn.ModuleDict({"unet": unet})
    if tower is not None and any(parameter.requires_grad for parameter in tower.parameters()):
        networks["text_encoder"] = tower
    return networks
