"""A model on disk, whoever wrote it: its parts, known by names and shapes before a tensor is read.

`reading.py` finds out what a path holds and returns a `Checkpoint`; `Part.load` builds one network without
memory, reads its tensors into it and refuses what does not fit; `writing.py` writes the same tensors in
another form. Stands between `sample/pipeline.py` and `source.py`, which reads the files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import DiffusionConfig
from ldm.weights.folder import PART_FILES
from ldm.weights.kinds import ModelConfig, Translate, misfits
from ldm.weights.names import Config, build_empty
from ldm.weights.source import Entry, Source

FORMS = ("ldm", "compvis", "diffusers")
REST = "rest.safetensors"  # in a folder: what a converted checkpoint holds besides, under its first names

TITLES = {
    "unet": "UNet",
    "autoencoder": "autoencoder",
    "text": "text encoder",
    "bert": "text encoder",
    "classes": "class embedder",
    "control": "ControlNet",
}


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint: its configuration, where its tensors are, and how they are called."""

    config: Config
    source: Source
    names: dict[str, str]  # in the part's own foreign names -> in the source
    to_ours: Translate

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: self.source.entries[stored] for name, stored in self.names.items()}

    @property
    def parameters(self) -> int:
        return sum(entry.shape.numel() for entry in self.entries.values())

    def check(self) -> None:
        """Raises ValueError where names, shapes or number formats do not fit the configuration."""
        for name, entry in self.entries.items():
            if not entry.dtype.is_floating_point:
                kind = str(entry.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{self.source.path}: {name} is {kind}, but weights are floating-point numbers; "
                    "quantised checkpoints are not read"
                )
        empty = {name: torch.empty(entry.shape, device="meta") for name, entry in self.entries.items()}
        if wrong := misfits(self.to_ours(empty, self.config), self.config):
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{self.source.path} does not fit: {'; '.join(wrong[:5])}{more}")

    def tensors(self, dtype: torch.dtype | None = None, allow_nan: bool = False) -> dict[str, Tensor]:
        """The tensors in our names and shapes, memory-mapped where `dtype` is that of the file."""
        self.check()
        stored = dict(self.source.read(self.names.values(), dtype, allow_nan))
        return self.to_ours({name: stored[full] for name, full in self.names.items()}, self.config)

    def load(self, dtype: torch.dtype = torch.float32, allow_nan: bool = False) -> Any:
        """The module of `config`, in evaluation mode with the weights in `dtype`; needs their memory once.

        Raises ValueError, in one line, for tensors that do not fit, are damaged or overflow `dtype`.
        """
        module = build_empty(self.config)
        module.load_state_dict(self.tensors(dtype, allow_nan), strict=True, assign=True)
        return module.requires_grad_(False).eval()


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found.

    kind: the name in `configs/model`, "own" where the files themselves say what they are. weights: which of
    raw and averaged weights the UNet's are, "" where the file holds one set. foreign: tensors that no part
    has, in the source they are in. notes: lines a user should see.
    """

    path: Path
    form: str
    kind: str
    config: ModelConfig
    parts: dict[str, Part]
    weights: str = ""
    foreign: dict[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return list(dict.fromkeys(part.source.path for part in self.parts.values()))

    def require(self, part: str) -> Part:
        """Raises ValueError, or FileNotFoundError in a folder of ours, where the checkpoint lacks it."""
        if part not in self.parts and self.form == "ldm" and self.path.is_dir():
            raise FileNotFoundError(f"{self.path / PART_FILES[part][0]} does not exist")
        if part not in self.parts:
            raise ValueError(f"{self.path} holds no {TITLES[part]}, only: {', '.join(self.parts)}")
        return self.parts[part]

    def diffusion(self) -> DiffusionConfig:
        """How the UNet was trained to denoise. Raises ValueError where nothing says eps or v."""
        if self.config.diffusion is None:
            raise ValueError(
                f"{self.path}: its weights do not tell whether the network predicts eps or v "
                "(Stable Diffusion 2 came in both); say --prediction eps (the 512 px models, called base) or "
                "--prediction v (the 768 px models), or put the original's .yaml of the same name beside it"
            )
        return self.config.diffusion
