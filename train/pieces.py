"""A state whose pieces are written by the processes that hold them, on `torch.distributed.checkpoint` (DCP).

    states/step-00001200/shard-00002-model-00001-of-00001.safetensors    what rank 1 holds, and nothing else
    states/step-00001200/state.json    what the header of a state in one file says, and each tensor's shape

DCP's usual files end in a pickle, `.metadata`, which its reader unpickles. So these are its safetensors
files: each header says where its pieces lie in the whole, and any number of processes reads of them what it
needs. The folder is written under another name, flushed, and renamed once all processes are done: a kill
leaves either all of it or nothing that counts. DCP takes twice this process's pieces in memory, on the CPU.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.distributed import connected, is_first, together
from ldm.weights import io
from ldm.weights.io import Refusal, checked_shape, parse_json, read_header

HEADER = "state.json"
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def save_pieces(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write the folder `path`: all processes together, each the pieces it holds of `tensors`.

    Raises OSError, or Elsewhere, in all processes; nothing stands at `path` then.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    part = path.with_name(f".{path.name}.part")
    with together():
        if is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    flat = {name: t if isinstance(t, DTensor) else t.detach().contiguous() for name, t in tensors.items()}
    try:
        with connected():
            save(flat, storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True))
    except CheckpointException as error:  # no Exception, and the same in all processes
        shutil.rmtree(part, ignore_errors=True)
        raise first_failure(error.failures) from error
    with together():
        if is_first():
            shapes = {name: [io.DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in tensors.items()}
            text = json.dumps({"header": dict(header), "tensors": shapes}, ensure_ascii=False)
            io.write_atomically(part / HEADER, text)
            shutil.rmtree(path, ignore_errors=True)  # of this step, from before a resume
            os.rename(part, path)


def first_failure(failures: Mapping[int, tuple[BaseException, Any]]) -> Exception:
    """What the first of the processes that failed has to say."""
    error = failures[min(failures)][0]
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def open_pieces(path: Path) -> tuple[Shapes, dict[str, Any], Callable[[Mapping[str, Tensor]], None]]:
    """Shape and format of each tensor, the header, and what reads tensors of these names in place.

    Only what the given tensors hold is read: of a `DTensor` this process's piece. Raises ValueError where the
    folder is not whole.
    """
    try:
        told = parse_json((path / HEADER).read_bytes())
        shapes = {
            name: (checked_shape(shape), io.DTYPES[dtype]) for name, (dtype, shape) in told["tensors"].items()
        }
        header = dict(told["header"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(path, f"has no whole {HEADER} ({error})") from error
    held = dict.fromkeys(shapes, 0)
    for file in sorted(path.glob("*.safetensors")):
        for name, (shape, _) in read_header(file)[0].items():
            held[name] = held.get(name, 0) + math.prod(shape)
    for name, (shape, _) in shapes.items():
        if held[name] != math.prod(shape):
            raise Refusal(path, f"is not whole: {held[name]} of {math.prod(shape)} values of {name}")

    def read(into: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that each process reads for itself
                load(dict(into), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        except CheckpointException as error:
            raise Refusal(path, f"cannot be read: {first_failure(error.failures)!r}") from error

    return shapes, header, read
