"""Sets that memory does not hold (`data.stream=true`): pixels and moments in files that are mapped, not read.

Each picture is read once, cut and resized, by `data.workers` processes, and its pixels are written to a file
of safetensors in `data.cache`, which every run on this set at this size shares. What training takes for a
tensor in memory is then a view of that file, of which the system keeps in memory what is in use: all that
is done with a set in memory is done with it, and comes out the same, bit for bit. The files of the set itself
are not needed any more while a run goes on; only their names, sizes and dates are looked at when one begins.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.weights.io import DTYPES, appearing, one_line, parse_json
from train.reading import to_pixels

if TYPE_CHECKING:
    from train.data import ImageFolder

HEADER = 1 << 17  # bytes kept free for it at the start of a file: what it says is known last
TOLD = 100  # reasons that a file keeps, of as many characters at most
LONGEST = 200

# By address: file, what it was, key, and the bytes, which keep the address from becoming another tensor's.
_mapped: dict[int, tuple[Path, os.stat_result, str, Tensor]] = {}


_dry: ContextVar[bool] = ContextVar("dry", default=False)


@contextmanager
def dry(run: bool = True) -> Iterator[None]:
    """Inside the block, where `run` is a dry run, sets are listed but nothing of them is written."""
    token = _dry.set(run)
    try:
        yield
    finally:
        _dry.reset(token)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "latent-diffusion-from-scratch" / "pixels"


def stream_images(folder: "ImageFolder") -> tuple[Tensor, list[int], list[str]]:
    """Pixels (N, 3, size, size) uint8 of the pictures that can be read, their numbers in the folder's list,
    and why the others cannot be read.

    Made when no file has them yet, or when a picture has another size or date than the file's. In a dry run
    none is made: the pixels are then one black pixel, seen as all of them, and no picture counts as broken.
    """
    config, key = folder.config, set_key(folder)
    path = (Path(config.cache).expanduser() if config.cache else default_cache()) / f"{key}.safetensors"
    if not whole(path):
        if _dry.get():
            pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
            return pixels.expand(len(folder), 3, config.size, config.size), list(range(len(folder))), []
        with appearing(path) as file:
            _write_pixels(file, folder)
    tensors, metadata = map_weights(path, key)
    reasons = [str(reason) for reason in json.loads(metadata["skipped"])]
    reasons += ["..."] * (int(metadata["unread"]) - len(reasons))
    return tensors["pixels"], tensors["rows"].tolist(), reasons


def set_key(folder: "ImageFolder") -> str:
    """A hash of the set's names, sizes, dates and of how they are cut, made without reading a picture."""
    digest = hashlib.blake2b(f"square {folder.config.size}".encode(), digest_size=16)
    for entry in folder.entries:
        digest.update(f"\n{entry.path} {entry.stamp()}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _write_pixels(file: BinaryIO, folder: "ImageFolder") -> None:
    size, unread = folder.config.size, 0
    rows: list[int] = []
    reasons: list[str] = []
    file.seek(HEADER)
    with folder.reader() as reader:
        pictures = reader.in_order(range(len(folder)))
        for index, picture in tqdm(pictures, "reading images", len(folder), leave=False, unit="image"):
            if isinstance(picture, str):
                if folder.config.strict:
                    raise ValueError(picture)
                unread += 1
                reasons += [picture[:LONGEST]] if len(reasons) < TOLD else []
                continue
            file.write(to_pixels([picture]).numpy().data)
            rows.append(index)
    file.write(np.array(rows, dtype="<i4").data)
    end = len(rows) * 3 * size * size
    header = {
        "__metadata__": {"skipped": json.dumps(reasons, ensure_ascii=False), "unread": str(unread)},
        "pixels": {"dtype": "U8", "shape": [len(rows), 3, size, size], "data_offsets": [0, end]},
        "rows": {"dtype": "I32", "shape": [len(rows)], "data_offsets": [end, end + 4 * len(rows)]},
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    assert len(text) <= HEADER - 8
    file.seek(0)
    file.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))


@contextmanager
def growing(path: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[Mapping[str, Any]]:
    """A file of float32 tensors of these shapes, written row by row: a function for each, which appends rows.

    The file is that which `save_weights` writes. It stands at `path` after the block.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with appearing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        places = {name: 8 + len(text) + fields["data_offsets"][0] for name, fields in header.items()}

        def append(name: str, rows: Tensor) -> None:
            file.seek(places[name])
            places[name] += file.write(rows.detach().float().cpu().contiguous().numpy().data)

        yield {name: lambda rows, name=name: append(name, rows) for name in shapes}


def layout(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file of safetensors, and the byte where its tensors begin.

    Raises ValueError where the file is cut short or none. The library cannot say so of a file larger than
    memory: it maps it in a way that asks for as much memory to write to.
    """
    try:
        with open(path, "rb") as file:
            start, size = file.read(8), os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header = parse_json(file.read(min(length, size)))
        end = max(fields["data_offsets"][1] for name, fields in header.items() if name != "__metadata__")
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes instead of {8 + length + end}")
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise ValueError(f"{path} is damaged ({one_line(str(error))}); delete it, it is made anew") from error
    return header, 8 + length


def whole(path: Path) -> bool:
    """Whether there is such a file, and all of it."""
    try:
        layout(path)
    except ValueError:
        return False
    return True


def map_weights(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `load_weights`, but the tensors are views of the file, not to be written to."""
    header, base = layout(path)
    metadata = header.pop("__metadata__", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to is what is wanted
        flat = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r"))
    _mapped[flat.untyped_storage().data_ptr()] = (path, path.stat(), key, flat)
    tensors = {}
    for name, fields in header.items():
        start, end = (base + offset for offset in fields["data_offsets"])
        dtype = DTYPES[fields["dtype"]]
        aligned = flat[start:end] if start % dtype.itemsize == 0 else flat[start:end].clone()
        tensors[name] = aligned.view(dtype).view(fields["shape"])
    return tensors, metadata


def mapped_key(tensor: Tensor) -> str | None:
    """The key of the file that `tensor` is a view of, and which part of it; None where it is none."""
    found = _mapped.get(tensor.untyped_storage().data_ptr())
    return None if found is None else f"{found[2]} {tensor.storage_offset()} {tuple(tensor.shape)}"


def require_whole(*tensors: object) -> None:
    """Raises ValueError where a file that one of these is a view of was cut short: to read on would end the
    process by a signal. One that was deleted is whole as long as it is mapped."""
    for tensor in tensors:
        found = _mapped.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
        if found is None:
            continue
        path, before, *_ = found
        try:
            now = path.stat()
        except OSError:
            continue
        if now.st_ino == before.st_ino and now.st_size < before.st_size:
            raise ValueError(
                f"{path} has {now.st_size} bytes, it had {before.st_size} when the run began; go on with "
                "--resume, which makes it anew"
            )


def joined(parts: Iterable[Tensor], pixels: object) -> Tensor:
    """`torch.cat(parts)`, a row for each of `pixels`; where these are a file's, in a file without a name."""
    if not isinstance(pixels, Tensor) or mapped_key(pixels) is None:
        return torch.cat(list(parts))
    folder, end, whole = _mapped[pixels.untyped_storage().data_ptr()][0].parent, 0, torch.zeros(0)
    for part in parts:
        if end == 0:
            with tempfile.TemporaryFile(dir=folder) as file:
                shape = (len(pixels), *part.shape[1:])
                whole = torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))
        whole[end : end + len(part)] = part
        end += len(part)
    assert end == len(pixels)
    return whole
