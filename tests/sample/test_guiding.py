"""Guidance through the pipeline and the command: every rule against its formula on the model's own predictions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance_rules import Linear, Projected, Rescaled
from ldm.diffusion.process import to_sigma_scale
from ldm.models.variants import perturbed
from sample.__main__ import main
from sample.images import read_parameters
from sample.pipeline import Pipeline
from sample.settings import Guidance, Wording

WEB = Wording(syntax="webui")
HOW: dict[str, Any] = {"steps": 3, "sampler": "euler", "schedule": "karras", "seed": 3, "wording": WEB}


def first_estimate(pipe: Pipeline, prompt: str = "an apple", **how: Any) -> Tensor:
    """The x0 that guidance gives at the first step, from the same x for all."""
    return next(iter(pipe.stream([prompt], **{**HOW, **how}))).denoised


def predictions(pipe: Pipeline, *prompts: str) -> tuple[Tensor, float, list[Tensor]]:
    """x and sigma of the first step, and the model's x0 for each prompt."""
    sigma = float(pipe.schedule.sigmas[-1])
    x = to_sigma_scale(pipe.draw("image", pipe.latent_shape(), HOW["seed"], [0]), sigma)
    denoise = Denoiser(pipe.unet, pipe.schedule)
    with torch.no_grad():
        return x, sigma, [denoise(x, sigma, context=pipe.encode_prompts([text])) for text in prompts]


def close(found: Tensor, wanted: Tensor) -> None:
    assert_close(found, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))


def test_plain_guidance_and_a_negative_prompt(pipe: Pipeline) -> None:
    _, _, [cond, nothing, negative] = predictions(pipe, "an apple", "", "a fish")
    close(first_estimate(pipe, guidance=3), nothing + 3 * (cond - nothing))
    close(first_estimate(pipe, guidance=3, negative="a fish"), negative + 3 * (cond - negative))


def test_one_by_one_is_the_same(pipe: Pipeline) -> None:
    close(first_estimate(pipe, guidance=Guidance(3, together=False)), first_estimate(pipe, guidance=3))


def test_rescaled_and_projected(pipe: Pipeline) -> None:
    x, sigma, [cond, nothing] = predictions(pipe, "an apple", "")
    wanted = Rescaled(Linear(4), 0.7, pipe.schedule)(x, sigma, nothing, cond)
    close(first_estimate(pipe, guidance=Guidance(4, rescale=0.7)), wanted)
    wanted = Projected(4, 0.2, norm=0.5)(x, sigma, nothing, cond)
    close(first_estimate(pipe, guidance=Guidance(4, rule="projected", eta=0.2, norm=0.5)), wanted)


def test_momentum_starts_anew_with_every_batch(pipe: Pipeline) -> None:
    guidance = Guidance(4, rule="projected", momentum=-0.5)
    once = pipe.txt2img("an apple", guidance=guidance, **HOW)
    again = pipe.txt2img(["a fish", "an apple"], first=-1, batch=1, guidance=guidance, **HOW)
    assert torch.equal(once[0], again[1])


def test_plusplus_renoises_with_the_unconditional_noise(pipe: Pipeline) -> None:
    x, sigma, [cond, nothing] = predictions(pipe, "an apple", "")
    for sampler in ("euler", "ddim"):
        guidance = Guidance(0.6, rule="plusplus")
        step = next(iter(pipe.stream(["an apple"], guidance=guidance, **{**HOW, "sampler": sampler})))
        x0 = nothing + 0.6 * (cond - nothing)
        close(step.x, x0 + step.sigma * (x - nothing) / sigma)


def test_only_in_an_interval(pipe: Pipeline) -> None:
    _, _, [cond, nothing] = predictions(pipe, "an apple", "")
    close(first_estimate(pipe, guidance=Guidance(4, interval=(0.1, 2))), cond)
    close(first_estimate(pipe, guidance=Guidance(4, interval=(2, 1000))), nothing + 4 * (cond - nothing))


def test_dynamic_threshold(pipe: Pipeline) -> None:
    guided = first_estimate(pipe, guidance=4)
    found = first_estimate(pipe, guidance=Guidance(4, threshold=(0.9, 0.01)))
    assert found.abs().max() <= 0.01 * 1.0001
    assert guided.abs().max() > 0.02
    close(first_estimate(pipe, guidance=Guidance(4, threshold=(1.0, 1e6))), guided)


