"""The training loop on a tiny network: exact resuming, signals, accumulation, players, what is refused."""

import json
import math
import os
import signal
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.config import from_dict
from ldm.seeding import derive, generator
from ldm.weights.io import load_weights, read_metadata, save_weights
from train.loop import Interrupted, Player, RunConfig, learning_rate, train


@dataclass(frozen=True)
class TinyConfig:
    run: RunConfig
    dropout: float = 0.2


def config_of(folder, *, dropout=0.2, **values):
    run = {
        "out": str(folder),
        "steps": 12,
        "batch": 8,
        "lr": 0.05,
        "lr_schedule": "cosine",
        "warmup": 3,
        "ema_decay": 0.9,
        "device": "cpu",
        "log_every": 4,
        "validate_every": 3,
        "preview_every": 6,
        "checkpoint_every": 5,
        **values,
    }
    return TinyConfig(RunConfig(**run), dropout)


@dataclass
class TinyTask:
    """A convolution (channels last, as in training), dropout and a linear layer, fitted to random targets.

    at: for a step counted from 0, what to do in the loss of that step.
    """

    config: TinyConfig
    at: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(derive(self.config.run.seed, "initialisation"))
        convolution = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
        self.model = nn.Sequential(
            convolution, nn.Flatten(), nn.Dropout(self.config.dropout), nn.Linear(16, 2)
        )
        self.players = {"model": Player(self.model, self.loss)}

    def batch(self, step, part):
        run = self.config.run
        x = torch.randn(run.batch, 2, 3, 3, generator=generator(run.seed, "data", step))
        return x.chunk(run.accumulate)[part]

    def loss(self, step, part):
        x = self.batch(step, part)
        loss = (self.model(x) - x.flatten(1)[:, :2] * 3).square().mean()
        if step in self.at:
            loss = self.at[step](loss)
        return loss, {"mean": x.mean().item()}

    def validate(self):
        self.seen.append(
            (self.model.training, torch.is_grad_enabled(), self.model[3].weight.detach().clone())
        )
        return {"validation": float(self.model(torch.ones(1, 2, 3, 3)).sum())}

    def preview(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repr(float(self.model[3].weight.sum())))

    def export(self, folder):
        save_weights(folder / "tiny.safetensors", self.model.state_dict())


def unplug(loss):
    raise RuntimeError("the plug was pulled")  # as kill -9 would: nothing gets saved any more


def send(signum):
    def action(loss):
        os.kill(os.getpid(), signum)
        return loss

    return action


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def assert_equal_runs(a, b, steps=12):
    """Weights, moving average, optimiser, header, log, previews and exported model, bit for bit."""
    (x, header_x), (y, header_y) = (
        load_weights(folder / "states" / f"step-{steps:08d}.safetensors") for folder in (a, b)
    )
    assert {name.split("/")[0] for name in x} == {"weights", "optimizer", "ema"}
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    for header in (header_x, header_y):
        del header["config"]["run"]["out"]
    assert header_x == header_y
    assert log_of(a) == log_of(b)
    previews = [{p.name: p.read_text() for p in (folder / "previews").iterdir()} for folder in (a, b)]
    assert previews[0] == previews[1]
    models = [(folder / "model" / "tiny.safetensors").read_bytes() for folder in (a, b)]
    assert models[0] == models[1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(TinyTask(config_of(folder)), False, "") == folder / "model"
    return folder


# --- an ordinary run ----------------------------------------------------------------------------------------


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
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["gradient"] == pytest.approx(float(norm), rel=1e-5)


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


# --- stopping and going on ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"run\.steps 0"),
        ({"batch": 10, "accumulate": 4}, r"run\.batch 10 must be a multiple of run\.accumulate 4"),
        ({"lr_schedule": "step"}, r"run\.lr_schedule must be 'constant' or 'cosine', got 'step'"),
        ({"precision": "int8"}, r"run\.precision must be one of float32, bfloat16, float16, got 'int8'"),
        ({"lr": 0.0}, r"run\.lr 0\.0"),
        ({"lr": math.nan}, r"run\.lr nan"),
        ({"clip": -1.0}, r"run\.clip -1\.0"),
        ({"betas": [0.9]}, r"run\.betas must be two numbers"),
        ({"betas": [0.9, 1.0]}, r"run\.betas must be two numbers"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, {"out": "x", **values})


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


@dataclass
class Duel(TinyTask):
    """The model's loss also passes through a rival, who moves from step 3 on and has no moving average."""

    def __post_init__(self):
        super().__post_init__()
        self.rival = nn.Linear(2, 1)
        self.order = []
        self.players["rival"] = Player(self.rival, self.rival_loss, averaged=False, starts_at=3)

    def loss(self, step, part):
        self.order.append(("model", step))
        loss, values = super().loss(step, part)
        return loss + self.rival(self.model(self.batch(step, part))).square().mean(), values

    def rival_loss(self, step, part):
        self.order.append(("rival", step))
        with torch.no_grad():
            outputs = self.model(self.batch(step, part))
        return (self.rival(outputs) - 1).square().mean(), {"outputs": outputs.mean().item()}


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
    received = {}

    def remember(loss):
        received["model"] = loss
        return loss

    task.at[3] = remember
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


@pytest.mark.parametrize("step", [1, 3, 6])
def test_two_players_resume_bit_for_bit(tmp_path, step):
    train(Duel(config_of(tmp_path / "whole")), False, "")
    with pytest.raises(Interrupted):
        train(Duel(config_of(tmp_path / "broken"), at={step: send(signal.SIGINT)}), False, "")
    train(Duel(config_of(tmp_path / "broken")), True, "")
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")
