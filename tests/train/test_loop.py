"""The training loop on a tiny network: what a run writes, one step by hand, accumulation, players, learning rate."""

import math
import re
from dataclasses import replace

import pytest
import torch
from tiny_task import Duel, TinyTask, config_of, log_of
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.seeding import derive
from ldm.weights.io import load_weights
from train.loop import RunConfig, learning_rate, train


def test_what_a_run_writes(unbroken):
    assert [row["step"] for row in log_of(unbroken)] == [3, 4, 6, 8, 9, 12, 12]
    assert log_of(unbroken)[1].keys() == {"step", "loss", "mean", "gradient", "lr"}
    assert log_of(unbroken)[0].keys() == {"step", "validation"}
    assert [path.name for path in sorted((unbroken / "previews").iterdir())] == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    assert sorted(path.name for path in (unbroken / "states").iterdir()) == [
        "step-00000010.safetensors",
        "step-00000012.safetensors",
    ]
    assert (unbroken / "config.yaml").read_text().startswith("run:\n  out: ")


def test_logged_values_are_means_since_the_last_row(unbroken):
    task = TinyTask(config_of(unbroken))
    means = [float(task.batch(step, 0).mean()) for step in range(12)]
    rows = [row for row in log_of(unbroken) if "loss" in row]
    for row, part in zip(rows, (means[:4], means[4:8], means[8:]), strict=True):
        assert row["mean"] == pytest.approx(sum(part) / 4, rel=1e-5)
        assert row["lr"] == pytest.approx(learning_rate(task.config.run, row["step"] - 1), rel=1e-5)


def test_the_first_step_by_hand(tmp_path):
    """Gradient clipped to norm 0.1; AdamW's first step is weight decay and lr * sign(gradient)."""
    config = config_of(tmp_path, steps=1, lr=0.3, warmup=3, clip=0.1, weight_decay=0.5, dropout=0.0)
    reference = TinyTask(config)
    loss, _ = reference.loss(0, 0)
    loss.backward()
    parameters = dict(reference.model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert norm > 0.1
    train(TinyTask(config), False, "")
    state, _ = load_weights(tmp_path / "states" / "step-00000001.safetensors")
    for name, p in parameters.items():
        gradient = p.grad * 0.1 / (norm + 1e-6)
        expected = p * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)  # lr / warmup = 0.1
        assert_close(state[f"weights/model/{name}"], expected, rtol=1e-5, atol=1e-6)
        average = torch.lerp(p, expected, 1 - 2 / 11)  # first update of the moving average
        assert_close(state[f"ema/model/{name}"], average, rtol=1e-5, atol=1e-6)
    (row,) = (row for row in log_of(tmp_path) if "loss" in row)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient"] == pytest.approx(norm.item(), rel=1e-5)


def test_validation_sees_the_average_without_dropout_or_gradients(tmp_path):
    task = TinyTask(config_of(tmp_path, steps=5, validate_every=0))
    train(task, False, "")
    ((training, gradients, weight),) = task.seen  # the last step validates in any case
    assert (training, gradients) == (False, False)
    state, _ = load_weights(tmp_path / "states" / "step-00000005.safetensors")
    assert torch.equal(weight, state["ema/model/3.weight"])
    assert not torch.equal(weight, state["weights/model/3.weight"])
    assert task.model.training
    assert torch.equal(task.model[3].weight, state["weights/model/3.weight"])
    exported, _ = load_weights(tmp_path / "model" / "tiny.safetensors")
    assert torch.equal(exported["3.weight"], weight)


