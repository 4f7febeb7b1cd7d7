"""Files that a run reads besides its set: changed between stop and resume they are refused, and told by name."""

import shutil

import pytest
import test_conditioning as conditioned
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.io import load_weights, save_weights
from train.__main__ import main
from train.given import fingerprint, require_given

folder = conditioned.folder  # the fixture


def test_a_fingerprint_is_of_names_shapes_and_every_weight():
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()
    told = {fingerprint(layer)}
    layer[0].weight.data[1, 2] += 1
    told.add(fingerprint(layer))
    layer[1].running_mean[1] = 7
    told.add(fingerprint(layer))
    told.add(fingerprint(nn.Sequential(*layer, nn.Identity()).float()))
    told.add(fingerprint(nn.ModuleDict({"a": layer[0], "b": layer[1]})))
    assert len(told) == 5 and all(len(each) == 12 for each in told)
    assert fingerprint(layer.eval()) in told


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Of one step of two; with a frozen tower."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(conditioned.with_tower(folder, out)) == 0
    (out / "states" / "step-00000002.safetensors").unlink()
    shutil.rmtree(out / "model")
    return out


def resumed(run, files, tmp_path):
    """Exit status of going on with the run's copy, whose files are those in `files`."""
    shutil.copytree(run, tmp_path / "run")
    return main([*conditioned.with_tower(files, tmp_path / "run"), "--resume"])


def test_a_run_tells_what_it_read_and_goes_on_with_it(folder, run, tmp_path):
    _, header = load_weights(run / "states" / "step-00000001.safetensors")
    assert set(header["given"]) == {"autoencoder", "tower.checkpoint"}
    assert resumed(run, folder, tmp_path) == 0


@pytest.mark.parametrize(("file", "key"), [
    ("autoencoder", "autoencoder"),
    ("text_encoder", "tower.checkpoint"),
])  # fmt: skip
def test_another_file_of_the_same_name_is_refused(folder, run, tmp_path, capsys, file, key):
    path = folder / f"{file}.safetensors"
    before = path.read_bytes()
    tensors, header = load_weights(path)
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.dim() > 1)
    save_weights(path, {**tensors, name: tensor + 1e-3}, header)
    try:
        assert resumed(run, folder, tmp_path) == 2
    finally:
        path.write_bytes(before)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--resume with another file: {key} {path} has changed since the state was written (" in last


def test_a_state_that_tells_nothing_resumes(folder, run, tmp_path):
    """As all did before; whatever the files."""
    shutil.copytree(run, tmp_path / "before")
    state = tmp_path / "before" / "states" / "step-00000001.safetensors"
    tensors, header = load_weights(state)
    del header["given"]
    save_weights(state, tensors, header)
    assert resumed(tmp_path / "before", folder, tmp_path) == 0


def test_what_only_one_side_tells_is_no_difference():
    require_given(None, {"autoencoder": "a"}, None)
    require_given({"autoencoder": "a"}, {}, None)
    require_given({"autoencoder": "a"}, {"autoencoder": "a", "tower.checkpoint": "b"}, None)


def test_a_tower_that_is_trained_is_none_of_them(folder, tmp_path):
    task = conditioned.task_of(conditioned.with_tower(folder, tmp_path / "run", "tower.frozen=false"))
    assert set(task.given) == {"autoencoder"}
    assert isinstance(task.autoencoder, AutoencoderKL)
    with torch.no_grad():
        task.autoencoder.decoder.conv_out.bias += 1
    assert fingerprint(task.autoencoder) != task.given["autoencoder"]  # told once
