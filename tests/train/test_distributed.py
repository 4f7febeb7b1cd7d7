"""Training by several processes equals training by one: weights, logs, states, errors, and a process that dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from test_vq_task import config_of as stage_config
from tiny_task import log_of
from torch.testing import assert_close

from ldm.config import to_yaml
from ldm.weights.io import load_weights
from train.__main__ import main
from train.distributed import buckets, own_parts, parts_of
from train.loop import RunConfig
from train.state import load_state

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ends(folder):
    """How each rank of each job of `ranks.py` ended: the error's name (or none), and its text (or the result)."""
    command = [sys.executable, ranks.__file__, str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def state_of(folder, step=12):
    [path] = (folder / "states").glob(f"step-{step:08d}*")
    return load_state(path)[0]


def assert_same_run(a, b, steps=12):
    """Weights, moving averages and optimisers to 1e-6, and the logs."""
    x, y = state_of(a, steps), state_of(b, steps)
    assert x.keys() == y.keys()
    for name in x:
        assert_close(x[name], y[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        if name.startswith(("weights/", "ema/")):
            assert_close(x[name], y[name], rtol=0, atol=1e-6)
    for row, other in zip(log_of(a), log_of(b), strict=True):
        if "skipped" in row:
            continue
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def succeeded(ends, name):
    assert [end[0] for end in ends[name]] == [""] * len(ends[name]), ends[name]


# --- the same run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("players", ["tiny", "duel"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_batch_fixes_the_result_however_many_processes_share_it(ends, folder, players, world):
    """1 process with accumulate 4, 2 with 2, 4 with 1; with dropout, clipping, moving average, two players."""
    succeeded(ends, "equal1")
    succeeded(ends, f"equal{world}")
    assert_same_run(folder / f"{players}1", folder / f"{players}{world}")


@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(ends, folder, first, then):
    for kind, text in ends[f"stopped{first}"]:
        assert kind == "Interrupted" and "stopped at step 7 of 12, saved" in text
    succeeded(ends, f"resumed{then}")
    assert_same_run(folder / f"from{first}to{then}", folder / "tiny1")


def test_a_first_stage_with_all_its_parts_trains_alike(ends, folder):
    """The codes, their counters and revivals, the discriminator, whose statistics alone are each part's own."""
    succeeded(ends, "first_stage1")
    succeeded(ends, "first_stage2")
    a, b = state_of(folder / "stage1", 6), state_of(folder / "stage2", 6)
    assert torch.equal(a["weights/model/usage.idle"], b["weights/model/usage.idle"])
    for name in a:
        if name.startswith(("weights/", "ema/")) and "running" not in name and "num_batches" not in name:
            assert_close(a[name], b[name], rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    logs = [[row for row in log_of(folder / f"stage{world}") if "l1" in row] for world in (1, 2)]
    for row, other in zip(*logs, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert sum(row["revived"] for row in logs[0]) > 0


def test_a_diffusion_model_trains_alike(ends, folder):
    """With dropout, caption dropout and a text tower, in 1 process and 2, which share the cache of latents."""
    succeeded(ends, "diffusion1")
    succeeded(ends, "diffusion2")
    assert_same_run(folder / "diffusion1", folder / "diffusion2", 4)
    assert len(list((folder / "diffusion2" / "cache").glob("train-*"))) == 1
    assert (folder / "diffusion2" / "model").is_dir()


def test_weights_in_pieces_are_the_same_run(ends, folder):
    """run.parallel=fsdp: weights, optimiser, moving average, log, the exported model."""
    succeeded(ends, "in_pieces")
    assert_same_run(folder / "pieces", folder / "diffusion1", 4)
    for name in ("unet.safetensors", "text_encoder.safetensors"):
        (a, _), (b, _) = (load_weights(folder / run / "model" / name) for run in ("pieces", "diffusion1"))
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], rtol=1e-3, atol=1e-6)  # in half precision
    assert len(list((folder / "pieces" / "previews").iterdir())) == 1


def test_weights_in_pieces_train_in_mixed_precision(ends, folder):
    """The pieces stay in float32, and the run is that of one process.

    Sums of float32 in another order (1e-11 in the weights) make a few weights round to another neighbour in
    16 bits from the third step on. That latents were once encoded in 16 bits by a single process, and in 32
    by several, had made 100 times as much.
    """
    for world in (1, 2):
        succeeded(ends, f"bfloat16_{world}")
    caches = [sorted((folder / f"bfloat16_{world}" / "cache").glob("train-*")) for world in (1, 2)]
    assert [path.read_bytes() for path in caches[0]] == [path.read_bytes() for path in caches[1]] != []
    early, late = ([state_of(folder / f"bfloat16_{world}", step) for world in (1, 2)] for step in (2, 4))
    for name, value in early[0].items():
        assert value.dtype == early[1][name].dtype == torch.float32
        assert_close(value, early[1][name], rtol=0, atol=1e-8)
    off = torch.cat([(late[0][k] - late[1][k]).abs().flatten() for k in late[0] if k.startswith("weights/")])
    assert off.max() <= 2e-5 and (off > 1e-6).float().mean() <= 2e-3  # 1.0e-5 and 5.8e-4
    for row, other in zip(*(log_of(folder / f"bfloat16_{world}") for world in (1, 2)), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("then", [2, 1])
def test_a_run_in_pieces_goes_on_in_pieces_or_in_one_process(ends, folder, then):
    succeeded(ends, f"in_pieces_resumed{then}")
    assert_same_run(folder / f"pieces{then}", folder / "diffusion1", 4)


def test_ranks_see_disjoint_data_that_covers_an_epoch_once_and_other_noise(ends):
    (_, a), (_, b) = ends["epoch"]
    assert len(a["seen"]) == len(b["seen"]) == 20
    assert sorted(a["seen"] + b["seen"]) == list(range(40))
    assert len({*a["noise"], *b["noise"]}) == 20


def test_rank_0_alone_validates_and_shows_and_all_have_the_same_weights(ends):
    first, second = (result for _, result in ends["watched"])
    assert first == {
        "validated": 4,
        "previews": ["step-00000006.png", "step-00000012.png"],
        "alike": True,
    }
    assert second == {"validated": 0, "previews": [], "alike": True}


def test_buffers_are_averaged_and_counters_take_the_smallest(ends):
    assert [result for _, result in ends["buffers"]] == [
        [[0.5, 0.5], [5, 2], [0.0, 0.0]],
        [[0.5, 0.5], [5, 2], [1.0, 1.0]],
    ]


def test_a_step_that_is_bad_in_one_process_is_skipped_by_all(ends, folder):
    succeeded(ends, "skipping1")
    succeeded(ends, "skipping2")
    skipped = [row for row in log_of(folder / "skipping2") if "skipped" in row]
    assert skipped == [row for row in log_of(folder / "skipping1") if "skipped" in row]
    assert [row["step"] for row in skipped] == [7]
    assert_same_run(folder / "skipping1", folder / "skipping2")


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("differing", "ValueError", r"different values; rank 0 and rank 1: run\.lr: 0\.05 -> 0\.1; give all"),
        (
            "uneven",
            "ValueError",
            r"run\.batch 9 must be a multiple of run\.accumulate 1 times the number of processes 2",
        ),
        ("other_parts", "ValueError", r"parts of a batch \(run\.accumulate x processes\): 4 -> 8"),
        ("nan", "ValueError", r"model: the loss is nan in step 7; the state saved last is untouched"),
        ("no_room", "OSError", "No space left on device"),
    ],
)
def test_one_process_says_what_is_wrong_and_all_end(ends, name, kind, message):
    (first, text), (second, _) = ends[name]
    assert (first, second) == (kind, "Elsewhere")
    assert re.search(message, text)


def test_the_error_of_another_rank_is_told_by_it(ends):
    assert ends["nested"] == [["Elsewhere", "rank 1 failed"], ["ValueError", "a torn picture"]]


def test_rank_0_collects_what_the_others_have(ends):
    succeeded(ends, "collected")
    (_, first), (_, second) = ends["collected"]
    assert first == [[0, "x", 1, "x"], [[0, 0], [1, 1], [1, 1]]]
    assert second == [[], []]


def test_nothing_is_written_where_processes_differ(ends, folder):
    assert ends["differing"]
    assert not (folder / "differing").exists()


def test_a_killed_process_ends_the_others_and_the_run_goes_on(ends, folder):
    (kind, text), (status, _) = ends["killed"]
    assert kind == "Lost" and status == "status 9"
    assert "rank 0 of 2: another process of this job has ended" in text and "--resume" in text
    succeeded(ends, "resumed after kill")
    assert_same_run(folder / "killed", folder / "tiny1")


# --- by torchrun --------------------------------------------------------------------------------------------


@pytest.fixture
def config(ends, folder, tmp_path):
    """A small first stage of the pictures that `ranks.py` has painted."""
    task = stage_config(folder / "pictures", tmp_path / "run", {}, {"codebook_size": None})
    text = to_yaml(replace(task, run=replace(task.run, steps=40, batch=8, checkpoint_every=5, keep=100)))
    (tmp_path / "stage.yaml").write_text(text)
    return tmp_path / "stage.yaml"


def torchrun(config, *options, program=("-m", "train")):
    """`torchrun --nproc-per-node 2 -m train autoencoder CONFIG`, as a user types it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*launcher, "autoencoder", str(config), *options]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=config.parent, text=True, **pipes)


def workers(process):
    """The processes that a launcher has started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in listed.read_text().split()]


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert condition(), process.communicate()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_under_torchrun_a_killed_rank_ends_the_job_with_one_line_and_one_process_finishes_the_run(config):
    process = torchrun(config)
    states = config.parent / "run" / "states"
    wait_for(lambda: any(states.glob("*.safetensors")), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.count("parameters to train") == 1 and "trained;" not in out
    told = [line for line in errors.splitlines() if "ldm-train: error: rank 0 of 2: another process" in line]
    assert len(told) == 1 and "with --resume" in told[0], errors
    assert "train/loop.py" not in errors  # no traceback of ours
    saved = max(int(path.stem[5:]) for path in states.glob("*.safetensors"))
    assert 5 <= saved < 40
    assert main(["autoencoder", str(config), "run.accumulate=2", "--resume"]) == 0
    assert (config.parent / "run" / "model" / "autoencoder.safetensors").exists()
    rows = [row["step"] for row in log_of(config.parent / "run") if "loss" in row]
    assert rows == list(range(1, 41))


@pytest.mark.slow
def test_under_torchrun_a_signal_stops_all_and_a_resumed_run_ends_well(config):
    process = torchrun(config)
    states = config.parent / "run" / "states"
    wait_for(lambda: any(states.glob("*.safetensors")), process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("saved; go on with: ldm-train autoencoder") == 1
    process = torchrun(config, "--resume")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.count("trained; the model is in") == 1


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_told_once(config):
    (config.parent / "run").mkdir()
    (config.parent / "run" / "thesis.tex").write_text("years of work")
    command = config.parent / "ldm-train"  # as it is installed
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom train.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    process = torchrun(config, program=("--no-python", str(command)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("ldm-train: error: ") == 1 and "no run folder (it holds thesis.tex)" in errors
    assert "exitcode  : 2" in errors


# --- shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": "tensor"}, r"run\.parallel must be 'ddp' or 'fsdp', got 'tensor'"),
        ({"parallel": "fsdp", "compile": True}, r"run\.parallel=fsdp does not go with run\.compile=true"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(out="x", **values)


def test_a_first_stage_is_not_cut_up(tmp_path):
    with pytest.raises(ValueError, match=r"run\.parallel=fsdp is for diffusion models; set it to ddp"):
        stage_config(tmp_path, tmp_path / "run", {}, parallel="fsdp")


def test_a_single_process_has_all_parts():
    assert parts_of(3) == 3
    assert list(own_parts(3)) == [0, 1, 2]


def test_buckets_hold_every_tensor_in_order_and_one_format(monkeypatch):
    monkeypatch.setattr("train.distributed.BUCKET", 10)
    sizes = [4, 4, 4, 20, 1, 1]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    shared = list(buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in shared] == [[4, 4], [4], [20], [1, 1], [1]]
    assert [id(t) for bucket in shared for t in bucket] == [id(t) for t in tensors]
    assert list(buckets([])) == []
