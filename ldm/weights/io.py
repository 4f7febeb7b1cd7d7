"""Safe reading and atomic writing of weights: safetensors with JSON in the header, nothing pickled.

A file of ours is a flat `name -> tensor` table whose header carries the configuration that rebuilds the
module, so that a file is enough to know what it holds. Writing goes to a temporary name in the same folder
and is renamed, so that a reader (or a kill) never meets half a file. `read_header` checks a file before
anything of the size it claims is allocated; `ldm/weights/source.py` builds on it to read files of others.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# The format allows 100 MB. Real headers stay below 3 MB and 15 signs a tensor; what Python makes of a sign
# can take 200 bytes.
MAX_HEADER_BYTES, MAX_HEADER_SIGNS = 16_000_000, 600_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `tensors` (any device, any strides) with `metadata` in the header; atomic.

    Metadata values are strings, kept as they are, or JSON-ready. One tensor at a time is copied, so that a
    file may be as large as the memory that holds its tensors.
    """
    header: dict[str, Any] = {}
    if metadata:
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
        header["__metadata__"] = texts | {key: v for key, v in metadata.items() if isinstance(v, str)}
    # As the library orders them: wide formats first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end = start + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with appearing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous()
            file.write(plain.flatten().view(torch.uint8).numpy().data)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a whole file under a temporary name, flush it to the disk, then rename it to `path`."""
    with appearing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def appearing(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for writing that stands at `path` after the block, whole, or after an error not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
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
    shapes, metadata = read_header(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in shapes}, metadata
    except (SafetensorError, OSError) as error:
        raise broken(path, error) from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The header's metadata, each value decoded from JSON where it is JSON; the tensors are not read."""
    return read_header(path)[1]


def read_header(path: str | Path) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], dict[str, Any]]:
    """Shape and format of each tensor of a safetensors file, and its decoded metadata; no tensor is read.

    The header's length is checked before anything is allocated, its text before the library maps the file
    and checks that the tensors fill it without overlap. Raises as `load_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(one_line(f"weights file {path} does not exist"))
    try:
        with open(path, "rb") as stream:
            start, size = stream.read(8), os.fstat(stream.fileno()).st_size
            claimed = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or claimed > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{size} bytes, but its header claims {claimed}")
            header = parse_json(stream.read(claimed))
        texts = header.pop("__metadata__", None) or {}
        shapes = {name: _shape_and_dtype(name, fields) for name, fields in header.items()}
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(path, error) from error
    return shapes, {key: _decoded(text) for key, text in texts.items()}


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ValueError for anything else, nesting too deep and a repeated key."""
    if sum(data.count(sign) for sign in (b",", b":", b"[", b"{")) > MAX_HEADER_SIGNS:
        raise ValueError("its JSON has too many parts")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("its JSON is no object")
    return value


def checked_shape(shape: Sequence[Any]) -> torch.Size:
    """`shape` as torch counts it. Raises ValueError for what no tensor has: over 64 axes or 2^62 numbers."""
    if not all(type(side) is int and 0 <= side < 2**62 for side in shape) or len(shape) > 64:
        raise ValueError(f"the shape {str(shape)[:60]} is none")
    if math.prod(max(side, 1) for side in shape) > 2**62:
        raise ValueError(f"the shape {str(shape)[:60]} is too large")
    return torch.Size(shape)


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


class Refusal(ValueError):
    """What is wrong with the file `path`, in one line: `text` goes on where the name stops."""

    def __init__(self, path: str | Path, text: str) -> None:
        super().__init__(one_line(f"{path} {text}"))


def broken(path: str | Path, why: object) -> ValueError:
    """The error for a safetensors file that cannot be read."""
    return Refusal(path, f"is truncated or not a safetensors file ({why})")


def one_line(text: str) -> str:
    """`text`, whatever a file's author put into it, for a terminal: one line, printable, not endless."""
    plain = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return plain if len(plain) <= 1000 else f"{plain[:490]} ... {plain[-490:]}"


def _shape_and_dtype(name: str, fields: Any) -> tuple[torch.Size, torch.dtype]:
    if not isinstance(fields, dict) or not isinstance(fields.get("shape"), list):
        raise ValueError(f"its entry for {name} is none")
    if str(fields.get("dtype")) not in DTYPES:
        raise ValueError(
            f"tensor {name} has the unknown format {fields.get('dtype')}; known: {', '.join(DTYPES)}"
        )
    return checked_shape(fields["shape"]), DTYPES[fields["dtype"]]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"it names {name} twice")
        table[name] = value
    return table


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
