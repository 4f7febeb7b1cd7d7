"""Safe reading and atomic writing of weights: safetensors with JSON in the header, nothing pickled.

A file of ours is a flat `name -> tensor` table whose header carries the configuration that rebuilds the
module, so that a file is enough to know what it holds. Writing goes to a temporary name in the same folder
and is renamed, so that a reader (or a kill) never meets half a file.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

MAX_HEADER_BYTES = 100_000_000


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `tensors` (any device, any strides) with `metadata` (JSON-ready values) in the header; atomic."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {key: json.dumps(value, ensure_ascii=False) for key, value in (metadata or {}).items()}
    write_atomically(path, save(plain, metadata=header))


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a whole file under a temporary name, flush it to the disk, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of a safetensors file.

    Raises FileNotFoundError, or ValueError for a truncated or foreign file, each in one line.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(_broken(path, error)) from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The header's metadata, each value decoded from JSON where it is JSON; the tensors are not read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    with open(path, "rb") as stream:
        start = stream.read(8)
    size = path.stat().st_size
    claimed = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if len(start) < 8 or claimed > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(_broken(path, f"{size} bytes, but its header claims {claimed}"))
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(_broken(path, error)) from error
    return {key: _decoded(value) for key, value in raw.items()}


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`; names and shapes must match exactly, and no value may be NaN or infinite.

    Raises ValueError, listing missing, unexpected and mismatched keys; the module is then unchanged.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        groups = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        told = "; ".join(
            f"{len(names)} {title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for title, names in groups
            if names
        )
        raise ValueError(f"{source} does not fit {type(module).__name__}: {told}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: tensor {name} holds NaN or infinite values; the file is damaged")
    module.load_state_dict(dict(tensors), strict=True)


def _broken(path: str | Path, why: object) -> str:
    return f"{path} is truncated or not a safetensors file ({' '.join(str(why).split())})"


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
