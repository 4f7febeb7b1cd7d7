"""Weights on disk: what is written comes back bit for bit; what is damaged or foreign is refused in one
line."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ldm.weights.io import load_strict, load_weights, read_metadata, save_weights, write_atomically


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(
        path,
        {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(4, dtype=torch.float16)},
        {"config": {"n": [1, None]}},
    )
    return path


def test_round_trip_is_bit_equal(file):
    tensors, metadata = load_weights(file)
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3).T)
    assert tensors["b"].dtype == torch.float16
    assert metadata == {"config": {"n": [1, None]}} == read_metadata(file)


def test_the_library_reads_every_format_that_is_written(tmp_path):
    """Aligned, whatever the strides; strings stay strings in the header."""
    formats = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"t{i}": (torch.rand(3, 5) * 9).to(dtype) for i, dtype in enumerate(formats)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.rand(5, 3).T}
    save_weights(tmp_path / "file", tensors, {"format": "pt", "more": [1]})
    read = load_file(tmp_path / "file")
    assert {name: tensor.dtype for name, tensor in read.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "more": "[1]"}
    data = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_writing_holds_one_copy_at_a_time(tmp_path):
    """200 MB of tensors may not cost 200 MB more while they are written."""
    code = (
        "import resource, sys, torch\n"
        "from ldm.weights.io import save_weights\n"
        "tensors = {str(i): torch.ones(2_500_000) for i in range(20)}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "save_weights(sys.argv[1], tensors)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 60


def test_any_truncation_is_refused(file, tmp_path):
    whole = file.read_bytes()
    for length in [*range(12), len(whole) // 2, len(whole) - 1]:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"\A[^\n]*cut.safetensors[^\n]*\Z"):
            load_weights(cut)


@pytest.mark.parametrize("claimed", [2**63, 100_000_001, 2**32])
def test_absurd_header_lengths_are_refused_at_once(tmp_path, claimed):
    path = tmp_path / "absurd.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}" * 50)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="header claims"):
        load_weights(path)
    assert time.perf_counter() - begun < 1


def test_a_pickle_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    torch.save({"state_dict": Bomb()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(tmp_path / "model.ckpt")
    assert not canary.exists()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_weights(tmp_path / "nothing.safetensors")


def test_strict_loading_lists_what_differs_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(
        ValueError, match=r"1 missing: bias; 1 unexpected: extra; 1 wrong shape: weight \(2, 2\) for \(3, 2\)"
    ):
        load_strict(module, {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, "file")
    assert torch.equal(module.weight, before)


def test_not_finite_weights_are_refused_by_name():
    module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="tensor weight holds NaN"):
        load_strict(module, {"weight": torch.full((3, 2), float("nan")), "bias": torch.zeros(3)}, "file")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
