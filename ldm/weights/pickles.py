"""The tensors of a stranger's pickle, which is a program: checked before torch's restricted reader runs it.

`torch.save` writes a zip archive (data.pkl, and a record of raw bytes for each storage); before torch 1.6 it
wrote five pickles and the storages behind them. `check` walks the instructions of the pickles without obeying
them and refuses any global outside a short list, storages that are not in the file, records that would have
to be inflated, and values that would never end. Only then does `torch.load(weights_only=True)` build the
tensors; there is no other way in. Used by `source.py` alone.

Everything here raises ValueError in one line that names the file.
"""

import io
import pickletools
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.weights.io import MAX_HEADER_BYTES, Refusal, checked_shape

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number
CONTAINERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "string_to_param")
ADVICE = "the file was not run; ask for a .safetensors file, or convert it with a tool you trust"

# What tensors and plain values need, by the names a pickle gives them
STORAGES = {
    "torch.storage.UntypedStorage": 1,
    **{f"torch.{kind}Storage": 1 for kind in ("Bool", "Byte", "Char")},
    **{f"torch.{kind}Storage": 2 for kind in ("Short", "Half", "BFloat16")},
    **{f"torch.{kind}Storage": 4 for kind in ("Int", "Float")},
    **{f"torch.{kind}Storage": 8 for kind in ("Long", "Double", "ComplexFloat")},
    "torch.ComplexDoubleStorage": 16,
}
CALLED = {
    "collections.OrderedDict",
    "collections.Counter",
    "__builtin__.set",  # Python 2's name, which pickles of its time still use
    "torch.Size",
    "torch.device",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
}
# Classes that the original's training left in its files, as the names of callbacks' states. Nobody looks at
# them, so a stand-in that does nothing takes their place; calling them is refused as for any other.
INERT = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
}
# How the original's embeddings hold their tensors; a table that calls nothing takes its place
PARAMETERS = "torch.nn.modules.container.ParameterDict"
FORMATS = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
# fmt: off
OPCODES = {  # those that torch's reader knows; NEWOBJ for a table of parameters alone
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID", "BINPUT",
    "BINUNICODE", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "GLOBAL", "LONG1",
    "LONG_BINGET", "LONG_BINPUT", "MARK", "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO", "REDUCE",
    "SETITEM", "SETITEMS", "SHORT_BINSTRING", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}
# fmt: on
MAX_DEPTH, MAX_NODES = 100, 10_000_000


def is_pickle(start: bytes) -> bool:
    """Whether a file that starts so is a zip archive or a pickle."""
    return start.startswith(ZIP) or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def is_zipped(path: Path) -> bool:
    """Whether the tensors of `path` can be mapped."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def check(path: Path) -> None:
    """Raise ValueError unless `load` may be asked to read `path`."""
    if tuple(map(int, re.findall(r"\d+", str(torch.__version__))[:2])) < (2, 10):
        raise Refusal(
            path, f"is a pickle, which torch {torch.__version__} reads unsafely; install 2.10 or newer"
        )
    with _translated(path):
        _check_archive(path) if is_zipped(path) else _check_legacy(path)


def load(path: Path, with_data: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The named tensors and the plain values of a file that was checked.

    The tensors are views of the mapped archive; those of an older file are read, or left without values.
    """
    with _translated(path):
        content = _torch_load(path, with_data)
        content = dict(enumerate(content)) if isinstance(content, list) else content
        if not isinstance(content, dict):
            raise Refusal(path, f"holds one {type(content).__name__} and no table of named tensors")
        tensors = _named_tensors(path, content)
        for name, tensor in tensors.items():
            _check_dense(path, name, tensor)
    plain = {str(key): value for key, value in content.items() if isinstance(value, str | int | float)}
    return tensors, plain


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Whatever a damaged pickle raises as ValueError: torch, zipfile and pickletools promise no kind."""
    try:
        yield
    except (Refusal, MemoryError):
        raise
    except Exception as error:
        raise Refusal(path, f"is damaged, or not of torch.save: {error or type(error).__name__}") from error


def _torch_load(path: Path, with_data: bool) -> Any:
    with ExitStack() as stack:
        stand_ins: list[Any] = [(type("StandIn", (), {}), name) for name in sorted(INERT)]
        stand_ins.append((_Parameters, PARAMETERS))
        stack.enter_context(torch.serialization.safe_globals(stand_ins))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not is_zipped(path):
            if not with_data:
                stack.enter_context(torch.serialization.skip_data())
            file = stack.enter_context(open(path, "rb"))
            return torch.load(file, map_location="cpu", weights_only=True)
        if path.name.endswith(".safetensors"):  # by which torch would judge it
            link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.pt"
            link.symlink_to(path.resolve())
            path = link
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _Parameters(dict[Any, Any]):
    """Takes a ParameterDict's place: its tensors by name, and nothing else of what it holds."""

    def __setstate__(self, state: Any) -> None:
        self.update(state["_parameters"])


