"""What goes wrong while a run trains: killed at any moment, disk full, folder in use, values that are not finite,
signals, memory that runs out. Nothing saved is lost, and each error is one line.
"""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import killed
import pytest
import torch
from tiny_task import Duel, TinyTask, assert_equal_runs, config_of, log_of, send, unplug
from torch import nn

import ldm.weights.io as io
from ldm.weights.io import load_weights
from train import __main__ as command
from train.loop import Interrupted, train
from train.plan import memory_advice

ROOT = Path(__file__).parents[2]


def python(*arguments, stdin=None):
    """A process of its own, which finds the packages and the helpers of these tests."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True, **pipes)


def states(folder):
    return sorted(path.name for path in (folder / "states").iterdir())


def one_line(capsys):
    """The last line of stderr, after the progress bar."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("ldm-train: error: ")
    return lines[-1]


@pytest.fixture
def main(monkeypatch):
    """`ldm-train diffusion CONFIG` with a task of the tests in place of the one that CONFIG names."""

    def run(task, *options):
        monkeypatch.setattr(command, "build_task", lambda *_: task)
        return command.main(["diffusion", "tiny.yaml", *options])

    return run


# --- kill -9 ------------------------------------------------------------------------------------------------


def killed_run(folder, kills):
    process = python(killed.__file__, folder, kills, 2)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    ends = [line for line in out.splitlines() if line.startswith("end:")]
    assert [line.rsplit(" ", 1)[-1] for line in ends[:-1]] == ["killed"] * kills, out + errors
    assert ends[-1].endswith("exit 0"), errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed runs: sums over more threads have other last bits
    train(TinyTask(killed.settings(folder)), False, "")
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_equals_unbroken(whole, tmp_path, kills):
    killed_run(tmp_path, kills)
    assert_equal_runs(whole, tmp_path, steps=killed.STEPS)
    assert states(tmp_path) == ["step-00000117.safetensors", "step-00000120.safetensors"]  # no half files


def test_what_a_kill_left_half_written_is_swept_up(unbroken, tmp_path):
    with pytest.raises(RuntimeError):
        train(TinyTask(config_of(tmp_path), at={8: unplug}), False, "")
    (tmp_path / "states" / ".step-00000010.safetensors.77.part").write_bytes(b"half")
    train(TinyTask(config_of(tmp_path)), True, "")
    assert states(tmp_path) == ["step-00000010.safetensors", "step-00000012.safetensors"]
    assert_equal_runs(unbroken, tmp_path)


# --- disk full ----------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """From step 10 on, a state being written meets a full disk after 1000 bytes."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 1000

        def write(self, data):
            if len(data) > self.left:
                self.file.write(bytes(data)[: self.left])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= len(data)
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def opened(path, mode):
        file = open(path, mode)  # noqa: SIM115
        return Full(file) if ".step-00000010" in str(path) else file

    monkeypatch.setattr(io, "open", opened, raising=False)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_costs_the_new_state_only(unbroken, tmp_path, capsys, main, full_disk, monkeypatch, keep):
    assert main(TinyTask(config_of(tmp_path, keep=keep))) == 2
    line = one_line(capsys)
    assert "No space left on device" in line and "the state of step 10 is not saved" in line
    assert "--resume" in line and str(tmp_path / "states") in line
    assert states(tmp_path) == ["step-00000005.safetensors"]
    monkeypatch.undo()  # room again
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


def test_a_full_disk_at_the_log_is_named_and_costs_nothing(unbroken, tmp_path, capsys, main):
    """`/dev/full` has no room for anything; it takes the log's place after the state of step 5."""
    log = tmp_path / "log.jsonl"
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")

    def fill(loss):
        log.rename(tmp_path / "kept")
        log.symlink_to("/dev/full")
        return loss

    assert main(TinyTask(config_of(tmp_path), at={6: fill})) == 2
    assert one_line(capsys).endswith(f"{log}: No space left on device")
    assert states(tmp_path) == ["step-00000005.safetensors"]
    (tmp_path / "kept").replace(log)
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


def test_a_full_disk_at_the_model_leaves_the_last_state_to_export_from(unbroken, tmp_path, capsys, main):
    class Full(TinyTask):
        def export(self, folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "tiny.safetensors"))

    assert main(Full(config_of(tmp_path))) == 2
    assert one_line(capsys).endswith("tiny.safetensors: No space left on device")
    assert states(tmp_path)[-1] == "step-00000012.safetensors"
    train(TinyTask(config_of(tmp_path)), True, "")  # trains nothing, exports
    assert_equal_runs(unbroken, tmp_path)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, capsys, main):
    (tmp_path / "file").write_text("no folder")
    assert main(TinyTask(config_of(tmp_path / "file" / "run"))) == 2
    assert "file" in one_line(capsys)
    assert (tmp_path / "file").read_text() == "no folder"


