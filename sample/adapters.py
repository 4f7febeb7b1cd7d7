"""Files of LoRAs and embeddings in a folder given once by `--adapters DIR`, found by the name that a prompt
says; and those that ship with a model, by their name alone (`--lora creature`).

The name is a file's without its suffix, upper and lower case told apart, as in the web UIs.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from sample.model import SHIPPED

LORAS = (".safetensors", ".pt")
EMBEDDINGS = (".safetensors", ".pt", ".bin", ".png", ".webp")


def shipped_adapter(kind: str, name: str) -> Path | None:
    """The file that ships under this name, if one does; kind: "lora" or "embedding".

    As with models, a shipped name wins over a file of that name in the working folder, which is `./name`.
    """
    return next((path for path in SHIPPED.glob(f"*/{kind}/*.safetensors") if path.stem == name), None)


def find_adapter(folder: str | Path | None, name: str, suffixes: Sequence[str]) -> Path:
    """The file of that name in the folder, with the first suffix there is.

    Raises ValueError, which lists names near it, where there is none; FileNotFoundError for no folder.
    """
    if folder is None:
        raise ValueError(f"{name!r}: the folder with such files must be given by --adapters DIR")
    names = adapter_names(folder, suffixes)
    for suffix in suffixes:
        if name + suffix in names.get(name, ()):
            return Path(folder) / (name + suffix)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or sorted(names)[:5]
    there = ", ".join(near) or f"no {' or '.join(suffixes)} file"
    raise ValueError(f"no {name!r} in {folder}; there: {there}")


def adapter_names(folder: str | Path, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """The files of the folder, none below it, by their name without suffix."""
    folder, names = Path(folder), dict[str, list[str]]()
    if not folder.is_dir():
        raise FileNotFoundError(f"--adapters {folder} is no folder")
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes and path.is_file():
            names.setdefault(path.stem, []).append(path.name)
    return names
