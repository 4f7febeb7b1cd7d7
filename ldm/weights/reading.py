"""Find out what a path holds, from names and shapes alone; no tensor is read.

single file   the original code's names (`single_file.py`), or one part of ours
folder        ours (`folder.py`) or that of a training run, or diffusers' (`diffusers_folder.py`)
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ldm.config import from_dict
from ldm.diffusion.schedule import PREDICTIONS, DiffusionConfig
from ldm.weights.checkpoint import Checkpoint, Part
from ldm.weights.diffusers_folder import open_diffusers, rest_of
from ldm.weights.folder import FILES, PART_FILES
from ldm.weights.kinds import ModelConfig
from ldm.weights.single_file import open_single_file
from ldm.weights.source import Source, open_source

WEIGHTS = ("auto", "ema", "raw")


def open_checkpoint(
    path: str | Path, *, kind: str | None = None, prediction: str | None = None, weights: str = "auto"
) -> Checkpoint:
    """Find out what a file or folder holds.

    Args:
        kind: name or YAML file of a kind, for a single file that is not recognised.
        prediction: "eps", "v" or "x0", where the file does not say it or says it wrongly.
        weights: "ema" or "raw" where a file holds both; "auto" takes what the original samples with.

    Raises FileNotFoundError, or ValueError in one line for what is damaged, not supported, of unknown form.
    """
    path = Path(path).expanduser()
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if path.is_dir():
        if kind is not None:
            raise ValueError(f"kind is for single files; the folder {path} says itself what it is")
        run = path / "model"
        if run.is_dir() and not any((path / name).is_file() for name in FILES):
            path = run
        ours = any((path / name).is_file() for name in FILES)
        found = open_ours(path) if ours else open_diffusers(path)
    else:
        source = open_source(path)
        ours = kind is None and isinstance(source.metadata.get("config"), dict)
        found = open_our_part(source) if ours else open_single_file(source, kind, weights)
    if prediction is not None and "unet" in found.parts:
        diffusion = replace(found.config.diffusion or DiffusionConfig(), prediction=prediction)
        found = replace(found, config=replace(found.config, diffusion=diffusion))
    return found


def open_ours(path: Path) -> Checkpoint:
    """Our folder: each file's header tells its configuration."""
    parts = {
        name: _our_part(open_source(path / file), config_class)
        for name, (file, config_class) in PART_FILES.items()
        if (path / file).exists()
    }
    return Checkpoint(path, "ldm", "own", _our_config(parts), parts, foreign=rest_of(path))


def open_our_part(source: Source) -> Checkpoint:
    """One file of such a folder alone: the keys of its configuration tell the part."""
    keys = set(_section(source, "config"))
    for name, (_, config_class) in PART_FILES.items():
        if keys and keys <= {field.name for field in fields(config_class)}:
            parts = {name: _our_part(source, config_class)}
            return Checkpoint(source.path, "ldm", "own", _our_config(parts), parts)
    raise ValueError(
        f"{source.path}: the configuration in its header is of no part that is known: {', '.join(keys)}"
    )


def _our_part(source: Source, config_class: type) -> Part:
    config: Any = from_dict(config_class, _section(source, "config"), str(source.path))
    return Part(config, source, {name: name for name in source.entries}, lambda tensors, _: dict(tensors))


def _our_config(parts: Mapping[str, Part]) -> ModelConfig:
    values: dict[str, Any] = {name: part.config for name, part in parts.items()}
    if "unet" in parts:
        source = parts["unet"].source
        values["diffusion"] = from_dict(DiffusionConfig, _section(source, "diffusion"), str(source.path))
    return ModelConfig(**values)


def _section(source: Source, name: str) -> dict[str, Any]:
    data = source.metadata.get(name)
    if not isinstance(data, dict):
        raise ValueError(
            f"{source.path}: its header has no {name!r}, so it is not part of a model folder of ours"
        )
    return data
