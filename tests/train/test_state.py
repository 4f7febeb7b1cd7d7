"""Training states on disk: written whole, read back bit for bit, and what happens to torn ones."""

import os

import pytest
import torch
from torch import nn

from train.state import held, newest_state, optimizer_tensors, restore_optimizer, save_state, sweep


def load_newest_state(folder):
    """All tensors of the newest whole state, its header and the notes."""
    saved, notes = newest_state(folder)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.shapes.items()}
    saved.read(tensors)
    return tensors, saved.header, notes


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


def test_round_trip_is_bit_equal(tmp_path):
    tensors = {
        "weights/model/a": torch.randn(3, 4),
        "weights/model/b": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "weights/model/c": torch.randn(5).bfloat16(),
        "weights/model/count": torch.tensor(7),
        "optimizer/model/0/step": torch.tensor(3.0),
    }
    header = {"config": {"run": {"lr": 0.1, "betas": [0.9, 0.99]}}, "sums": {"loss": [0.1 + 0.2, 3]}}
    path = save_state(tmp_path, 1200, tensors, header, keep=2)
    assert path.name == "step-00001200.safetensors"
    loaded, told, notes = load_newest_state(tmp_path)
    assert equal(loaded, tensors)
    assert told == {"step": 1200, **header}
    assert notes == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save_state(tmp_path, step, {"x": torch.tensor(step)}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000015.safetensors",
        "step-00000100.safetensors",
    ]
    tensors, header, _ = load_newest_state(tmp_path)
    assert (tensors["x"].item(), header["step"]) == (100, 100)


def test_old_states_stay_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"x": torch.zeros(1)}, {}, keep=1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 2, {"x": torch.zeros(1)}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 0.5, -1])
def test_a_torn_newest_file_is_passed_over(tmp_path, kept_bytes):
    save_state(tmp_path, 1, {"x": torch.full((1000,), 1.0)}, {}, keep=3)
    newest = save_state(tmp_path, 2, {"x": torch.full((1000,), 2.0)}, {}, keep=3)
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(len(whole) * kept_bytes) if isinstance(kept_bytes, float) else kept_bytes])
    tensors, header, notes = load_newest_state(tmp_path)
    assert header["step"] == 1
    assert torch.equal(tensors["x"], torch.full((1000,), 1.0))
    assert len(notes) == 1
    assert "passed over" in notes[0]
    assert "step-00000002.safetensors" in notes[0]


def test_a_file_being_written_is_not_read(tmp_path):
    save_state(tmp_path, 1, {"x": torch.zeros(1)}, {}, keep=2)
    (tmp_path / ".step-00000002.safetensors.77.part").write_bytes(b"half")
    _, header, notes = load_newest_state(tmp_path)
    assert (header["step"], notes) == (1, [])


def test_half_written_weights_are_swept_up_and_nothing_else(tmp_path):
    save_state(tmp_path / "states", 1, {"x": torch.zeros(1)}, {}, keep=2)
    for name in ("states/.step-00000002.safetensors.77.part", "cache/.train-ab.safetensors.8.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    others = [tmp_path / "states" / "notes.part", tmp_path / "cache" / ".film.part"]
    for path in others:
        path.write_text("not ours")
    sweep(tmp_path)
    left = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([tmp_path / "states" / "step-00000001.safetensors", *others])


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with held(tmp_path / "run"):
        with (
            pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on"),
            held(tmp_path / "run"),
        ):
            pass
        with held(tmp_path / "other"):
            pass
    with held(tmp_path / "run"):  # free again
        pass
    with pytest.raises(KeyError), held(tmp_path / "run"):
        raise KeyError
    with held(tmp_path / "run"):
        pass


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume: no whole checkpoint in"):
        load_newest_state(tmp_path / "states")
    (tmp_path / "step-00000002.safetensors").write_bytes(b"torn")
    with pytest.raises(FileNotFoundError, match=r"nothing to resume.*passed over.*step-00000002"):
        load_newest_state(tmp_path)


def trained(parameters, optimizer, steps):
    for step in steps:
        for i, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + i)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
    return parameters


def fresh():
    """Two parameters, one of them with its channels last in memory, as convolutions have in training."""
    torch.manual_seed(3)
    layout = torch.channels_last
    parameters = [
        nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout)),
        nn.Parameter(torch.randn(5)),
    ]
    return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=True)


def test_optimizer_goes_on_bit_for_bit(tmp_path):
    unbroken = trained(*fresh(), range(6))

    parameters, optimizer = fresh()
    trained(parameters, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, "optimizer/model")
    assert len(tensors) == 2 * 3  # step and two moments
    save_state(tmp_path, 3, tensors, {}, keep=1)

    restored, optimizer = fresh()
    for parameter, value in zip(restored, parameters, strict=True):
        parameter.data.copy_(value)
    restore_optimizer(optimizer, load_newest_state(tmp_path)[0], "optimizer/model")
    assert optimizer.state[restored[0]]["exp_avg"].stride() == restored[0].stride()
    trained(restored, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(unbroken, restored, strict=True))


def test_an_optimizer_that_has_not_moved_has_no_state():
    parameters, optimizer = fresh()
    assert optimizer_tensors(optimizer, "optimizer/late") == {}
    restore_optimizer(optimizer, {"optimizer/model/0/step": torch.tensor(1.0)}, "optimizer/late")
    assert not optimizer.state
    trained(parameters, optimizer, range(1))
    assert optimizer.state[parameters[0]]["step"].item() == 1