def test_nothing_to_resume_is_no_new_run(tmp_path, capsys, main):
    (tmp_path / "empty" / "states").mkdir(parents=True)
    for name in ("absent", "empty"):
        assert main(TinyTask(config_of(tmp_path / name)), "--resume") == 2
        line = one_line(capsys)
        assert "nothing to resume" in line and str(tmp_path / name) in line
        assert not (tmp_path / name / "log.jsonl").exists()


# --- a folder in use ----------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from train.state import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    process = python("-c", HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_by_a_live_process_is_refused_until_it_is_killed(
    unbroken, tmp_path, capsys, main, holder
):
    (tmp_path / "states").mkdir()
    for options in ([], ["--resume"]):
        assert main(TinyTask(config_of(tmp_path)), *options) == 2
        assert f"{tmp_path} is in use by process {holder.pid} on " in one_line(capsys)
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "config.yaml").exists()
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").read_text()  # stale, and in nobody's way
    train(TinyTask(config_of(tmp_path)), False, "")
    assert_equal_runs(unbroken, tmp_path)


def test_a_lock_file_without_its_process_means_nothing(tmp_path):
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on here")  # a live one, but it holds nothing
    train(TinyTask(config_of(tmp_path, steps=1)), False, "")


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and no run folder \(it holds thesis\.tex\)"):
        train(TinyTask(config_of(tmp_path)), False, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.tex"]


def test_a_finished_model_whose_states_are_gone_is_not_overwritten(tmp_path):
    train(TinyTask(config_of(tmp_path, steps=1)), False, "")
    (tmp_path / "states" / "step-00000001.safetensors").unlink()
    before = (tmp_path / "model" / "tiny.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a finished model"):
        train(TinyTask(config_of(tmp_path, lr=1.0)), False, "")
    assert (tmp_path / "model" / "tiny.safetensors").read_bytes() == before


# --- values that are not finite, gradients that explode -----------------------------------------------------

nan = math.nan
BAD = {
    "loss nan": lambda loss: loss * nan,
    "loss inf": lambda loss: loss + math.inf,
    "gradient nan": lambda loss: loss + (0 * loss).sqrt(),
}


def skipped(folder):
    return [(row["step"], row["skipped"]) for row in log_of(folder) if "skipped" in row]


@pytest.mark.parametrize("way", BAD)
def test_a_skipped_step_moves_nothing(tmp_path, way):
    """Step 5 of 5 is skipped: what is saved after it is what stood before it."""
    every = {"checkpoint_every": 1, "log_every": 1, "keep": 9}
    train(TinyTask(config_of(tmp_path, steps=5, on_nonfinite="skip", **every), at={4: BAD[way]}), False, "")
    four, header_four = load_weights(tmp_path / "states" / "step-00000004.safetensors")
    five, header_five = load_weights(tmp_path / "states" / "step-00000005.safetensors")
    assert four.keys() == five.keys()
    assert all(torch.equal(four[name], five[name]) for name in four)
    assert header_five["updates"] == header_four["updates"] == {"model": 4}
    assert (header_four["skips"], header_five["skips"]) == ({"model": 0}, {"model": 1})
    ((step, why),) = skipped(tmp_path)
    what, value = way.split()
    assert step == 5
    assert why == f"model: the {'norm of the ' * (what == 'gradient')}{what} is {value} in step 5"
    rows = [row for row in log_of(tmp_path) if "lr" in row]
    assert [("loss" in row) for row in rows] == [True, True, True, True, False]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_what_follows_a_skipped_step_is_as_if_it_had_not_been_tried(tmp_path):
    """The gradients of the bad step are gone: the next one moves by its own."""
    run = {"steps": 2, "warmup": 0, "lr_schedule": "constant", "dropout": 0.0, "on_nonfinite": "skip"}
    train(TinyTask(config_of(tmp_path, **run), at={0: BAD["loss nan"]}), False, "")
    state, _ = load_weights(tmp_path / "states" / "step-00000002.safetensors")
    reference = TinyTask(config_of(tmp_path, **run))
    reference.loss(1, 0)[0].backward()
    parameters = dict(reference.model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    for name, p in parameters.items():
        gradient = p.grad / max(float(norm), 1.0)
        moved = p * (1 - 0.05 * 0.01) - 0.05 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(state[f"weights/model/{name}"], moved, rtol=1e-4, atol=1e-5)
    assert state["optimizer/model/0/step"].item() == 1


@pytest.mark.parametrize("cut", [3, 4, 6, 8])
def test_resume_is_exact_around_skipped_steps(tmp_path, cut):
    bad = dict.fromkeys((2, 3, 6), BAD["loss nan"])
    settings = {"on_nonfinite": "skip", "max_skips": 2, "checkpoint_every": 1}
    train(TinyTask(config_of(tmp_path / "whole", **settings), at=bad), False, "")
    broken = config_of(tmp_path / "broken", **settings)
    with pytest.raises(RuntimeError):
        train(TinyTask(broken, at={**bad, cut: unplug}), False, "")
    train(TinyTask(broken, at=bad), True, "")
    assert [step for step, _ in skipped(tmp_path / "broken")] == [3, 4, 7]
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


def test_too_many_skips_in_a_row_stop_the_run_even_across_a_resume(tmp_path):
    bad = dict.fromkeys((1, 5, 6, 7), BAD["loss nan"])
    settings = {"on_nonfinite": "skip", "max_skips": 2, "checkpoint_every": 1}
    ways = {**bad, 6: lambda loss: BAD["loss nan"](send(signal.SIGTERM)(loss))}
    with pytest.raises(Interrupted):
        train(TinyTask(config_of(tmp_path, **settings), at=ways), False, "")
    assert load_weights(tmp_path / "states" / "step-00000007.safetensors")[1]["skips"] == {"model": 2}
    told = r"the loss is nan in step 8;.*a higher run\.max_skips \(bad step 3 in a row\)"
    with pytest.raises(ValueError, match=told):
        train(TinyTask(config_of(tmp_path, **settings), at=bad), True, "")
    more = {**settings, "max_skips": 3}
    train(TinyTask(config_of(tmp_path, **more), at=bad), True, "")
    assert [step for step, _ in skipped(tmp_path)] == [2, 6, 7, 8]


def test_a_run_that_stopped_goes_on_with_skipping(tmp_path):
    """The state is from before the bad step; to skip it from there is as to skip it in the first place."""
    bad = {7: BAD["gradient nan"]}
    train(TinyTask(config_of(tmp_path / "whole", on_nonfinite="skip"), at=bad), False, "")
    with pytest.raises(ValueError, match=r"go on with --resume and run\.on_nonfinite=skip"):
        train(TinyTask(config_of(tmp_path / "broken"), at=bad), False, "")
    train(TinyTask(config_of(tmp_path / "broken", on_nonfinite="skip"), at=bad), True, "")
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


def test_a_large_gradient_counts_as_a_bad_step(tmp_path):
    explode = {7: lambda loss: loss * 1e6}
    told = r"the norm of the gradient is \S+e\+0\d in step 8, above run\.max_gradient 100;"
    with pytest.raises(ValueError, match=told):
        train(TinyTask(config_of(tmp_path / "stop", max_gradient=100.0), at=explode), False, "")
    assert states(tmp_path / "stop") == ["step-00000005.safetensors"]
    train(
        TinyTask(config_of(tmp_path / "skip", max_gradient=100.0, on_nonfinite="skip"), at=explode), False, ""
    )
    ((step, why),) = skipped(tmp_path / "skip")
    assert step == 8 and "above run.max_gradient 100" in why
    train(TinyTask(config_of(tmp_path / "free"), at=explode), False, "")  # no limit, as before
    assert skipped(tmp_path / "free") == []


class Normalised(Duel):
    """The rival keeps running statistics, which the model's loss moves too, as of a discriminator."""

    def __post_init__(self):
        super().__post_init__()
        self.rival = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.players["rival"].module = self.rival
        self.players["rival"].__post_init__()


def test_a_skipped_step_leaves_running_statistics_alone(tmp_path):
    """A NaN that reached them would stay for good, and could not even be loaded."""
    config = config_of(tmp_path, steps=6, on_nonfinite="skip", checkpoint_every=1, keep=9)
    train(Normalised(config, at={4: BAD["loss nan"]}), False, "")
    loaded = [load_weights(tmp_path / "states" / f"step-0000000{step}.safetensors")[0] for step in (4, 5, 6)]
    names = [f"weights/rival/0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    four, five, six = ([state[name] for name in names] for state in loaded)
    rival = 1  # its own move in step 5 is sound, and counts
    assert five[2].item() == four[2].item() + rival
    assert six[2].item() == five[2].item() + 1 + rival
    train(Normalised(config), True, "")


def test_a_bad_step_of_one_player_is_not_the_others(tmp_path):
    class Sick(Duel):
        def rival_loss(self, step, part):
            loss, values = super().rival_loss(step, part)
            return (loss * nan if step == 4 else loss), values

    train(Sick(config_of(tmp_path, steps=5, on_nonfinite="skip", log_every=1)), False, "")
    state, header = load_weights(tmp_path / "states" / "step-00000005.safetensors")
    assert header["updates"] == {"model": 5}
    assert header["skips"] == {"model": 0, "rival": 1}
    assert state["optimizer/rival/0/step"].item() == 1
    assert skipped(tmp_path) == [(5, "rival: the loss is nan in step 5")]


def test_a_state_from_before_skips_were_counted_resumes(unbroken, tmp_path):
    with pytest.raises(RuntimeError):
        train(TinyTask(config_of(tmp_path), at={8: unplug}), False, "")
    path = tmp_path / "states" / "step-00000005.safetensors"
    tensors, header = load_weights(path)
    del header["skips"]
    for key in ("on_nonfinite", "max_skips", "max_gradient", "tensorboard"):
        del header["config"]["run"][key]
    io.save_weights(path, tensors, header)
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


# --- signals, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_ends_with_its_status(unbroken, tmp_path, capsys, main, name, status):
    assert main(TinyTask(config_of(tmp_path), at={6: send(getattr(signal, name))})) == status
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "stopped at step 7 of 12, saved; go on with: ldm-train diffusion tiny.yaml --resume"
    assert states(tmp_path)[-1] == "step-00000007.safetensors"
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


def test_the_exit_status_is_documented(capsys):
    with pytest.raises(SystemExit):
        command.main(["diffusion", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "2 an error, told in one line" in said and "143 by SIGTERM" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_names_the_settings_to_lower(unbroken, tmp_path, capsys, main, error):
    def fail(loss):
        raise error

    assert main(TinyTask(config_of(tmp_path), at={6: fail})) == 2
    line = one_line(capsys)
    assert "lower run.batch (now 8)" in line
    assert "raise run.accumulate (now 1: 8 images at once)" in line
    assert line.endswith("run.activation_checkpointing=true, or run.precision=bfloat16 (now float32)")
    assert states(tmp_path) == ["step-00000005.safetensors"]
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


def test_torch_itself_without_memory_is_taken_for_that(tmp_path, capsys, main):
    def fill(loss):
        torch.empty(2**50, dtype=torch.uint8)  # a thousand terabytes, more than there are addresses for

    assert main(TinyTask(config_of(tmp_path, batch=6, accumulate=3), at={6: fill})) == 2
    assert "lower run.batch (now 6), or keep it and raise run.accumulate (now 3: 2 images" in one_line(capsys)
    assert states(tmp_path) == ["step-00000005.safetensors"]


def test_what_is_set_already_is_not_advised(tmp_path):
    saving = config_of(tmp_path, activation_checkpointing=True, precision="bfloat16")
    assert memory_advice(TinyTask(saving)).endswith("images at once)")


def test_an_error_of_the_program_is_not_taken_for_lack_of_memory(tmp_path, main):
    with pytest.raises(RuntimeError, match="the plug"):
        main(TinyTask(config_of(tmp_path), at={6: unplug}))


# --- TensorBoard --------------------------------------------------------------------------------------------


def test_without_tensorboard_its_option_is_refused_in_one_line(tmp_path, capsys, main, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert main(TinyTask(config_of(tmp_path, tensorboard=True))) == 2
    assert "run.tensorboard=true needs the package tensorboard: pip install" in one_line(capsys)
    assert main(TinyTask(config_of(tmp_path))) == 0  # nothing was spoilt


def test_tensorboard_has_the_numbers_of_the_log(tmp_path, monkeypatch):
    written, opened = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    bad = {5: BAD["loss nan"]}
    with pytest.raises(RuntimeError):
        train(
            TinyTask(config_of(tmp_path, tensorboard=True, on_nonfinite="skip"), at={**bad, 8: unplug}),
            False,
            "",
        )
    train(TinyTask(config_of(tmp_path, tensorboard=True, on_nonfinite="skip"), at=bad), True, "")
    folder = str(tmp_path / "tensorboard")
    assert opened == [(folder, 1), (folder, 6)]  # what came after the state of step 5 is dropped
    assert written[-1] == "closed"
    resumed = written[written.index("closed") + 1 : -1]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = {
        (key, row["step"]): value
        for row in rows
        if row["step"] > 5
        for key, value in row.items()
        if key not in ("step", "skipped")
    }
    assert {(name, step): value for name, value, step in resumed} == pytest.approx(logged, rel=1e-5)


def test_tensorboard_itself_reads_what_is_written(tmp_path):
    """With the real package: the file of a run holds the numbers of the log."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TinyTask(config_of(tmp_path, tensorboard=True)), False, "")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    curves = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in tags}
    logged = {}
    for row in (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()):
        for key in row.keys() - {"step"}:
            logged.setdefault(key, {})[row["step"]] = row[key]
    assert {"loss", "gradient", "lr", "images_per_second", "validation"} <= curves.keys() == logged.keys()
    for key, values in logged.items():
        assert curves[key] == pytest.approx(values, rel=1e-5)
