"""Write a checkpoint in any of three forms, without loss: the same tensors, bit for bit, under other names.

    ldm         our folder: one safetensors file a part, its configuration in the header (`folder.py`); where
                there is one part, also that file alone
    compvis     one safetensors file in the original code's names
    diffusers   a folder that diffusers' StableDiffusionPipeline loads, tokenizer and scheduler included

Tensors that no part has (averaged weights beside raw ones, schedule tables, OpenCLIP's projection) travel in
`rest.safetensors` under their first names, so that the way back ends where it began. What is written appears
complete under its name or not at all. Used by `ldm-weights convert`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import to_dict
from ldm.models.clip import TextConfig
from ldm.models.tokenizer import vocabulary
from ldm.weights import compvis, diffusers, diffusers_config
from ldm.weights.checkpoint import FORMS, REST, Checkpoint, Part
from ldm.weights.diffusers_controlnet import controlnet_json
from ldm.weights.diffusers_folder import FOLDERS
from ldm.weights.folder import PART_FILES
from ldm.weights.io import save_weights
from ldm.weights.names import Config

Tensors = dict[str, Tensor]


def convert(
    checkpoint: Checkpoint,
    destination: str | Path,
    form: str,
    dtype: torch.dtype | None = None,
    allow_nan: bool = False,
) -> Path:
    """Write `checkpoint` to `destination` in `form`.

    dtype: number format of the parts' floating tensors; None keeps theirs.
    Raises ValueError, with the destination untouched, where it exists, the disk is too small, a weight is
    damaged or overflows `dtype`, or the form cannot hold the model.
    """
    destination = Path(destination).expanduser()
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists; give a new name")
    if form == "compvis" and destination.suffix != ".safetensors":
        raise ValueError(
            f"{destination}: this form is one file, named *.safetensors (pickles are not written)"
        )
    if not checkpoint.parts:
        raise ValueError(f"{checkpoint.path} holds no part to convert")
    for part in checkpoint.parts.values():
        part.check()
    _require_space(checkpoint, destination, dtype)
    writer = {"ldm": write_ldm, "compvis": write_compvis, "diffusers": write_diffusers}[form]
    with _appearing(destination) as temporary:
        writer(checkpoint, temporary, dtype, allow_nan)
    return destination


def write_ldm(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, allow_nan: bool = False
) -> None:
    """One part alone, called *.safetensors, is its file without a folder."""
    alone = len(checkpoint.parts) == 1 and not checkpoint.foreign and folder.suffix == ".safetensors"
    for name, part in checkpoint.parts.items():
        metadata = {"config": to_dict(part.config)}
        if name == "unet":
            metadata["diffusion"] = to_dict(checkpoint.diffusion())
        file = folder if alone else folder / PART_FILES[name][0]
        save_weights(file, part.tensors(dtype, allow_nan), metadata)
    _write_rest(checkpoint, folder, {})


def write_compvis(
    checkpoint: Checkpoint, file: Path, dtype: torch.dtype | None, allow_nan: bool = False
) -> None:
    tensors: Tensors = {}
    for name, part in checkpoint.parts.items():
        openclip = isinstance(part.config, TextConfig) and part.config.activation == "gelu"
        theirs = compvis.to_compvis(part.tensors(dtype, allow_nan), part.config, openclip)
        prefix = {
            "unet": compvis.UNET_PREFIX,
            "autoencoder": compvis.AUTOENCODER_PREFIX,
            "control": compvis.CONTROL_PREFIX,
            "text": compvis.OPENCLIP_PREFIX if openclip else compvis.TRANSFORMERS_PREFIX,
            "bert": compvis.CONDITIONER_PREFIX,
            "classes": compvis.CONDITIONER_PREFIX,
        }[name]
        tensors |= {prefix + key: tensor for key, tensor in theirs.items()}
    rest = {name: tensor for name, tensor in _rest(checkpoint).items() if name not in tensors}
    # The original's names say nothing of heads or of eps and v; our reader finds both in the header.
    metadata: dict[str, Any] = {"format": "pt", "model": to_dict(checkpoint.config)}
    save_weights(file, tensors | rest, metadata)


def write_diffusers(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, allow_nan: bool = False
) -> None:
    parts = checkpoint.parts
    writable = {"unet", "autoencoder", "text", "control"}
    if unknown := set(parts) - writable:
        raise ValueError(
            f"{checkpoint.path}: diffusers' pipelines have no counterpart for: {', '.join(unknown)}"
        )
    jsons = {name: _json_of(name, part.config) for name, part in parts.items()}  # refuses before it writes
    alone = len(parts) == 1 and "unet" not in parts
    unread: Tensors = {}
    for name, part in parts.items():
        vq = name == "autoencoder" and jsons[name]["_class_name"] == "VQModel"
        where = folder if alone else folder / FOLDERS[name][1 if vq else 0]
        tensors, config = part.tensors(dtype, allow_nan), part.config
        if isinstance(config, TextConfig) and config.skip_layers:
            tensors, last = _without_unread(tensors, config)
            unread |= last
            config = replace(config, layers=config.layers - config.skip_layers, skip_layers=0)
        theirs = diffusers.to_diffusers(tensors, config)
        if name == "text":
            theirs = {f"text_model.{key}": tensor for key, tensor in theirs.items()}
        stem = "model" if name == "text" else "diffusion_pytorch_model"
        save_weights(where / f"{stem}.safetensors", theirs, {"format": "pt"})
        _write_json(where / "config.json", jsons[name])
        if isinstance(config, TextConfig):
            write_tokenizer(folder / "tokenizer", config)
    if "unet" in parts:
        scheduler = diffusers_config.scheduler_json(checkpoint.diffusion())
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if {"autoencoder", "text"} <= set(parts):
            index = _index(checkpoint)
            _write_json(folder / "model_index.json", index)
            if index["_class_name"] == UPSCALE:  # one schedule for both noises
                low = {**scheduler, "_class_name": "DDPMScheduler"}
                _write_json(folder / "low_res_scheduler" / "scheduler_config.json", low)
    _write_rest(checkpoint, folder, unread)


def write_tokenizer(folder: Path, config: TextConfig) -> None:
    """CLIP's tokenizer in the files of transformers."""
    ids, merges = vocabulary()
    end = "<|endoftext|>"
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if config.padding == "end" else "!",
    }
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.context_length,
        "do_lower_case": True,
    }
    _write_json(folder / "vocab.json", ids)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**options, **special})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _json_of(name: str, config: Config) -> dict[str, Any]:
    writers: Mapping[str, Any] = {
        "unet": diffusers_config.unet_json,
        "autoencoder": diffusers_config.autoencoder_json,
        "text": diffusers_config.text_json,
        "control": controlnet_json,
    }
    return writers[name](config)


