"""The dry run: its numbers against a run that is made, every shipped training configuration, and that nothing is
written.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_task import Duel, TinyTask, config_of
from torch import nn

from ldm.config import find_config, shipped_names
from ldm.weights.io import load_weights
from sample.model import SHIPPED
from train.__main__ import TASKS, build_task, main
from train.loop import train
from train.plan import frozen_bytes, memory_advice, plan, times

TRAINING = [name for name in shipped_names() if name.startswith("configs/train/")]


def of_state(folder, steps, prefix):
    state, _ = load_weights(folder / "states" / f"step-{steps:08d}.safetensors")
    chosen = [tensor for name, tensor in state.items() if name.startswith(prefix)]
    return sum(tensor.numel() * tensor.element_size() for tensor in chosen)


def test_the_numbers_are_those_of_a_run(tmp_path, monkeypatch):
    """In bytes rather than megabytes; the optimiser's step counters, 4 bytes a tensor, are left out of the plan."""
    monkeypatch.setattr("train.plan.megabytes", str)
    task = Duel(config_of(tmp_path, log_every=5))
    text = plan(task)
    train(task, False, "")
    weights, average = of_state(tmp_path, 12, "weights/"), of_state(tmp_path, 12, "ema/")
    counters = 4 * sum(len(player.parameters) for player in task.players.values())
    optimiser = of_state(tmp_path, 12, "optimizer/") - counters
    assert (weights, optimiser, average) == (4 * 73, 8 * 73, 4 * 70)  # 36 + 34 of the model, 3 of the rival
    total = 2 * weights + optimiser + average
    assert f"memory: {total} = weights 292 + gradients 292 + optimiser 584 + moving average 280" in text
    assert f"3 times {weights + optimiser + average}, the newest 2 kept" in text
    assert "would train 12 steps of 8 images (96 images seen)" in text
    assert "previews/  2 times" in text
    assert len(list((tmp_path / "previews").iterdir())) == 2
    assert text.startswith("model: 70 parameters to train\nrival: 3 parameters to train\n")


@pytest.mark.parametrize(
    ("steps", "every", "count"), [(12, 5, 3), (12, 6, 2), (12, 0, 1), (12, 100, 1), (1, 1, 1)]
)
def test_how_often(steps, every, count):
    done = [step for step in range(1, steps + 1) if step == steps or (every and step % every == 0)]
    assert times(steps, every) == count == len(done)


def test_frozen_networks_are_counted_once(tmp_path):
    task = TinyTask(config_of(tmp_path))
    assert frozen_bytes(task) == 0  # task.model is trained
    task.first_stage = nn.Linear(10, 5)
    task.same = task.first_stage
    assert frozen_bytes(task) == 4 * 55


# --- the shipped configurations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    rows = []
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "train" if number < 4 else "heldout_image"
        row = {"file_name": f"{number}.png", "text": "noise", "concept": "noise", "split": split}
        rows.append(row | {"source": f"{number}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task_of(name):
    keys = yaml.safe_load(find_config(name).read_text())
    if "model" in keys:  # teaches a given model something; what, says its name
        return next(task for task in TASKS if task.replace("-", "_") in name)
    return "diffusion" if "unet" in keys else "autoencoder"


@pytest.fixture(scope="module")
def first_stages(pictures, tmp_path_factory) -> Path:
    """What the shipped first stages would export, untrained, where the diffusion models look for them."""
    folder = tmp_path_factory.mktemp("stages")
    for name in TRAINING:
        if task_of(name) == "autoencoder":
            task = build_task("autoencoder", name, [f"data.path={pictures}", "run.device=cpu"])
            task.export(folder / task.config.run.out / "model")
    return folder


@pytest.mark.parametrize("name", TRAINING)
def test_every_shipped_training_config_runs_dry(name, pictures, first_stages, tmp_path, capsys):
    keys = yaml.safe_load(find_config(name).read_text())
    options = [f"data.path={pictures}", "data.concepts=[]", "run.device=cpu", f"run.out={tmp_path / 'new'}"]
    if "autoencoder" in keys and isinstance(keys["autoencoder"], str):
        options.append(f"autoencoder={first_stages / keys['autoencoder']}")
    if "model" in keys:
        options.append("model=emoji")  # the shipped one, in the place of what another config trains
    if "init_from" in keys:
        options.append("init_from=''")
    assert main([task_of(name), name, *options, "--dry-run"]) == 0
    said = capsys.readouterr().out
    run = keys["run"]
    assert re.search(r"^model: [\d,]+ parameters to train$", said, re.M)
    assert re.search(
        r"^memory: [\d,.]+ MB = weights [\d,.]+ MB \+ gradients .* \+ optimiser .* \+ moving", said, re.M
    )
    assert "model" in keys or re.search(r"activations of \d+ images [\d,.]+ MB; Python, libraries and", said)
    seen = run["steps"] * run["batch"]
    assert f"would train {run['steps']} steps of {run['batch']} images ({seen:,} images seen) into" in said
    assert "states/" in said and "nothing is written" in said
    assert list(tmp_path.iterdir()) == []


def test_advice_for_want_of_memory_names_the_sizes_of_the_model(pictures):
    task = build_task("autoencoder", "configs/train/tiny_autoencoder.yaml", [f"data.path={pictures}"])
    advice = memory_advice(task)
    assert "run.batch (now 8)" in advice and "autoencoder.base_channels, data.size" in advice


OTHERS = {f"configs/ablations/personalise{end}.yaml" for end in ("", "_style")}  # of another command
STUDIES = [name for name in shipped_names() if name.startswith("configs/ablations/") and name not in OTHERS]


@pytest.mark.parametrize("name", STUDIES)
def test_every_shipped_study_runs_dry(name, pictures, tmp_path, capsys):
    study = yaml.safe_load(find_config(name).read_text())
    options = [f"data.path={pictures}", "data.concepts=[]", "run.device=cpu", "--out", str(tmp_path / "new")]
    if study["task"] == "diffusion":
        options.insert(0, f"autoencoder={SHIPPED / 'emoji' / 'autoencoder.safetensors'}")
    assert main(["ablate", name, *options, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for arm, changes in study["arms"].items():
        assert re.search(rf"^arm {re.escape(arm)}: .+$", said, re.M)
        assert all(arm == study["baseline"] or change.partition("=")[0] in said for change in changes)
    assert said.count("parameters to train") == said.count("  memory: ") == len(study["arms"])
    runs = len(study["arms"]) * len(study["seeds"])
    assert f"{runs} runs (" in said and ", 0 of them finished; then table.md, table.csv" in said
    assert list(tmp_path.iterdir()) == []
