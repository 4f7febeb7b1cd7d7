"""A checkpoint as diffusers writes it: model_index.json and one folder a part, or the folder of one part.

Files are named, sharded or pickled as its versions did; the configurations are read by `diffusers_config.py`.
Called by `reading.py`; the names are those of `diffusers.py`.
"""

import json
from pathlib import Path
from typing import Any

from ldm.weights import diffusers, diffusers_config
from ldm.weights.checkpoint import REST, TITLES, Checkpoint, Part
from ldm.weights.diffusers_controlnet import controlnet_config
from ldm.weights.folder import FILES
from ldm.weights.kinds import ModelConfig
from ldm.weights.source import Source, open_source

# our part -> its folder there
FOLDERS = {
    "unet": ("unet",),
    "autoencoder": ("vae", "vqvae"),
    "text": ("text_encoder",),
    "control": ("controlnet",),
}
CLASSES = {
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "AutoencoderKL": "autoencoder",
    "VQModel": "autoencoder",
    "ControlNetModel": "control",
}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (
    ".safetensors",
    ".fp16.safetensors",
    ".safetensors.index.json",
    ".bin",
    ".fp16.bin",
    ".bin.index.json",
)


def open_diffusers(path: Path) -> Checkpoint:
    """What a diffusers folder holds; see `reading.open_checkpoint`."""
    parts, configs = {}, {}
    for part, folder in _folders(path).items():
        source = open_source(_weights_of(folder))
        configs[part] = _part_config(part, folder, path)
        names = {name: name for name in source.entries if not name.endswith("position_ids")}
        if part == "text":
            names = {name.removeprefix("text_model."): full for name, full in names.items()}
            names.pop("text_projection.weight", None)
        parts[part] = Part(configs[part], source, names, diffusers.to_ours)
    file = path / "scheduler" / "scheduler_config.json"
    told = "unet" in parts and file.is_file()
    diffusion = diffusers_config.diffusion_config(read_json(file), str(file)) if told else None
    config = ModelConfig(**configs, diffusion=diffusion)
    return Checkpoint(path, "diffusers", "own", config, parts, foreign=rest_of(path))


def rest_of(folder: Path) -> dict[str, Source]:
    """The tensors that a conversion kept beside the parts."""
    if not (folder / REST).exists():
        return {}
    source = open_source(folder / REST)
    return dict.fromkeys(source.entries, source)


def _folders(path: Path) -> dict[str, Path]:
    """The folder of each part. Raises ValueError for what is incomplete, unknown or not supported."""
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        if new := [name for name in ("text_encoder_2", "transformer") if name in index]:
            raise ValueError(
                f"{path} is a {index.get('_class_name', 'pipeline')}, which is not supported: it has "
                f"{new[0]}, Stable Diffusion 1 and 2 have not"
            )
        known = [(part, name) for part, names in FOLDERS.items() for name in names]
        for _, name in known:
            if index.get(name) not in (None, [None, None]) and not (path / name).is_dir():
                raise ValueError(
                    f"{path} is not complete: its model_index.json names {name}, which is missing"
                )
        return {part: path / name for part, name in known if (path / name).is_dir()}
    if (path / "config.json").is_file():
        data = read_json(path / "config.json")
        name = data.get("_class_name") or (data.get("architectures") or ["?"])[0]
        part = "text" if name in diffusers_config.TEXT_CLASSES else CLASSES.get(name)
        if part is None:
            raise ValueError(
                f"{path / 'config.json'}: a {name} is no part that is known: {', '.join(CLASSES)}"
            )
        return {part: path}
    found = {part: path / name for part, names in FOLDERS.items() for name in names if (path / name).is_dir()}
    if found:
        return found
    raise ValueError(
        f"{path} holds no model: expected {', '.join(FILES)} (ours) or model_index.json (diffusers)"
    )


def _part_config(part: str, folder: Path, root: Path) -> Any:
    file = folder / "config.json"
    data, source = read_json(file), str(file)
    if part == "text":
        return diffusers_config.text_config(data, source, _padding(root / "tokenizer"))
    readers = {
        "unet": diffusers_config.unet_config,
        "autoencoder": diffusers_config.autoencoder_config,
        "control": controlnet_config,
    }
    try:
        return readers[part](data, source)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source}: not the configuration of a {TITLES[part]}: {error!r}") from error


def _padding(folder: Path) -> str | None:
    """What a tokenizer's folder says it pads with: "!", whose id is 0, or the end token."""
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        token = read_json(file).get("pad_token") if file.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return "zero" if token == "!" else "end"
    return None


def _weights_of(folder: Path) -> Path:
    for stem in STEMS:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").exists():
                return folder / f"{stem}{suffix}"
    raise FileNotFoundError(
        f"{folder} holds no weights: expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, so the folder is not complete") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
