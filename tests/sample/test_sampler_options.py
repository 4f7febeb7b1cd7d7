"""`--schedule`, `--eta` and `--sampler-option`: they reach the sampler, are recorded, and fit or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion.grids import make_grid
from ldm.diffusion.schedule import DiffusionConfig
from sample.__main__ import main
from sample.arguments import named_values
from sample.images import read_parameters
from sample.pipeline import Pipeline


def run(pipe: Pipeline, **options: Any) -> torch.Tensor:
    return pipe.txt2img("a red apple", seed=2, steps=4, **options)


def test_the_schedule_is_what_is_visited(pipe: Pipeline) -> None:
    steps = list(pipe.stream(["a"], steps=5, sampler="dpmpp_2m", schedule="beta"))
    assert [step.sigma for step in steps] == make_grid(pipe.schedule, "beta", 5)[1:].tolist()
    usual = list(pipe.stream(["a"], steps=5, sampler="dpmpp_2m"))
    assert [step.sigma for step in usual] == make_grid(pipe.schedule, "karras", 5)[1:].tolist()


def test_options_reach_the_sampler(pipe: Pipeline) -> None:
    default = run(pipe, sampler="unipc")
    assert torch.equal(default, run(pipe, sampler="unipc", options={"order": 2, "variant": "bh2"}))
    assert not torch.equal(default, run(pipe, sampler="unipc", options={"variant": "bh1"}))
    assert torch.equal(run(pipe, sampler="ddim", options={"eta": 1.0}), run(pipe, sampler="ddim", eta=1.0))
    quiet = run(pipe, sampler="edm_heun", options={"churn": 0})
    torch.testing.assert_close(quiet, run(pipe, sampler="heun", schedule="karras"), rtol=0, atol=1e-5)


def test_two_draws_of_a_step_differ(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    noise = pipe.noise
    monkeypatch.setattr(pipe, "noise", lambda shape, *keys: seen.extend(keys) or noise(shape, *keys))  # type: ignore[func-returns-value]
    list(pipe.stream(["a", "b"], steps=3, sampler="dpmpp_sde", seed=9))
    assert len(seen) == len(set(seen)) == 2 * (1 + 2 * 2)  # start, and two draws in each step but the last


def test_a_pure_noise_model(build: Any) -> None:
    pure = build(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
    assert run(pure, sampler="dpmpp_2m").isfinite().all()  # from the top, whatever is usual
    assert run(pure, sampler="dpmpp_2m", schedule="karras").isfinite().all()
    with pytest.raises(ValueError, match="schedule compvis starts below pure noise"):
        run(pure, schedule="compvis")


def test_named_values() -> None:
    assert named_values(["order=3", "variant=bh1", "churn=1e1"], "--x") == {
        "order": 3,
        "variant": "bh1",
        "churn": 10.0,
    }
    assert isinstance(named_values(["order=3"], "--x")["order"], int)


OPTIONS = ["--sampler", "unipc", "--schedule", "karras:5", "--sampler-option", "order=3"]


def test_the_command_records_them_and_makes_it_again(model: Path, tmp_path: Path) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "3"]
    assert main(["txt2img", "a", *common, "--out", str(tmp_path / "a"), *OPTIONS]) == 0
    told = read_parameters(tmp_path / "a" / "00000.png")
    assert (told["schedule"], told["sampler_option"]) == ("karras:5", ["order=3"])
    assert "eta" not in told
    assert main(["again", str(tmp_path / "a" / "00000.png"), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "00000.png").read_bytes() == (tmp_path / "b" / "00000.png").read_bytes()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--schedule", "karas"], "unknown schedule 'karas': did you mean karras"),
    (["--schedule", "simple:2"], "schedule simple has no rho"),
    (["--sampler", "plms", "--eta", "0.5"], "sampler plms has no eta: it has no options"),
    (["--sampler", "unipc", "--sampler-option", "order=9"], "order must be one of 1, 2, 3, got 9"),
    (["--sampler-option", "order"], "--sampler-option must be like order=3, got 'order'"),
    (["--sampler", "edm_heun", "--sampler-option", "churn=much"], "churn of sampler edm_heun must be like 40.0"),
    (["--sampler", "edm_heun", "--sampler-option", "churn=nan"], "churn must be at least 0, got nan"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "3", "--out", str(tmp_path / "out")]
    assert main(["txt2img", "a", *common, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