def _named_tensors(path: Path, content: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of the known container in `content`, else of `content` itself; other values are ignored."""
    for table in (*(content.get(key) for key in CONTAINERS), content):
        if isinstance(table, dict):
            tensors = {
                str(name): value.detach() for name, value in table.items() if isinstance(value, Tensor)
            }
            if tensors:
                return tensors
    raise Refusal(path, f"holds no tensors by name, only {', '.join(map(str, [*content][:5])) or 'none'}")


def _check_dense(path: Path, name: str, tensor: Tensor) -> None:
    """Raise unless each number of a range of the storage is used once, in whatever order."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise Refusal(path, f"holds {name}, which is sparse or quantized; only dense tensors are read")
    checked_shape(tensor.shape)
    step = 1
    for stride, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side != 1 and stride != step and tensor.numel():
            raise Refusal(
                path, f"holds {name}, a view with gaps or repeated numbers; only dense tensors are read"
            )
        step *= side
    if tensor.is_neg() or tensor.is_conj():
        raise Refusal(
            path, f"holds {name}, which is marked as negated or conjugated; only plain tensors are read"
        )


def _check_archive(path: Path) -> None:
    """Raise unless the records are as torch writes them: one after the other, not packed, and complete."""
    with open(path, "rb") as file:
        names = _records(path, file)
        if names["data.pkl"].file_size > MAX_HEADER_BYTES:
            raise Refusal(path, f"has a pickle of {names['data.pkl'].file_size} bytes, which are too many")
        if "byteorder" in names and names["byteorder"].file_size != len("little"):
            raise Refusal(path, "was saved on a big-endian machine; convert it there")
        file.seek(names["data.pkl"].header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)  # over the name and what is extra
        storages, _ = _scan(path, io.BytesIO(file.read(names["data.pkl"].file_size)))
    for key, nbytes in storages.items():
        held = names[f"data/{key}"].file_size if f"data/{key}" in names else None
        if held != nbytes:
            raise Refusal(path, f"is damaged: it claims {nbytes} bytes for storage {key} and holds {held}")


def _records(path: Path, file: io.BufferedReader) -> dict[str, zipfile.ZipInfo]:
    """The records of a zip archive by their names inside its one folder."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 98))  # the longest end: parts of 56, 20 and 22 bytes
    end = file.read().rjust(98, b"\0")
    if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0":
        raise Refusal(path, "is a zip archive whose end is missing; download it again")
    wide = end[56:60] == b"PK\6\7"
    listing = struct.unpack_from("<Q", end, 40)[0] if wide else struct.unpack_from("<I", end, 88)[0]
    if listing > MAX_HEADER_BYTES:
        raise Refusal(path, f"is a zip archive that claims {listing} bytes of names")
    archive = zipfile.ZipFile(file)
    records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    folder = records[0].filename.split("/")[0] + "/" if records else ""
    names = {record.filename.removeprefix(folder): record for record in records}
    if "constants.pkl" in names:
        raise Refusal(path, "is a TorchScript program, not weights; ask for its state_dict as .safetensors")
    if "data.pkl" not in names:
        raise Refusal(path, f"is a zip archive but not of torch.save; it holds {', '.join([*names][:5])}")
    free = 0
    for record in records:
        if record.compress_type or record.flag_bits & 1 or record.compress_size != record.file_size:
            raise Refusal(
                path, f"is a zip archive with {record.filename} packed, which torch.save does not do"
            )
        if record.header_offset < free or not record.filename.startswith(folder):
            raise Refusal(path, f"is a zip archive with {record.filename} out of place")
        free = record.header_offset + 30 + len(record.orig_filename) + record.file_size
    if records[0].header_offset or free > archive.start_dir or len(names) < len(records):
        raise Refusal(path, "is a zip archive whose parts overlap")
    return names


def _check_legacy(path: Path) -> None:
    """Raise unless the file is five pickles and, behind them, just the storages that the last two name."""
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(MAX_HEADER_BYTES))
        size = file.seek(0, io.SEEK_END)
    _scan(path, stream)
    if not stream.getvalue().startswith(LEGACY):
        raise Refusal(path, "is a pickle, but not of torch.save")
    for _ in range(2):  # the version and the machine
        _scan(path, stream)
    storages, _ = _scan(path, stream)
    _, keys = _scan(path, stream)
    whole = stream.tell() + sum(8 + nbytes for nbytes in storages.values())
    if sorted(keys) != sorted(storages) or size != whole:
        raise Refusal(path, f"is damaged: it has {size} bytes and claims {whole}")


class _Value(NamedTuple):
    """What `_scan` keeps of a value: the nodes and the depth of its tree, and itself if a name or number."""

    nodes: int
    depth: int
    plain: Any = None


def _scan(path: Path, stream: io.BytesIO) -> tuple[dict[str, int], list[str]]:
    """Walk one pickle without obeying it; the bytes of each storage it claims, and all texts in it.

    Refuses globals, calls and instructions that weights do not need; and trees that would crash the
    interpreter or take it forever: a few instructions that name one tuple again and again make 2^300 nodes.
    """
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    storages: dict[str, int] = {}
    texts: list[str] = []
    strange, called = "", 0
    for opcode, argument, _ in pickletools.genops(stream):
        name, before = opcode.name, opcode.stack_before
        if name not in OPCODES:
            strange = strange or name  # told at the end: a global that it names says more
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        marked = pickletools.markobject in before
        first = marks.pop() - before.index(pickletools.markobject) if marked else len(stack) - len(before)
        if first < (marks[-1] if marks else 0):
            raise Refusal(path, "is damaged: its pickle takes values that are not there")
        taken = stack[first:]
        del stack[first:]

        plain = argument
        if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if argument else [value.plain for value in taken]
            plain = ".".join(part if isinstance(part, str) else "?" for part in parts)
            _check_global(path, plain)
        elif isinstance(argument, str):
            texts.append(argument)
        elif "TUPLE" in name:
            plain = tuple(None if isinstance(value.plain, tuple) else value.plain for value in taken[:6])
        elif name == "BINPERSID":
            key, nbytes = _storage(taken[0].plain)
            if storages.setdefault(key, nbytes) != nbytes:
                raise Refusal(
                    path, f"is damaged: it claims storage {key} with {nbytes} and {storages[key]} bytes"
                )
        elif name == "NEWOBJ" and (taken[0].plain, taken[1].plain) != (PARAMETERS, ()):
            strange = strange or name
        elif name == "REDUCE" and taken[0].plain not in CALLED:
            raise Refusal(path, f"calls {taken[0].plain}, which weights do not need; {ADVICE}")
        elif name in ("SETITEM", "SETITEMS") and not all(_is_key(key) for key in taken[1::2]):
            raise Refusal(path, "has a table whose keys are neither texts nor numbers")

        value = _Value(1 + sum(v.nodes for v in taken), 1 + max((v.depth for v in taken), default=0), plain)
        called += value.nodes if name == "REDUCE" else 0
        if max(value.nodes, called) > MAX_NODES or value.depth > MAX_DEPTH:
            raise Refusal(path, "is a pickle that would grow without end; the file is malicious")
        stack += [value] * len(opcode.stack_after)
    if strange:
        raise Refusal(path, f"uses the pickle instruction {strange}, which weights do not need; {ADVICE}")
    return storages, texts


def _check_global(path: Path, name: str) -> None:
    if "sparse" in name or "_rebuild_q" in name or name.startswith("torch.Q"):
        raise Refusal(path, f"holds sparse or quantized tensors ({name}); only dense ones are read")
    if not any(name in known for known in (CALLED, FORMATS, STORAGES, INERT, {PARAMETERS})):
        raise Refusal(path, f"needs the global {name}, which plain weights do not; {ADVICE}")


def _storage(identity: Any) -> tuple[str, int]:
    """Key and bytes of a storage, from the tuple ("storage", type, key, place, numbers[, None])."""
    if identity[0] == "module":  # of torch before 1.6
        raise ValueError("it holds the source code of a class, which is not run")
    kind, key, _, numbers = identity[1:5]
    if type(key) is not str or type(numbers) is not int or numbers < 0 or identity[5:] not in ((), (None,)):
        raise ValueError("a storage is no storage")
    return key, numbers * STORAGES[kind]


def _is_key(value: _Value) -> bool:
    """Whether it is hashed at once, and to a number that few others have."""
    return value.nodes == 1 and not (isinstance(value.plain, int) and abs(value.plain) >= 2**61)