def test_parts_of_the_batch_add_up(tmp_path):
    states = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        train(TinyTask(config_of(folder, accumulate=parts, dropout=0.0, warmup=0)), False, "")
        states.append(load_weights(folder / "states" / "step-00000012.safetensors")[0])
    for name in states[0]:
        if name.startswith(("weights/", "ema/")):
            assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)
    rows = [log_of(tmp_path / parts) for parts in ("1", "4")]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_dropout_differs_between_steps_and_parts():
    seeds = {derive(0, "dropout", step, part) for step in range(5) for part in range(4)}
    assert len(seeds) == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"run\.steps 0"),
        ({"batch": 10, "accumulate": 4}, r"run\.batch 10 must be a multiple of run\.accumulate 4"),
        ({"lr_schedule": "step"}, r"run\.lr_schedule must be 'constant' or 'cosine', got 'step'"),
        ({"precision": "int8"}, r"run\.precision must be 'float32' or 'bfloat16', got 'int8'"),
        ({"precision": "float16"}, r"run\.precision must be 'float32' or 'bfloat16', got 'float16'"),
        ({"lr": 0.0}, r"run\.lr 0\.0"),
        ({"lr": math.nan}, r"run\.lr nan"),
        ({"clip": -1.0}, r"run\.clip -1\.0"),
        ({"betas": [0.9]}, r"run\.betas must be two numbers"),
        ({"betas": [0.9, 1.0]}, r"run\.betas must be two numbers"),
        ({"on_nonfinite": "ignore"}, r"run\.on_nonfinite must be 'stop' or 'skip', got 'ignore'"),
        ({"max_skips": 0}, r"run\.max_skips 0 must be at least 1"),
        ({"max_gradient": -1.0}, r"run\.max_gradient -1\.0 at least 0"),
        ({"max_gradient": math.nan}, r"run\.max_gradient nan at least 0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, {"out": "x", **values})


def test_the_bar_shows_loss_gradient_rate_and_time_left(tmp_path, capsys):
    train(TinyTask(config_of(tmp_path, log_every=0)), False, "")
    bar = capsys.readouterr().err.splitlines()[-1].rsplit("\r", 1)[-1]
    (row,) = (row for row in log_of(tmp_path) if "loss" in row)
    assert row.keys() == {"step", "loss", "mean", "gradient", "lr"}
    assert re.search(r"12/12 \[\d+:\d\d<\d+:\d\d, .*loss=[\d.]+, gradient=[\d.]+, images/s=[\d.e+]+\]", bar)


# --- the learning rate --------------------------------------------------------------------------------------


def test_constant_learning_rate():
    run = RunConfig(out="x", steps=100, lr=0.8, warmup=4)
    assert [learning_rate(run, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert learning_rate(run, 99) == 0.8
    assert learning_rate(replace(run, warmup=0), 0) == 0.8


def test_cosine_learning_rate():
    run = RunConfig(out="x", steps=104, lr=0.8, warmup=4, lr_schedule="cosine")
    values = [learning_rate(run, step) for step in (3, 4, 29, 54, 79, 104)]
    quarter = 0.4 * (1 + math.sqrt(0.5))
    assert values == pytest.approx([0.8, 0.8, quarter, 0.4, 0.8 - quarter, 0.0], abs=1e-12)
    assert 0 < learning_rate(run, 103) < 1e-3


# --- two players --------------------------------------------------------------------------------------------


def test_players_take_turns(tmp_path):
    task = Duel(config_of(tmp_path, steps=5, log_every=1))
    train(task, False, "")
    model = [("model", step) for step in range(5)]
    assert task.order == [*model[:3], model[3], ("rival", 3), model[4], ("rival", 4)]
    rows = [row for row in log_of(tmp_path) if "loss" in row]
    own = {"step", "loss", "mean", "gradient", "lr"}
    assert rows[2].keys() == own
    assert rows[3].keys() == own | {"rival_loss", "rival_outputs", "rival_gradient"}
    state, header = load_weights(tmp_path / "states" / "step-00000005.safetensors")
    assert "optimizer/rival/0/exp_avg" in state
    assert state["optimizer/rival/0/step"].item() == 2
    assert not [name for name in state if name.startswith("ema/rival")]
    assert header["updates"] == {"model": 5}


def test_a_late_players_metrics_are_means_of_its_own_steps(tmp_path):
    train(Duel(config_of(tmp_path / "each", steps=5, log_every=1)), False, "")
    train(Duel(config_of(tmp_path / "all", steps=5, log_every=0)), False, "")
    each = [row["rival_loss"] for row in log_of(tmp_path / "each") if "rival_loss" in row]
    (row,) = (row for row in log_of(tmp_path / "all") if "rival_loss" in row)
    assert len(each) == 2
    assert row["rival_loss"] == pytest.approx(sum(each) / 2, rel=1e-5)


def test_a_player_moves_by_its_own_loss_only(tmp_path):
    """What the model's loss leaves in the rival's gradients is not the rival's."""
    task = Duel(config_of(tmp_path, steps=4, clip=1e9))
    before = [p.detach().clone() for p in task.rival.parameters()]
    train(task, False, "")
    state, _ = load_weights(tmp_path / "states" / "step-00000004.safetensors")
    with torch.no_grad():  # the model's weights have not changed since the rival's move
        task.model.train()
        torch.manual_seed(derive(0, "dropout", 3, 0))
        outputs = task.model(task.batch(3, 0))
    weights = [p.clone().requires_grad_() for p in before]
    loss = (outputs @ weights[0].T + weights[1] - 1).square().mean()
    for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
        assert_close(state[f"optimizer/rival/{i}/exp_avg"], 0.1 * gradient, rtol=1e-5, atol=1e-7)
