"""What a run lets one see: errors by noise level on a fixed held-out set, and their charts."""

import json
import math
from pathlib import Path

import pytest
import torch
from coloured import CLASSES, TINY, made_in
from torch.testing import assert_close

from ldm.diffusion.schedule import DiffusionConfig, Schedule
from sample.pipeline import Pipeline
from train import evaluation
from train.__main__ import build_task, main
from train.curves import read_runs
from train.data import DataConfig, load_images
from train.levels import LEVELS, denoising_errors, within
from train.report_page import order, page


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def errors(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("validation_error@")}


# --- the measure --------------------------------------------------------------------------------------------


def test_knowing_the_mean_and_variance_alone_gives_one_at_any_level():
    """The best estimate of normal latents is x / (1 + sigma^2), whose error is the variance left."""
    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x, sigma):
        return x / (1 + sigma**2)

    found = denoising_errors(denoise, [(x0, {})], LEVELS, seed=0)
    assert list(found) == list(LEVELS)
    assert_close(list(found.values()), [1.0] * 5, atol=0.05, rtol=0)


def test_the_noise_is_that_of_the_seed_and_the_batch():
    x0 = torch.zeros(8, 4, 8, 8)

    def errors_of(batches, seed):
        return denoising_errors(lambda x, sigma: x, batches, (2.0,), seed)[2.0]

    one = errors_of([(x0, {})], 0)
    assert errors_of([(x0, {})], 0) == one != errors_of([(x0, {})], 1)
    assert errors_of([(x0, {}), (x0, {})], 0) != one  # the second batch has noise of its own
    assert one == pytest.approx(1.25 * 4, rel=0.1)  # (1 + 1 / 4) |2 eps|^2


def test_without_levels_nothing_is_encoded():
    def batches():
        pytest.fail("asked for")
        yield

    assert denoising_errors(lambda x, sigma: x, batches(), (), 0) == {}


@pytest.mark.parametrize(
    "change", [{}, {"zero_terminal_snr": True, "prediction": "v"}, {"prediction": "flow", "schedule": "flow"}]
)
def test_levels_outside_of_the_schedule_are_left_out(change):
    schedule = Schedule(DiffusionConfig(**change))
    low = float(schedule.sigmas[0])
    assert within((low / 2, 1.0, 1.0, low), schedule) == (1.0, low)
    assert within(LEVELS, schedule) == LEVELS


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    return made_in(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory) -> dict[str, Path]:
    """Of two predictions, weightings and seeds, and one with levels of its own."""
    folder = tmp_path_factory.mktemp("watched")
    options = {
        "v": ["diffusion.prediction=v"],
        "eps": ["diffusion.prediction=eps", "loss.weighting=min_snr", "loss.density=lognormal", "run.seed=7"],
        "own": ["validation_levels=[0.5,2,1000]"],
    }
    for name, changes in options.items():
        out = f"run.out={folder / name}"
        assert main(["diffusion", TINY, *made, *CLASSES, *changes, out]) == 0
    return {name: folder / name for name in options}


def test_each_validation_has_the_error_by_level(runs):
    for name in ("v", "eps"):
        rows = [row for row in log(runs[name]) if "validation_loss" in row]
        assert [row["step"] for row in rows] == [3, 6]
        for row in rows:
            assert list(errors(row)) == [f"validation_error@{level:g}" for level in LEVELS]
            assert all(math.isfinite(value) and value > 0 for value in errors(row).values())
    rows = [row for row in log(runs["own"]) if "validation_loss" in row]
    assert list(errors(rows[-1])) == ["validation_error@0.5", "validation_error@2"]  # 1000: no such noise


def test_it_is_the_error_that_an_ablation_measures(runs, made, monkeypatch):
    """Of the finished model, whose weights went through a file, and of latents encoded anew."""
    pipe = Pipeline.load(runs["v"] / "model", "cpu")
    data = DataConfig(path=made[0].removeprefix("data.path="), size=32)
    images = load_images(data, "heldout_image")
    assert images.files == ["8.png", "9.png"]
    conditioning = pipe.conditioning
    monkeypatch.setattr(pipe, "conditioning", lambda _: conditioning(["2", "0"]))  # labels, not captions
    found = evaluation.denoising_errors(pipe, data, evaluation.Evaluation(levels=LEVELS))
    logged = {key.removeprefix("validation_"): value for key, value in errors(log(runs["v"])[-1]).items()}
    assert found == pytest.approx(logged, rel=0.01)


def test_an_untrained_models_errors_do_not_depend_on_weighting_density_or_noise(made, tmp_path):
    """What the training loss does, and the validation loss."""
    changes = [
        [],
        ["loss.weighting=min_snr", "loss.density=lognormal"],
        ["loss.distance=huber", "noise.offset=0.3", "run.batch=2"],
    ]
    found = []
    for number, change in enumerate(changes):
        out = f"run.out={tmp_path / str(number)}"
        task = build_task("diffusion", TINY, [*made, *CLASSES, *change, out])
        torch.nn.init.ones_(task.unet.conv_out.weight)  # an untrained network answers 0
        with torch.no_grad():
            found.append(task.validate())
    losses = [values.pop("validation_loss") for values in found]
    assert found[0] == found[1] == found[2] and len(found[0]) == 5
    assert len(set(losses)) == 3


def test_the_levels_may_change_at_resume(runs, made, capsys):
    options = ["validation_levels=[1]", f"run.out={runs['own']}"]
    assert main(["diffusion", TINY, *made, *CLASSES, *options, "--resume"]) == 0
    assert main(["diffusion", TINY, *made, *CLASSES, "validation_levels=[-1]", f"run.out={runs['own']}"]) == 2
    assert "validation_levels must be above 0, got [-1.0]" in capsys.readouterr().err


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_has_a_curve_for_each_level_in_their_order_and_one_over_levels(runs):
    html = page(read_runs([runs["v"], runs["eps"]]))
    charts = [html.index(f'aria-label="validation_error@{level:g} by step"') for level in LEVELS]
    assert charts == sorted(charts)
    over = html[html.index('aria-label="error by sigma"') :]
    over = over[: over.index("</svg>")]
    assert over.count("<polyline") == 2 and over.count("<circle") == 10
    last = errors(log(runs["v"])[-1])["validation_error@0.3"]
    assert f"<title>v, sigma 0.3: {last:.5g}</title>" in over
    assert ">sigma</text>" in over and ">step</text>" not in over


def test_without_levels_there_is_no_such_chart(unbroken):
    assert "by sigma" not in page(read_runs([unbroken]))


def test_names_sort_by_level():
    names = ["validation_error@10", "validation_error@3", "odd@name", "validation_error@0.1", "odd@1-2"]
    assert sorted(names, key=order)[:3] == [
        "validation_error@0.1",
        "validation_error@3",
        "validation_error@10",
    ]