def test_perturbed_attention(pipe: Pipeline) -> None:
    x, sigma, [cond, nothing] = predictions(pipe, "an apple", "")
    with torch.no_grad():
        weak = Denoiser(perturbed(pipe.unet, "mid"), pipe.schedule)(
            x, sigma, context=pipe.encode_prompts(["an apple"])
        )
    assert not torch.allclose(weak, cond)
    close(first_estimate(pipe, guidance=Guidance(1, perturbed=3)), cond + 3 * (cond - weak))
    wanted = nothing + 4 * (cond - nothing) + 3 * (cond - weak)
    close(first_estimate(pipe, guidance=Guidance(4, perturbed=3)), wanted)


def test_autoguidance(pipe: Pipeline, build: Any) -> None:
    weak = build()
    with torch.no_grad():
        for parameter in weak.unet.parameters():
            parameter.mul_(0.9)
    x, sigma, [cond] = predictions(pipe, "an apple")
    with torch.no_grad():
        worse = Denoiser(weak.unet, weak.schedule)(x, sigma, context=weak.encode_prompts(["an apple"]))
    close(first_estimate(pipe, guidance=Guidance(2, weak=weak)), worse + 2 * (cond - worse))


@pytest.mark.parametrize(("part", "change", "message"), [
    ("unet", {"in_channels": 9}, r"reads something else besides latents: .* are \[9, None\], wanted \[4, None\]"),
    ("unet", {"num_classes": 1000}, "reads something else"),
    ("autoencoder", {"scale_factor": 0.5}, "has latents of another kind"),
])  # fmt: skip
def test_autoguidance_by_a_model_of_another_kind(
    pipe: Pipeline, build: Any, part: str, change: dict[str, Any], message: str
) -> None:
    weak = build()
    getattr(weak, part).config = replace(getattr(weak, part).config, **change)
    with pytest.raises(ValueError, match=message):
        first_estimate(pipe, guidance=Guidance(2, weak=weak))


def test_prompts_together(pipe: Pipeline) -> None:
    _, _, [apple, fish, nothing] = predictions(pipe, "an apple", "a fish", "")
    wanted = nothing + 2 * (0.7 * (apple - nothing) + 0.5 * (fish - nothing))
    close(first_estimate(pipe, "an apple:0.7 AND a fish:0.5", guidance=2), wanted)
    shares = replace(WEB, shares=True)
    wanted = nothing + 2 * (0.75 * (apple - nothing) + 0.25 * (fish - nothing))
    close(first_estimate(pipe, "an apple:3 AND a fish:1", guidance=2, wording=shares), wanted)


def test_a_prompt_that_changes_on_the_way(pipe: Pipeline) -> None:
    """The first of four steps with one prompt, the others with another: as two samplings in turn."""
    how = {**HOW, "steps": 4}
    found = [step.denoised for step in pipe.stream(["[an apple:a fish:1]"], **how)]
    before = [step.denoised for step in pipe.stream(["an apple"], **how)]
    assert_close(found[0], before[0], rtol=0, atol=1e-5)
    assert not torch.allclose(found[1], before[1])
    alternating = [step.denoised for step in pipe.stream(["[an apple|a fish]"], **how)]
    assert_close(alternating[:2], found[:2], rtol=0, atol=1e-5)
    assert not torch.allclose(alternating[2], found[2])


def test_the_weight_of_a_word_counts(pipe: Pipeline) -> None:
    plain = first_estimate(pipe, "a (red:1.0) apple")
    close(plain, first_estimate(pipe, "a red apple"))
    assert not torch.allclose(plain, first_estimate(pipe, "a (red:1.5) apple"))
    literal = Wording()
    assert not torch.allclose(
        first_estimate(pipe, "a (red:1.5) apple", wording=literal), first_estimate(pipe, "a (red:1.5) apple")
    )


MIXED = ["an apple", "apple " * 80, "[an apple|a fish]", "a:0.5 AND b", "a (fish:1.2)"]


def test_a_picture_does_not_depend_on_its_neighbours(pipe: Pipeline) -> None:
    """Prompts of other lengths, parts and schedules in one batch: each as if it were alone."""
    together = pipe.txt2img(MIXED, batch=5, **HOW)
    alone = [pipe.txt2img(prompt, first=i, **HOW)[0] for i, prompt in enumerate(MIXED)]
    assert_close(together, torch.stack(alone), rtol=0, atol=1e-4)
    steps = list(pipe.stream(MIXED, **HOW))
    assert [len(step.x) for step in steps] == [5, 5, 5]


