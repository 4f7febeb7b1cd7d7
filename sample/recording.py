"""What the text chunk of a picture tells: all it takes to make the picture again.

`txt2img.py` writes it, `again.py` reads it, `images.py` puts it into the file.
"""

import argparse
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.weights.folder import weights_hash
from sample.cli import Parser
from sample.commands import MAKERS
from sample.parts import Parts

# Options told whether used or not, where the command has them
ALWAYS = ("seed", "steps", "sampler", "guidance", "model", "strength")
READING = ("kind", "prediction", "weights", "vocabulary", "allow_nan")  # how a checkpoint is read
POSITIONAL = ("init", "mask")  # files, before the prompts
SIDE = ("out", "preview", "preview_every", "frames", "attention", "debug")  # change no picture
# Told otherwise, or no more than what the prompts have become
ELSEWHERE = ("command", "prompts", "negative", "n", "batch", "first", "size", "device", "dtype")
SOURCES = ("prompts_file", "study", "wildcards")


def common_parameters(args: argparse.Namespace, pipe: Parts, size: tuple[int, int]) -> dict[str, Any]:
    """What all pictures of a call have in common, JSON-ready. size: (W, H) of the pictures."""
    parser = Parser()
    MAKERS[args.command](parser)
    apart = (*ALWAYS, *READING, *POSITIONAL, *SIDE, *ELSEWHERE, *SOURCES)
    options = {name: value for name, value in vars(args).items() if name not in apart}
    used = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value != parser.get_default(name)
    }
    reading = {
        name: getattr(args, name) for name in READING if getattr(args, name) != parser.get_default(name)
    }
    given = [name for name in (*POSITIONAL, "depth") if getattr(args, name, None) is not None]
    files = {name: source(getattr(args, name), name) for name in given}
    return {
        **{name: getattr(args, name) for name in ALWAYS if hasattr(args, name)},
        **used,
        "size": list(size),
        "weights": weights_hash(pipe.checkpoint.files) if pipe.checkpoint else "",
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": versions(),
        **{name: value for told in files.values() for name, value in told.items()},
        **({"reading": reading} if reading else {}),
    }


def source(path: str, name: str) -> dict[str, Any]:
    """A file that a picture was made of: the path as given and a hash of its bytes."""
    return {name: path, f"{name}_hash": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}


def versions() -> dict[str, str]:
    """Of torch and of this package ("unknown" where it runs without being installed)."""
    try:
        own = importlib.metadata.version("latent-diffusion-from-scratch")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {"torch": torch.__version__, "latent-diffusion-from-scratch": own}


def tell_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say on stderr why a picture made again may not be the same, where nobody asked for the difference."""
    told = ["versions", "init_hash", "mask_hash", "depth_hash", "embedding_hashes", "lora_hashes"]
    told += ["weights"] * (recorded.get("model") == now["model"])
    for name in told:
        was, now_is = recorded.get(name), now.get(name)
        if was is not None and was != now_is:
            print(
                f"ldm-sample: warning: {name} differ: the picture was made with {was}, now {now_is}",
                file=sys.stderr,
            )