UPSCALE = "StableDiffusionUpscalePipeline"
PIPELINES = {  # by the channels that the UNet reads besides the latents
    0: "StableDiffusionPipeline",
    1: "StableDiffusionDepth2ImgPipeline",  # the caller brings its depth estimator, which is no part of ours
    3: UPSCALE,
    4: "StableDiffusionInstructPix2PixPipeline",
    5: "StableDiffusionInpaintPipeline",
}
STEERED = {  # the same with a ControlNet
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
}


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """model_index.json of a Stable Diffusion pipeline."""
    unet = checkpoint.config.unet
    more = 0 if unet is None else unet.in_channels - unet.out_channels
    if more not in PIPELINES:
        raise ValueError(
            f"diffusers has no pipeline for a UNet that reads {more} channels besides the latents"
        )
    vq = checkpoint.config.autoencoder is not None and checkpoint.config.autoencoder.codebook_size is not None
    if vq:
        raise ValueError("diffusers has no pipeline with a CLIP text encoder and a VQ first stage")
    steered = "control" in checkpoint.parts
    return {
        "_class_name": STEERED.get(PIPELINES[more], PIPELINES[more]) if steered else PIPELINES[more],
        "_diffusers_version": "0.35.0",  # of the form that is written; some pipelines ask for it
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **({"controlnet": ["diffusers", "ControlNetModel"]} if steered else {}),
        **({"low_res_scheduler": ["diffusers", "DDPMScheduler"]} if PIPELINES[more] == UPSCALE else {}),
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def _without_unread(tensors: Tensors, config: TextConfig) -> tuple[Tensors, Tensors]:
    """The layers that are read, in our names; and those behind them, in the original's names for the rest."""
    last = tuple(f"blocks.{i}." for i in range(config.layers - config.skip_layers, config.layers))
    theirs = compvis.to_compvis(tensors, config, openclip=True)
    marks = tuple(f"transformer.resblocks.{prefix.split('.')[1]}." for prefix in last)
    unread = {compvis.OPENCLIP_PREFIX + name: t for name, t in theirs.items() if name.startswith(marks)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}, unread


def _rest(checkpoint: Checkpoint) -> Tensors:
    tensors: Tensors = {}
    for source in {id(source): source for source in checkpoint.foreign.values()}.values():
        names = [name for name, where in checkpoint.foreign.items() if where is source]
        tensors |= dict(source.read(names, allow_nan=True))
    return tensors


def _write_rest(checkpoint: Checkpoint, folder: Path, more: Tensors) -> None:
    if tensors := _rest(checkpoint) | more:
        save_weights(folder / REST, tensors, {"format": "pt"})


def _bytes(part: Part, dtype: torch.dtype | None) -> int:
    entries = part.entries.values()
    return sum(
        entry.shape.numel() * (dtype if dtype and entry.dtype.is_floating_point else entry.dtype).itemsize
        for entry in entries
    )


def _require_space(checkpoint: Checkpoint, destination: Path, dtype: torch.dtype | None) -> None:
    needed = sum(_bytes(part, dtype) for part in checkpoint.parts.values())
    for name, source in checkpoint.foreign.items():
        entry = source.entries[name]
        needed += entry.shape.numel() * entry.dtype.itemsize
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"{destination} needs {needed / 2**20:.0f} MiB, but the disk has {free / 2**20:.0f} MiB left"
        )


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A temporary name beside `destination`, renamed to it after the block and removed after an error."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}{destination.suffix}")
    try:
        yield temporary
        os.replace(temporary, destination)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
