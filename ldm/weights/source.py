"""Weight files of strangers: what one holds, and its tensors one at a time, never trusting a number in it.

`open_source` tells by content what a file is: safetensors, what `torch.save` wrote (`pickles.py`), or the
index of a model cut into shards. `Source.entries` is known from the header; the data is read when asked for,
through mappings of the file that are renewed as the reading moves on, so that a file of 8 GB needs little
memory. `checkpoint.py` turns the names into ours.

Everything here raises ValueError, or FileNotFoundError, in one line that names the file.
"""

import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.weights import pickles
from ldm.weights.io import MAX_HEADER_BYTES, Refusal, broken, one_line, parse_json, read_header

# What was touched of a mapped file counts as the process' memory, so it is let go after so many bytes
WINDOW = 192 * 2**20
PIECE = 64 * 2**20  # bytes checked or converted at a time
MAX_SHARING = 16  # tensors may share storage, but not add up to more than so many times the file

WANTED = "expected .safetensors, a .ckpt, .pt or .bin of torch.save, or the JSON index of a model's shards"

SIGNS = (
    (b"version https://git-lfs", "a git-lfs pointer in place of the weights; run `git lfs pull`"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
)

Fetch = Callable[[str], Tensor]


class Entry(NamedTuple):
    """What is known of a tensor before its data is read."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _File:
    """One file; `load` gives its tensors by name, mapping the file where `mapped`, else reading it whole."""

    path: Path
    load: Callable[[], Fetch]
    mapped: bool


@dataclass(frozen=True)
class Source:
    """An opened file, or index of shards: the `entries` it holds, and `read` for their data.

    `metadata` is what the header says beside (of safetensors and of an index; JSON is decoded), or the plain
    numbers and texts at the top of a pickle, such as `global_step`.
    """

    path: Path
    format: str  # "safetensors" or "pickle"
    metadata: dict[str, Any]
    entries: dict[str, Entry]
    _files: dict[str, _File]  # of each entry

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None = None, allow_nan: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors `names`, in that order, on the CPU; those that float as `dtype` where it is given.

        All is checked before `read` returns, so that nobody is left with half a model. Without `dtype` the
        tensors are views of the mapped file: they cost memory only when touched, and the file must stay as it
        is. With it each is fresh, and beside them at most 0.3 GB are used (a pickle of before torch 1.6,
        which is read whole, excepted).
        Raises ValueError for an unknown name, for a value beyond the range of `dtype`, and for NaN and
        infinite values, which `allow_nan` lets through with one warning.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.entries]
        if unknown:
            listed = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
            raise Refusal(self.path, f"holds no {listed}; it holds {len(self.entries)} other tensors")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"weights are converted to floating formats only, not {dtype}")
        opened: dict[_File, Fetch] = {}
        self._check(names, dtype, allow_nan, opened)
        stored = {self.entries[name].dtype for name in names}
        same = dtype is None or all(each == dtype or not each.is_floating_point for each in stored)
        return self._views(names, opened) if same or dtype is None else self._converted(names, dtype, opened)

    def _check(
        self, names: list[str], dtype: torch.dtype | None, allow_nan: bool, opened: dict[_File, Fetch]
    ) -> None:
        floating = [name for name in names if _is_inexact(self.entries[name].dtype)]
        bad: dict[str, int] = {}
        for name, _, piece in self._pieces(floating, opened):
            numbers = torch.view_as_real(piece) if piece.is_complex() else piece
            numbers = numbers.float() if numbers.dtype.itemsize == 1 else numbers  # float8 has no minimum
            if not len(numbers):
                continue
            ends = torch.stack(torch.aminmax(numbers))  # a NaN is both of them
            if not ends.isfinite().all():
                bad[name] = bad.get(name, 0) + int((~numbers.isfinite()).sum())
            elif dtype is not None and not piece.is_complex() and not ends.to(dtype).isfinite().all():
                raise ValueError(
                    one_line(
                        f"{self.path}: tensor {name} reaches {float(ends.abs().max()):g}, beyond {dtype} "
                        f"(at most {torch.finfo(dtype).max:g}); read it as bfloat16 or float32"
                    )
                )
        if bad:
            hold = "tensors hold" if len(bad) > 1 else "tensor holds"
            what = one_line(
                f"{self.path}: {len(bad)} {hold} NaN or infinite values, the first is {next(iter(bad))} "
                f"({sum(bad.values())} values in all)"
            )
            if not allow_nan:
                raise ValueError(f"{what}; the file is damaged; --allow-nan reads it anyway")
            warnings.warn(what, stacklevel=3)

    def _pieces(self, names: list[str], opened: dict[_File, Fetch]) -> Iterator[tuple[str, int, Tensor]]:
        """Name, index of the first number and flat view of each piece of each tensor; none stays mapped."""
        touched = 0
        for name in names:
            entry, file = self.entries[name], self._files[name]
            step = PIECE // entry.dtype.itemsize
            for start in range(0, max(1, math.prod(entry.shape)), step):
                if touched >= WINDOW:
                    _unmap(opened)
                    touched = 0
                piece = self._tensor(name, file, opened).reshape(-1)[start : start + step]
                touched += piece.nbytes
                yield name, start, piece
        _unmap(opened)

    def _views(self, names: list[str], opened: dict[_File, Fetch]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._tensor(name, self._files[name], opened).contiguous()

    def _converted(
        self, names: list[str], dtype: torch.dtype, opened: dict[_File, Fetch]
    ) -> Iterator[tuple[str, Tensor]]:
        out = torch.empty(0)
        for name, start, piece in self._pieces(names, opened):
            if start == 0:
                shape, kept = self.entries[name]
                out = torch.empty(shape, dtype=dtype if kept.is_floating_point else kept)
            out.view(-1)[start : start + len(piece)] = piece
            if start + len(piece) == out.numel():
                yield name, out

    def _tensor(self, name: str, file: _File, opened: dict[_File, Fetch]) -> Tensor:
        if file not in opened:
            opened[file] = file.load()
        try:
            tensor = opened[file](name)
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise Refusal(file.path, f"changed while it was read: {error}") from error
        if (tensor.shape, tensor.dtype) != self.entries[name]:
            raise Refusal(file.path, f"changed while it was read: tensor {name} differs")
        return tensor


def open_source(path: str | Path) -> Source:
    """What the weight file or shard index `path` holds, told by its content; no tensor is read.

    Raises FileNotFoundError, or ValueError for anything that is no whole weight file.
    """
    path = Path(path)
    start = _start(path)
    if start.lstrip()[:1] == b"{" and b"\0" not in start[:8]:
        return _open_index(path)
    return _open_file(path, start)


def _open_file(path: Path, start: bytes) -> Source:
    if start[3:9] != b"\0\0\0\0\0{":  # else the length of a header below 16 MB, and its begin
        if pickles.is_pickle(start):
            return _open_pickle(path)
        _refuse_others(path, start)
    shapes, metadata = read_header(path)
    entries = {name: Entry(*found) for name, found in shapes.items()}
    file = _File(path, lambda: _open_safetensors(path), mapped=True)
    return Source(path, "safetensors", metadata, entries, dict.fromkeys(entries, file))


def _open_pickle(path: Path) -> Source:
    pickles.check(path)
    tensors, plain = pickles.load(path, with_data=False)
    entries = {name: Entry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    size = path.stat().st_size
    if sum(entry.nbytes for entry in entries.values()) > MAX_SHARING * size:
        raise Refusal(path, f"claims tensors that add up to far more than its {size} bytes")
    file = _File(path, lambda: pickles.load(path)[0].__getitem__, mapped=pickles.is_zipped(path))
    return Source(path, "pickle", plain, entries, dict.fromkeys(entries, file))


def _open_safetensors(path: Path) -> Fetch:
    try:
        return safe_open(path, framework="pt").get_tensor
    except (SafetensorError, OSError) as error:
        raise broken(path, error) from error


def _start(path: Path) -> bytes:
    """The first bytes of a regular file; a pipe or a device is not even opened."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                start = file.read(512)
            if start:
                return start
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(one_line(f"weights file {path} does not exist")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Refusal(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise Refusal(path, f"is a folder; {WANTED}")
    raise Refusal(path, f"is {'empty' if stat.S_ISREG(mode) else 'a pipe or a device'}; {WANTED}")


def _refuse_others(path: Path, start: bytes) -> None:
    """Raise ValueError, saying what it is, for a file that cannot be safetensors."""
    what = next((name for sign, name in SIGNS if start.startswith(sign)), None)
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        what = "a web page, perhaps of a failed download"
    elif start[257:262] == b"ustar":
        what = "a tar archive; unpack it first"
    elif re.match(rb"\x08[\x01-\x14][\x12\x1a\x22\x3a]", start):
        what = "an ONNX model"
    elif what is None and _is_text(start):
        what = "a text"
    elif what is None and start[8:9] != b"{" and int.from_bytes(start[:8], "little") > MAX_HEADER_BYTES:
        what = "of an unknown kind"
    if what is not None:
        raise Refusal(path, f"is {what}; {WANTED}")


def _unmap(opened: dict[_File, Fetch]) -> None:
    for file in [file for file in opened if file.mapped]:
        del opened[file]


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        text = start[: error.start].decode()
        if error.start < len(start) - 3:  # else a letter was cut
            return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


# Shards


def _open_index(path: Path) -> Source:
    """The shards that an index lists. A stranger's index may only name files beside it."""
    try:
        with open(path, "rb") as stream:
            index = parse_json(stream.read(MAX_HEADER_BYTES + 1))
        where = index.get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError("it has no weight_map")
    except (OSError, ValueError) as error:
        raise Refusal(path, f"is JSON but no index of shards ({error}); {WANTED}") from error
    for name in where.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+", name) or name in (".", ".."):
            raise Refusal(path, f"names the shard {str(name)!r}, which is not a plain file name")
    # A hub's cache links both the index and the shards into another folder: there they are neighbours, too
    folders = {os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))}
    shards = {}
    for name in dict.fromkeys(where.values()):
        shard = path.parent / name
        if os.path.dirname(os.path.realpath(shard)) not in folders:
            raise Refusal(path, f"names the shard {name}, which is a link to another folder")
        shards[name] = _open_file(shard, _start(shard))
    astray = [key for key, name in where.items() if key not in shards[name].entries]
    if astray:
        raise Refusal(path, f"names {len(astray)} tensors that are not in their shards, first {astray[0]}")
    formats = {shard.format for shard in shards.values()}
    if len(formats) > 1:
        raise Refusal(path, "names shards of both formats, safetensors and pickle")
    metadata = index.get("metadata")
    return Source(
        path,
        formats.pop(),
        metadata if isinstance(metadata, dict) else {},
        {key: shards[name].entries[key] for key, name in where.items()},
        {key: shards[name]._files[key] for key, name in where.items()},
    )