def evaluations(pipe: Pipeline, **how: Any) -> list[int]:
    """Rows of the context at each call of the network."""
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, inputs, named: rows.append(len(named["context"])), with_kwargs=True
    )
    try:
        first_estimate(pipe, **how)
    finally:
        handle.remove()
    return rows


@pytest.mark.parametrize(("how", "rows"), [
    ({"guidance": 1}, [1]),
    ({"guidance": 4}, [2]),
    ({"guidance": Guidance(4, together=False)}, [1, 1]),
    ({"guidance": 4, "prompt": "a AND b"}, [3]),
    ({"guidance": 1, "prompt": "a:0.5 AND b:0.5"}, [2]),
    ({"guidance": Guidance(4, interval=(0, 1))}, [1]),
])  # fmt: skip
def test_no_more_evaluations_than_needed(pipe: Pipeline, how: dict[str, Any], rows: Sequence[int]) -> None:
    assert evaluations(pipe, **how) == list(rows)


# --- the command --------------------------------------------------------------------------------------------

EVERYTHING = [
    ["--guidance-rescale", "0.7", "--guidance-interval", "0.1:5", "--pag", "2:mid,up.0"],
    ["--guidance-rule", "projected", "--guidance-option", "norm=5", "--dynamic-threshold", "0.99:3"],
    ["--guidance-rule", "plusplus", "--guidance", "0.6", "--apart", "--negative", "a fish"],
    ["--syntax", "comfy", "--weighting", "comfy", "--clip-skip", "1", "--long-prompts", "cut"],
]


@pytest.mark.parametrize("options", EVERYTHING)
def test_every_option_is_recorded_and_repeated(model: Path, tmp_path: Path, options: list[str]) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "3"]
    assert main(["txt2img", "an (apple:1.2)", *common, *options, "--out", str(tmp_path / "a")]) == 0
    told = read_parameters(tmp_path / "a" / "00000.png")
    for option in (option for option in options if option.startswith("--") and option != "--clip-skip"):
        assert option[2:].replace("-", "_") in told
    assert main(["again", str(tmp_path / "a" / "00000.png"), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "00000.png").read_bytes() == (tmp_path / "b" / "00000.png").read_bytes()


def test_autoguidance_by_the_command(model: Path, tmp_path: Path) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "2", "--seed", "5"]
    assert main(["txt2img", "a", *common, "--autoguide", str(model), "--out", str(tmp_path / "a")]) == 0
    assert main(["txt2img", "a", *common, "--guidance", "1", "--out", str(tmp_path / "b")]) == 0
    # Away from itself goes nowhere
    made = [torch.tensor(list((tmp_path / name / "00000.png").read_bytes()[-200:-60])) for name in "ab"]
    assert torch.equal(*made)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--guidance-rule", "apg"], "guidance rule must be one of linear, projected, plusplus, got 'apg'"),
    (["--guidance-option", "norm=5"], "--guidance-option norm is not known to --guidance-rule linear"),
    (["--guidance-rule", "projected", "--guidance-option", "nrm=5"], "--guidance-option nrm is not known"),
    (["--guidance-rescale", "1.5"], "guidance rescale must be between 0 and 1, got 1.5"),
    (["--guidance-interval", "5"], "--guidance-interval must be like 0.3:5, got '5'"),
    (["--guidance-interval", "5:1"], "guidance interval needs 0 <= low < high, got 5.0 and 1.0"),
    (["--dynamic-threshold", "2"], "percentile of dynamic thresholding must be between 0 and 1, got 2"),
    (["--pag", "much"], "--pag must be like 3 or 3:mid, got 'much'"),
    (["--pag", "3:dwn"], "no attention 'dwn' here"),
    (["--guidance-rule", "plusplus", "--sampler", "heun"], "plusplus (CFG++) needs sampler ddim or euler"),
    (["--guidance-rule", "plusplus", "--eta", "0.5"], "without eta, got ddim with eta 0.5"),
    (["--autoguide", "nowhere"], "model 'nowhere' is no shipped name, no file and no folder"),
    (["--syntax", "a1111"], "syntax of prompts must be one of webui"),
    (["--weighting", "much"], "weighting of prompts must be one of original"),
    (["--clip-skip", "0"], "clip skip must be at least 1 (which skips nothing), got 0"),
    (["--clip-skip", "9"], "layer"),
    (["--long-prompts", "fold"], "long of prompts must be one of auto, chunks, cut, got 'fold'"),
    (["--guidance", "nan"], "guidance scale must be a finite number, got nan"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(model), "--device", "cpu", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["txt2img", "a", *common, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
