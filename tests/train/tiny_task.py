"""A task for the tests of the training loop: a tiny network, events at chosen steps, and a comparison of runs."""

import json
import os
from dataclasses import dataclass, field

import torch
from torch import nn

from ldm.seeding import derive, generator
from ldm.weights.io import load_weights, save_weights
from train.distributed import parts_of
from train.loop import Player, RunConfig


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
        return x.chunk(parts_of(run.accumulate))[part]

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
