"""Weights on disk: what is written comes back bit for bit; what is damaged or foreign is refused in one
line."""

import os
import struct
import time

import pytest
import torch
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
