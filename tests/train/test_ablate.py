"""Ablations: statistics in closed form, pairing of the arms, whole studies on a made set, stops, refusals."""

import csv
import json
import math
import os
import signal
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

import train.ablate as module
from ldm.config import find_config, shipped_names
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import TextEncoder
from ldm.models.unet import UNet
from ldm.weights.io import load_weights
from sample.pipeline import Pipeline
from train.__main__ import main
from train.ablate import build, check_factor, plan, read_study
from train.ablation_table import Arm, Result, figure, markdown
from train.data import DataConfig, load_images, to_float
from train.evaluation import Evaluation, denoising_errors
from train.statistics import MOST, T_QUANTILES, Estimate, estimate, paired

# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", range(1, 31))
def test_quantiles_hold_95_percent(degrees):
    """The density of Student's t, integrated from -q to q by Simpson's rule."""
    x = np.linspace(0, T_QUANTILES[degrees - 1], 20001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    assert abs(2 * (x[1] - x[0]) / 3 * float((weights * density).sum()) - 0.95) < 2e-5


def test_estimate_in_closed_form():
    values = [1.0, 2.5, 4.0, 0.25]
    found = estimate(values)
    assert found.count == 4 and math.isclose(found.mean, np.mean(values))
    assert math.isclose(found.half, 3.1824 * np.std(values, ddof=1) / 2)
    assert str(Estimate(1.23456, 0.01234, 3)) == "1.235 ± 0.012"


def test_one_value_has_no_interval():
    assert estimate([2.0]) == Estimate(2.0, None, 1)
    assert str(estimate([2.0])) == "2"


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [abs((e := estimate([*map(float, rng.normal(3, 2, 5))])).mean - 3) <= e.half for _ in range(2000)]
    assert abs(np.mean(hits) - 0.95) < 0.015  # 3 standard deviations


@pytest.mark.parametrize("count", [0, MOST + 1])
def test_too_few_and_too_many_values(count):
    with pytest.raises(ValueError, match=f"1 to 31 values, got {count}"):
        estimate([1.0] * count)


def test_pairs_are_of_equal_seeds():
    found = paired({0: 1.0, 2: 5.0, 7: 3.0}, {2: 4.0, 7: 1.0, 1: 0.0})
    assert found == estimate([1.0, 2.0])
    assert paired({0: 1.0}, {1: 1.0}) is None


# --- table and figure ---------------------------------------------------------------------------------------


def arms_of(values: dict[str, list[float]]) -> list[Arm]:
    return [
        Arm(
            name,
            "" if name == "a" else "x.y: 1 -> 2",
            {seed: Result({"score": v}, 1234, 0.5, 100.0) for seed, v in enumerate(row)},
        )
        for name, row in values.items()
    ]


def test_the_table_tells_differences_to_the_baseline():
    table = markdown(arms_of({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}), "a", ["score"]).splitlines()
    assert table[0] == "| arm | difference | seeds | score | Δ score | s/step | parameters | peak MiB |"
    assert table[2] == "| a | (baseline) | 3 | 2 ± 2.5 |  | 0.5 | 1,234 | 100 |"
    assert table[3] == "| b | x.y: 1 -> 2 | 3 | 3 ± 2.5 | 1 ± 0 | 0.5 | 1,234 | 100 |"


def test_the_figure_places_values_by_size():
    root = ET.fromstring(figure("<&>", arms_of({"a": [1.0, 2.0, 3.0], "b": [5.0]}), ["score"]))
    circles = [circle for circle in root.iter() if circle.tag.endswith("circle")]
    x = [float(circle.get("cx")) for circle in circles]
    one, two, three, mean, five, alone = x
    assert one < two < three < five and mean == two and alone == five
    assert abs((three - one) / (five - three) - 1) < 0.01
    assert all(170 <= value <= 610 for value in x)
    wide = [line for line in root.iter() if line.get("stroke-width") == "2"]
    assert len(wide) == 1  # a single run has no interval
    assert abs((float(wide[0].get("x2")) - float(wide[0].get("x1"))) / (three - one) - 2.4843) < 0.01


def test_a_figure_of_equal_values():
    ET.fromstring(figure("t", arms_of({"a": [0.0, 0.0], "b": [0.0]}), ["score"]))


# --- whole studies ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """24 captioned pictures, plain colours with a square; four held out."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for number in range(24):
        colour = ((220, 30, 30), (30, 60, 220), (30, 170, 60), (200, 180, 20))[number % 4]
        picture = Image.new("RGB", (32, 32), "white")
        picture.paste(colour, (number // 4, 4, 30, 28 - number // 4))
        picture.save(folder / f"{number:02}.png")
        concept = ("red", "blue", "green", "yellow")[number % 4]
        rows.append(
            {
                "file_name": f"{number:02}.png",
                "text": f"a {concept} square",
                "concept": concept,
                "style": "flat",
                "split": "heldout_image" if number >= 20 else "train",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


QUICK = ["run.steps=3", "run.batch=4", "run.log_every=1", "run.preview_every=0", "run.device=cpu"]
NARROW = ["autoencoder.base_channels=8", "data.size=16"]
FIRST_STAGE = {
    "task": "autoencoder",
    "config": "configs/train/tiny_autoencoder.yaml",
    "common": [*QUICK, *NARROW],
    "factor": ["autoencoder.z_channels"],
    "baseline": "four",
    "arms": {"four": [], "eight": ["autoencoder.z_channels=8"]},
    "seeds": [0, 1],
    "metrics": ["heldout_psnr", "kl"],
}
PREDICTION = {
    "task": "diffusion",
    "config": "configs/train/tiny.yaml",
    "common": [*QUICK, "preview.steps=1", "preview.prompts=[a red square]"],
    "factor": ["diffusion.prediction"],
    "baseline": "v",
    "arms": {"eps": ["diffusion.prediction=eps"], "v": ["diffusion.prediction=v"]},
    "seeds": [3],
    "evaluate": {"levels": [0.3, 3], "guidance": [1, 2], "captions": 2, "steps": 1},
}


def write(folder: Path, study: dict, **changes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def first_stages(shapes, tmp_path_factory) -> Path:
    """The first-stage study, run to its end; not to be written to."""
    folder = tmp_path_factory.mktemp("first_stages")
    study = write(folder, FIRST_STAGE)
    assert main(["ablate", study, f"data.path={shapes}", "--out", str(folder / "out")]) == 0
    return folder


def table_of(folder: Path, name: str = "table.csv") -> list[dict[str, str]]:
    with open(folder / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_study_of_first_stages(first_stages, shapes):
    out = first_stages / "out"
    logged = {(arm, seed): log_of(out / arm / f"seed-{seed}") for arm in ("four", "eight") for seed in (0, 1)}
    score = {key: rows[-1]["heldout_psnr"] for key, rows in logged.items()}
    four, eight = table_of(out)
    assert four["arm"] == "four" and four["difference"] == "" and four["seeds"] == "2"
    assert eight["difference"] == "autoencoder.z_channels: 4 -> 8"
    assert_close(float(four["heldout_psnr"]), (score["four", 0] + score["four", 1]) / 2)
    pairs = estimate([score["eight", seed] - score["four", seed] for seed in (0, 1)])
    assert_close(float(eight["heldout_psnr_difference"]), pairs.mean)
    assert_close(float(eight["heldout_psnr_difference_half"]), pairs.half)
    assert four["heldout_psnr_difference"] == ""
    assert int(eight["parameters"]) > int(four["parameters"]) and float(four["seconds_a_step"]) > 0
    assert [(row["arm"], row["seed"]) for row in table_of(out, "runs.csv")] == [
        ("four", "0"),
        ("four", "1"),
        ("eight", "0"),
        ("eight", "1"),
    ]
    page = (out / "table.md").read_text()
    assert f"`ldm-train ablate {first_stages / 'study.yaml'} data.path={shapes} --out {out}`" in page
    ET.parse(out / "figure.svg")
    assert sorted(path.name for path in out.iterdir()) == [
        "eight",
        "figure.svg",
        "four",
        "runs.csv",
        "table.csv",
        "table.md",
    ]


def test_finished_runs_are_not_trained_again(first_stages, shapes, monkeypatch, capsys):
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    command = ["ablate", str(first_stages / "study.yaml"), f"data.path={shapes}", "--out"]
    before = (first_stages / "out/table.csv").read_text()
    assert main([*command, str(first_stages / "out")]) == 0
    assert (first_stages / "out/table.csv").read_text() == before
    assert main([*command, str(first_stages / "out"), "--table-only"]) == 0
    assert "| eight | autoencoder.z_channels: 4 -> 8 | 2 |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def predictions(first_stages, shapes, tmp_path_factory) -> tuple[Path, list[str]]:
    """The study of predictions on one of the first stages, and the command's arguments but --out."""
    folder = tmp_path_factory.mktemp("predictions")
    first_stage = first_stages / "out/four/seed-0/model/autoencoder.safetensors"
    command = ["ablate", write(folder, PREDICTION), f"data.path={shapes}", f"autoencoder={first_stage}"]
    assert main([*command, "--out", str(folder / "out")]) == 0
    return folder / "out", command


def test_a_study_of_diffusion_models_is_evaluated(predictions):
    out, _ = predictions
    eps, v = table_of(out)
    for row in (eps, v):
        assert all(0.3 < float(row[f"error@{level}"]) < 30 for level in ("0.3", "3"))  # 1 by knowing nothing
        assert 0 <= float(row["fidelity@1"]) <= 1 and 0 <= float(row["fidelity@2"]) <= 1
    assert eps["difference"] == "diffusion.prediction: 'v' -> 'eps'" and eps["error@3_difference"]
    saved = json.loads((out / "eps/seed-3/evaluated.json").read_text())
    assert saved["settings"]["levels"] == [0.3, 3.0] and set(saved["values"]) == {
        "error@0.3",
        "error@3",
        "fidelity@1",
        "fidelity@2",
    }


def test_another_evaluation_trains_nothing(predictions, tmp_path, monkeypatch):
    out, command = predictions
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    asked = []
    monkeypatch.setattr(module, "evaluate", lambda *run: asked.append(run[2]) or {"error@1": 1.0})
    saved = {path: path.read_text() for path in out.rglob("evaluated.json")}
    tables = {path: path.read_text() for path in out.glob("*.*")}
    study = write(tmp_path, PREDICTION, evaluate={"levels": [1.0]})
    try:
        assert main([*command[:1], study, *command[2:], "--out", str(out)]) == 0
        assert len(asked) == 2 and asked[0].levels == (1.0,)
        assert float(table_of(out)[0]["error@1"]) == 1
    finally:
        for path, text in (saved | tables).items():
            path.write_text(text)


def test_the_denoising_error_in_closed_form(shapes):
    """A model that answers 0 makes an error of (1 + 1 / sigma^2) E|x0|^2."""

    class Same:
        def encode_latents(self, images):
            return images

    pipe = Pipeline.__new__(Pipeline)
    pipe.network, pipe.schedule = lambda x, t: torch.zeros_like(x), Schedule(DiffusionConfig(prediction="x0"))
    pipe.autoencoder, pipe.text_encoder, pipe.device = Same(), None, torch.device("cpu")
    data = DataConfig(path=str(shapes), size=32)
    heldout = to_float(load_images(data, "heldout_image").pixels)
    found = denoising_errors(pipe, data, Evaluation(levels=(0.5, 2.0)))
    square = float(heldout.square().mean())
    assert_close(found, {"error@0.5": 5 * square, "error@2": 1.25 * square}, atol=1e-4, rtol=1e-4)


def seen_in_first_step(config) -> tuple[dict, list]:
    """Initial weights, and all that the UNet is told in the first training step."""
    task = build(config)
    weights = {name: value.clone() for name, value in task.networks.state_dict().items()}
    told: list = []

    def note(_, args, named):
        told.append([each.clone() for each in (*args, *named.values())])

    task.unet.register_forward_pre_hook(note, with_kwargs=True)
    task.loss(0, 0)
    return weights, told[0]


def test_arms_of_a_seed_share_all_that_is_drawn(predictions, tmp_path):
    """Initialisation, pictures, noise, timesteps and captions of the first batch; another seed shares none."""
    _, command = predictions
    study = read_study(write(tmp_path, PREDICTION, seeds=[3, 5]))
    runs = plan(study, command[2:], tmp_path)
    assert [(run.arm, run.seed) for run in runs] == [("eps", 3), ("v", 3), ("eps", 5), ("v", 5)]
    (eps, eps_told), (v, v_told), (other, other_told) = (seen_in_first_step(run.config) for run in runs[:3])
    assert eps.keys() == v.keys() and all(torch.equal(eps[name], v[name]) for name in eps)
    assert len(eps_told) == 3 and all(torch.equal(a, b) for a, b in zip(eps_told, v_told, strict=True))
    assert not torch.equal(eps["unet.conv_in.weight"], other["unet.conv_in.weight"])
    assert not torch.equal(eps_told[0], other_told[0]) and not torch.equal(eps_told[1], other_told[1])


# --- stops --------------------------------------------------------------------------------------------------


def test_a_stopped_study_goes_on_to_the_same_end(first_stages, shapes, tmp_path, monkeypatch, capsys):
    """CTRL-C in the second step of the third run; the same command then equals the unbroken study."""
    whole, runs = module.train, []

    def stopping(task, resume, command):
        runs.append(resume)
        player = task.players["model"]
        loss = player.loss

        def told(step, part):
            if len(runs) == 3 and step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return loss(step, part)

        player.loss = told
        return whole(task, resume, command)

    monkeypatch.setattr(module, "train", stopping)
    study = write(tmp_path, FIRST_STAGE)
    command = ["ablate", study, f"data.path={shapes}", "--out", str(tmp_path / "out")]
    assert main(command) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("four, seed 1: stopped at step 2 of 3, saved; go on with: ldm-train ablate ")
    assert [row["seeds"] for row in table_of(tmp_path / "out")] == ["1", "1"]  # what is done is in the table
    assert main([*command, "--table-only"]) == 0
    assert "not finished, and not in the table: four seed 1, eight seed 1" in capsys.readouterr().err
    assert main(command) == 0
    assert runs == [False, False, False, True, False]
    again, _ = load_weights(tmp_path / "out/four/seed-1/model/autoencoder.safetensors")
    unbroken, _ = load_weights(first_stages / "out/four/seed-1/model/autoencoder.safetensors")
    assert all(torch.equal(again[name], unbroken[name]) for name in unbroken)
    for a, b in zip(table_of(tmp_path / "out"), table_of(first_stages / "out"), strict=True):
        for name in ("heldout_psnr", "kl", "heldout_psnr_half", "kl_difference", "seeds", "parameters"):
            assert a[name] == b[name]


# --- refusals -----------------------------------------------------------------------------------------------


def refused(command: list[str], capsys) -> str:
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ldm-train: error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"task": "poem"},
            "task must be one of autoencoder, diffusion, lora, dreambooth, textual-inversion, got 'poem'",
        ),
        ({"arms": {"four": []}}, "at least two are compared, got 1"),
        ({"arms": {"four": [], "../x": []}}, "'../x' is a folder's name"),
        ({"arms": {"four": [], "..": []}}, "'..' is a folder's name"),
        ({"arms": {"four": [], "b": "run.lr=1"}}, "arms.b must be a list of key=value"),
        ({"arms": {"four": [], "b": ["run.lr"]}}, "arms.b must be a list of key=value, got ['run.lr']"),
        ({"arms": {"four": [], "b": ["run.lr=fast"]}}, "arm b: run.lr: "),
        ({"arms": {"four": [], "b": ["run.lr=[1"]}}, "arm b: "),
        ({"baseline": "five"}, "baseline 'five' is none of the arms four, eight"),
        ({"seeds": []}, "seeds must be 1 to 31 different numbers"),
        ({"seeds": [1, 1]}, "seeds must be 1 to 31 different numbers, got [1, 1]"),
        ({"metrics": []}, "at least one is compared"),
        ({"evaluate": {"levels": [1]}}, "evaluate is for diffusion models"),
        ({"evaluate": {"levels": [0]}}, "evaluate.levels must be noise levels above 0"),
        ({"evaluate": {"captions": 0}}, "evaluate.captions 0"),
        ({"sedes": [1]}, "sedes; did you mean seeds"),
        ({"common": ["run.seed=3"]}, "run.seed=3: an ablation sets run.out and run.seed itself"),
        (
            {"arms": {"four": [], "b": ["run.stesp=3"]}},
            "arm b: unknown key run.stesp; did you mean run.steps?",
        ),
        (
            {"arms": {"four": [], "b": ["autoencoder.z_channels=8", "run.lr=0.5"]}},
            "arm b differs from four in more than autoencoder.z_channels: run.lr: 0.002 -> 0.5",
        ),
        ({"arms": {"four": [], "b": []}}, "no arm differs from four in it"),
        (
            {"arms": {**FIRST_STAGE["arms"], "c": ["autoencoder.z_channels=8"]}},
            "arms eight and c are the same",
        ),
        ({"factor": ["autoencoder.z_channels", "run.lr"]}, "factor run.lr: no arm differs"),
        ({"config": "configs/train/nothing.yaml"}, "configs/train/nothing.yaml"),
    ],
)
def test_bad_studies_are_one_line(shapes, tmp_path, capsys, changes, told):
    study = write(tmp_path, FIRST_STAGE, **changes)
    out = tmp_path / "out"
    assert told in refused(["ablate", study, f"data.path={shapes}", "--out", str(out)], capsys)
    assert not out.exists()


def test_a_section_may_be_the_factor(tmp_path):
    study = read_study(write(tmp_path, FIRST_STAGE, factor=["autoencoder"]))
    configs = {run.arm: run.config for run in plan(study, ["data.path=x"], tmp_path)}
    assert check_factor(study, configs) == {"four": "", "eight": "autoencoder.z_channels: 4 -> 8"}


def test_no_study(capsys):
    assert "configs/ablations/schedule.yaml" in refused(["ablate", "configs/ablations/schedul.yaml"], capsys)


def test_runs_of_another_configuration_are_not_mixed(first_stages, shapes, capsys):
    command = ["ablate", str(first_stages / "study.yaml"), f"data.path={shapes}"]
    told = refused([*command, "run.lr=0.5", "--out", str(first_stages / "out")], capsys)
    assert "holds a run of another configuration: run.lr: 0.002 -> 0.5" in told


def test_an_unknown_metric_names_the_known_ones(first_stages, shapes, tmp_path, capsys):
    study = write(tmp_path, FIRST_STAGE, metrics=["psrn"])
    told = refused(["ablate", study, f"data.path={shapes}", "--out", str(first_stages / "out")], capsys)
    assert "'psrn' is not in" in told and "heldout_psnr" in told


def test_a_table_of_nothing(shapes, tmp_path, capsys):
    study = write(tmp_path, FIRST_STAGE)
    command = ["ablate", study, f"data.path={shapes}", "--out", str(tmp_path / "out"), "--table-only"]
    assert "holds no finished run" in refused(command, capsys)
    assert not (tmp_path / "out").exists()


# --- shipped studies ----------------------------------------------------------------------------------------

OTHERS = {f"configs/ablations/personalise{end}.yaml" for end in ("", "_style")}  # of another command
STUDIES = [name for name in shipped_names() if name.startswith("configs/ablations/") and name not in OTHERS]


@pytest.mark.parametrize("name", STUDIES)
def test_every_shipped_study_builds(name, tmp_path):
    """On the meta device: every arm's networks."""
    study = read_study(name)
    assert len(study.seeds) >= 3 and f"ldm-train ablate {name}" in find_config(name).read_text()
    configs = {run.arm: run.config for run in plan(study, [], tmp_path)}
    lines = check_factor(study, configs)
    assert sorted(arm for arm, line in lines.items() if not line) == [study.baseline]
    with torch.device("meta"):
        for config in configs.values():
            if study.task == "diffusion":
                assert UNet(config.unet) and TextEncoder(config.text)
            else:
                assert AutoencoderKL(config.autoencoder)


def test_five_studies_are_shipped():
    assert len(STUDIES) >= 5
