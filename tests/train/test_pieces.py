"""States in pieces: each process writes what it holds, any number of them goes on from it, and nothing is pickled."""

import json
import math
import re
import shutil
import subprocess
import sys

import piece_ranks
import pytest
import torch
from test_distributed import ENVIRONMENT, assert_same_run, state_of, succeeded
from tiny_task import log_of
from torch import nn

from ldm.weights.io import read_header
from train.loop import RunConfig
from train.sharded import building_device, tensors
from train.state import load_state, newest_state, save_state, sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@pytest.fixture(scope="module")
def ends(folder):
    """How each rank of each job of `piece_ranks.py` ended."""
    command = [sys.executable, piece_ranks.__file__, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.fixture
def run(ends, folder, tmp_path):
    """A copy of a run of four processes with three states, of steps 4, 8 and 12, to be damaged."""
    succeeded(ends, "pieces4")
    return shutil.copytree(folder / "pieces4", tmp_path / "run")


def test_a_run_in_pieces_is_the_run_of_one_process(ends, folder):
    succeeded(ends, "plain1")
    succeeded(ends, "pieces4")
    assert_same_run(folder / "pieces4", folder / "plain")


def test_what_is_cut_up_was_initialised_as_in_one_process(ends):
    """Bit for bit: each process draws the whole network and keeps its pieces."""
    assert [result["alike"] for _, result in ends["pieces4"]] == [[True] * 4] * 4


def test_each_process_writes_its_pieces_alone(ends, folder):
    """Nobody holds a whole tensor at a save (that is an error in `piece_ranks.py`), and no value is written twice."""
    whole = sum(
        tensor.numel() for name, tensor in state_of(folder / "plain").items() if name.startswith("weights/")
    )
    held = [result["held"] for _, result in ends["pieces4"]]
    assert [sum(each) for each in zip(*held, strict=True)] == [whole] * 3
    assert max(map(max, held)) <= 16 + 8 + 1 + 1  # a filter, a row of two (of four processes), their biases
    for path in (folder / "pieces4" / "states").iterdir():
        files = sorted(path.glob("*.safetensors"))
        assert len(files) == 4
        shapes = [shape for file in files for shape, _ in read_header(file)[0].values()]
        assert sum(map(math.prod, shapes)) == sum(tensor.numel() for tensor in load_state(path)[0].values())


def test_nothing_in_it_is_pickled_or_unpickled(run, monkeypatch):
    for path in (run / "states").rglob("*"):
        assert path.is_dir() or path.suffix == ".safetensors" or path.name == "state.json"
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(name))
    assert load_state(run / "states" / "step-00000012")[1]["step"] == 12


@pytest.mark.parametrize("name", ["one", "two", "copies", "from_plain"])
def test_any_number_of_processes_goes_on_from_either_kind(ends, folder, name):
    """A state of four in one process, in two with pieces of their own, in two with copies; a plain one in four."""
    succeeded(ends, name)
    assert_same_run(folder / name, folder / "plain")
    last = folder / name / "states" / "step-00000012"
    assert last.is_dir() == (name in ("two", "from_plain"))


def test_a_bad_step_in_pieces_is_skipped_by_all(ends, folder):
    """Though one rank alone meets it."""
    succeeded(ends, "bad1")
    succeeded(ends, "bad2")
    skipped = [[row for row in log_of(folder / f"bad{world}") if "skipped" in row] for world in (1, 2)]
    assert skipped[0] == skipped[1]
    assert [row["step"] for row in skipped[0]] == [7]
    assert_same_run(folder / "bad2", folder / "bad1")


def damage_shard(path):
    shard = sorted(path.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-4])


def lose_shard(path):
    sorted(path.glob("*.safetensors"))[1].unlink()


def damage_header(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-9])


def lose_header(path):
    (path / "state.json").unlink()


def change_header(path):
    (path / "state.json").write_text('{"header": {}, "tensors": {"weights/a": ["F32", [3]]}}')


def empty(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "damage", [damage_shard, lose_shard, damage_header, lose_header, change_header, empty]
)
def test_a_torn_newest_folder_is_passed_over(run, damage):
    damage(run / "states" / "step-00000012")
    saved, notes = newest_state(run / "states")
    assert saved.header["step"] == 8
    assert len(notes) == 1 and re.match(r"passed over: .*step-00000012", notes[0])


def test_only_the_newest_are_kept_of_both_kinds(run):
    names = ["step-00000004", "step-00000008", "step-00000012"]
    assert sorted(path.name for path in (run / "states").iterdir()) == names
    save_state(run / "states", 12, {"x": torch.zeros(1)}, {}, keep=2)
    left = sorted(path.name for path in (run / "states").iterdir())
    assert left == ["step-00000008", "step-00000012.safetensors"]  # of one step one state


def test_a_process_without_room_ends_all_with_one_line(ends, folder):
    (first, text), (second, _) = ends["no_room"]
    assert (first, second) == ("OSError", "Elsewhere")
    assert "No space left on device; the state of step 8 is not saved, those before it are whole" in text
    assert [path.name for path in (folder / "no_room" / "states").iterdir()] == ["step-00000004"]


def test_a_process_killed_at_a_save_leaves_nothing_that_counts(ends, folder):
    (kind, text), (status, _) = ends["killed"]
    assert kind == "Lost" and status == "status 9" and "--resume" in text
    succeeded(ends, "after")
    assert_same_run(folder / "killed", folder / "plain")
    assert not list((folder / "killed" / "states").glob(".*"))  # swept


def test_half_a_folder_is_swept_up(tmp_path):
    half = tmp_path / "states" / ".step-00000012.part"
    half.mkdir(parents=True)
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert not half.exists()


def test_what_is_held_has_the_names_of_the_state(monkeypatch):
    """Parameters and lasting buffers, also of shared modules; not those that a state leaves out."""
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": nn.Sequential(shared, nn.BatchNorm1d(2)), "b": shared})
    module.register_buffer("count", torch.zeros(1))
    module["a"].register_buffer("scratch", torch.zeros(1), persistent=False)
    monkeypatch.setattr("train.sharded.is_sharded", lambda module: True)
    found, expected = tensors(module), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].data_ptr() == expected[name].data_ptr() for name in found)


def test_what_will_be_cut_up_is_built_on_the_cpu(monkeypatch):
    run = RunConfig(out="x", device="meta", parallel="fsdp")
    assert building_device(run).type == "meta"  # in one process nothing is
    monkeypatch.setattr("train.sharded.world_size", lambda: 2)
    assert building_device(run).type == "cpu"
    assert building_device(RunConfig(out="x", device="meta")).type == "meta"
