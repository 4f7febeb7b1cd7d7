"""Stopping a run in every way and going on: the result equals an unbroken run bit for bit, or is refused."""

import math
import os
import signal

import pytest
from tiny_task import Duel, TinyTask, assert_equal_runs, config_of, log_of, send, unplug

from ldm.weights.io import load_weights, read_metadata, save_weights
from train.loop import Interrupted, train


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, as on a terminal; in a background job of a shell it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_resumed_after_a_kill_equals_unbroken(unbroken, tmp_path):
    with pytest.raises(RuntimeError, match="plug"):
        train(TinyTask(config_of(tmp_path), at={8: unplug}), False, "")
    assert [row["step"] for row in log_of(tmp_path)] == [3, 4, 6, 8]  # beyond the state of step 5
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # torn
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "step", [1, 5]
)  # the step before a quiet one; the step of a validation and a preview
def test_resumed_after_a_signal_equals_unbroken(unbroken, tmp_path, name, step):
    signum = getattr(signal, name)
    handler = signal.getsignal(signum)
    with pytest.raises(
        Interrupted, match=rf"step {step + 1} of 12, saved; go on with: ldm-train x --resume"
    ) as caught:
        train(TinyTask(config_of(tmp_path), at={step: send(signum)}), False, "ldm-train x")
    assert caught.value.signum == signum
    assert signal.getsignal(signum) == handler
    assert (tmp_path / "states" / f"step-{step + 1:08d}.safetensors").exists()
    assert not (tmp_path / "model").exists()
    train(TinyTask(config_of(tmp_path)), True, "")
    (tmp_path / "states" / f"step-{step + 1:08d}.safetensors").unlink(missing_ok=True)
    assert_equal_runs(unbroken, tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"accumulate": 4},
        {"precision": "bfloat16"},
        {"checkpoint_every": 1, "log_every": 1},
        {"seed": 7, "clip": 0.1},
    ],
)
@pytest.mark.parametrize("step", [6, 11])
def test_resumed_equals_unbroken_with_other_settings(tmp_path, values, step):
    train(TinyTask(config_of(tmp_path / "whole", **values)), False, "")
    with pytest.raises(RuntimeError, match="plug"):
        train(TinyTask(config_of(tmp_path / "broken", **values), at={step: unplug}), False, "")
    train(TinyTask(config_of(tmp_path / "broken", **values)), True, "")
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


def test_a_signal_in_the_last_step_finishes_the_run(unbroken, tmp_path):
    train(TinyTask(config_of(tmp_path), at={11: send(signal.SIGINT)}), False, "")
    assert_equal_runs(unbroken, tmp_path)


def test_a_second_signal_stops_at_once(tmp_path, interruptible):
    def twice(loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        train(TinyTask(config_of(tmp_path), at={6: twice}), False, "")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000005.safetensors"]


def test_a_finished_run_exports_again(unbroken, tmp_path):
    task = TinyTask(config_of(tmp_path))
    train(task, False, "")
    (tmp_path / "model" / "tiny.safetensors").unlink()
    train(TinyTask(config_of(tmp_path)), True, "")
    assert_equal_runs(unbroken, tmp_path)


def test_a_torn_newest_state_is_passed_over(unbroken, tmp_path, capsys):
    train(TinyTask(config_of(tmp_path)), False, "")
    newest = tmp_path / "states" / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(TinyTask(config_of(tmp_path)), True, "")
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "resumed at step 10" in said
    assert_equal_runs(unbroken, tmp_path)


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (lambda loss: loss * math.nan, "model: the loss is nan in step 8"),
        (lambda loss: loss + math.inf, "model: the loss is inf in step 8"),
        (lambda loss: loss + (0 * loss).sqrt(), "model: the norm of the gradient is nan in step 8"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(unbroken, tmp_path, poison, what):
    with pytest.raises(ValueError, match=what):
        train(TinyTask(config_of(tmp_path), at={7: poison}), False, "")
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000005.safetensors"]
    train(TinyTask(config_of(tmp_path)), True, "")  # the state is sound
    assert_equal_runs(unbroken, tmp_path)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_two_players_resume_bit_for_bit(tmp_path, step):
    train(Duel(config_of(tmp_path / "whole")), False, "")
    with pytest.raises(Interrupted):
        train(Duel(config_of(tmp_path / "broken"), at={step: send(signal.SIGINT)}), False, "")
    train(Duel(config_of(tmp_path / "broken")), True, "")
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(RuntimeError):
        train(TinyTask(config_of(tmp_path), at={8: unplug}), False, "")
    return tmp_path


def test_a_changed_configuration_is_refused(stopped):
    changed = config_of(stopped, lr=0.06, batch=16)
    with pytest.raises(ValueError, match=r"run\.batch: 8 -> 16; run\.lr: 0\.05 -> 0\.06"):
        train(TinyTask(changed), True, "")
    with pytest.raises(ValueError, match=r"changed values: dropout: 0\.2 -> 0\.1"):
        train(TinyTask(config_of(stopped, dropout=0.1)), True, "")
    assert [row["step"] for row in log_of(stopped)] == [3, 4, 6, 8]  # nothing was touched


def test_how_a_run_is_watched_may_change(stopped):
    config = config_of(stopped, log_every=1, validate_every=0, preview_every=0, checkpoint_every=0, keep=1)
    train(TinyTask(config), True, "")
    assert [path.name for path in (stopped / "states").iterdir()] == ["step-00000012.safetensors"]


def test_a_state_from_before_a_key_existed_has_its_default(unbroken, stopped):
    path = stopped / "states" / "step-00000005.safetensors"
    tensors, header = load_weights(path)
    del header["config"]["dropout"]
    save_weights(path, tensors, header)
    train(TinyTask(config_of(stopped)), True, "")
    assert_equal_runs(unbroken, stopped)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(TinyTask(config_of(tmp_path / "new")), True, "")
    assert not (tmp_path / "new").exists()


def test_a_used_folder_is_refused(stopped):
    before = read_metadata(stopped / "states" / "step-00000005.safetensors")
    with pytest.raises(
        ValueError, match=r"already holds a run; go on with --resume, or choose another run\.out="
    ):
        train(TinyTask(config_of(stopped, lr=1.0)), False, "")
    assert "lr: 0.05" in (stopped / "config.yaml").read_text()
    assert read_metadata(stopped / "states" / "step-00000005.safetensors") == before


def test_a_run_stopped_before_its_first_state_may_start_again(unbroken, tmp_path):
    with pytest.raises(RuntimeError):
        train(TinyTask(config_of(tmp_path), at={4: unplug}), False, "")
    train(TinyTask(config_of(tmp_path)), False, "")
    assert_equal_runs(unbroken, tmp_path)
