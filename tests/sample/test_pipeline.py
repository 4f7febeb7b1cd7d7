"""The pipeline: what determines a picture and what does not, limits of every parameter."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig
from ldm.seeding import generator
from sample.pipeline import Pipeline, batches

PROMPTS = ["a red apple", "a blue fish", "", "a red apple"]
PIXEL = 2 / 255  # one step of 8 bits, in [-1, 1]


def evaluations(pipe: Pipeline, **options: Any) -> int:
    """How many samples go through the UNet for `txt2img(**options)`."""
    sizes: list[int] = []

    def count(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        sizes.append(max(len(inputs[0]), len(named.get("context", inputs[0]))))  # a context may share its x

    handle = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        pipe.txt2img(**options)
    finally:
        handle.remove()
    return sum(sizes)


# --- what determines a picture ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline, sampler: str) -> None:
    images = {
        batch: pipe.txt2img(PROMPTS, seed=3, steps=4, sampler=sampler, batch=batch) for batch in (1, 3, 4)
    }
    assert images[4].shape == (4, 3, 32, 32)
    for batch in (1, 3):
        # Only the order of sums inside matrix products differs.
        assert_close(images[batch], images[4], atol=0.01 * PIXEL, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_is_a_function_of_prompt_seed_and_number(pipe: Pipeline, sampler: str) -> None:
    def draw(prompts: list[str], **more: Any) -> Tensor:
        return pipe.txt2img(prompts, steps=3, sampler=sampler, batch=1, **more)

    images = draw(PROMPTS, seed=5)
    assert torch.equal(images, draw(PROMPTS, seed=5))
    assert torch.equal(images[2:], draw(PROMPTS[2:], seed=5, first=2))
    for other in (draw(PROMPTS, seed=6), draw(PROMPTS, seed=5, first=1)):
        assert (images - other).abs().amax(dim=(1, 2, 3)).min() > PIXEL
    assert (images[0] - images[3]).abs().max() > PIXEL  # one prompt, two numbers


def test_noise_is_bit_equal_whatever_the_batch(pipe: Pipeline) -> None:
    together = pipe.noise((4, 8, 8), *[(7, "image", i) for i in range(3)])
    alone = torch.randn(4, 8, 8, generator=generator(7, "image", 2))
    assert torch.equal(together[2], alone)


def test_noise_of_stochastic_steps_is_bit_equal_whatever_the_batch(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(batch: int) -> list[Tensor]:
        """Noise as it is drawn, for each batch at the start and in the two of three steps that add some."""
        seen: list[Tensor] = []
        draw = type(pipe).noise
        monkeypatch.setattr(pipe, "noise", lambda *keys: seen.append(draw(pipe, *keys)) or seen[-1])
        pipe.txt2img(PROMPTS[:3], seed=7, steps=3, sampler="euler_ancestral", batch=batch)
        monkeypatch.undo()
        return seen

    alone, together = drawn(1), drawn(3)
    assert (len(alone), len(together)) == (9, 3)
    for step in range(3):
        assert torch.equal(torch.cat(alone[step::3]), together[step])


def test_ddim_by_hand(pipe: Pipeline) -> None:
    """Two guided steps written out in the paper's notation, from the noise to the picture."""
    alpha_bar = pipe.schedule.alpha_bar.float()
    x = torch.randn(1, 4, 8, 8, generator=generator(9, "image", 4))
    context = pipe.text_encoder(pipe.tokenizer(["", "a red apple"]))  # type: ignore[misc]
    for t, t_prev in pairwise([501, 1, 0]):
        uncond, cond = (pipe.unet(x, torch.tensor([float(t)]), context[i : i + 1]) for i in (0, 1))
        eps = uncond + 3.0 * (cond - uncond)
        x0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x = alpha_bar[t_prev].sqrt() * x0 + (1 - alpha_bar[t_prev]).sqrt() * eps
    expected = pipe.autoencoder.decode(x / 0.9 + 0.1).clamp(-1, 1)
    images = pipe.txt2img("a red apple", seed=9, first=4, steps=2, guidance=3.0)
    assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("guidance", "expected"), [(1.0, 12), (0.0, 12), (7.5, 24), (-1.0, 24)])
def test_guidance_0_and_1_take_one_evaluation_a_step(pipe: Pipeline, guidance: float, expected: int) -> None:
    assert evaluations(pipe, prompts=PROMPTS, steps=3, guidance=guidance) == expected


def test_guidance_1_is_conditional_and_0_unconditional(pipe: Pipeline) -> None:
    def draw(prompt: str, **more: Any) -> Tensor:
        return pipe.txt2img(prompt, steps=3, **more)

    conditional = draw("a red apple", guidance=1)
    assert torch.equal(conditional, draw("a red apple", guidance=1, negative="a blue fish"))
    assert torch.equal(draw("a red apple", guidance=0), draw("", guidance=1))
    assert torch.equal(draw("a red apple", guidance=0, negative="fish"), draw("fish", guidance=1))
    assert (conditional - draw("", guidance=1)).abs().max() > PIXEL
    assert (draw("a red apple") - draw("a red apple", negative="fish")).abs().max() > PIXEL


@pytest.mark.parametrize("guidance", [-3.0, 1e6])
def test_odd_guidance_gives_finite_pictures(pipe: Pipeline, guidance: float) -> None:
    assert pipe.txt2img("a red apple", steps=3, guidance=guidance).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 9, 10])
def test_every_number_of_steps(kept: Callable[..., Pipeline], sampler: str, steps: int) -> None:
    pipe = kept(DiffusionConfig(num_timesteps=10))
    seen = list(pipe.stream(["a"], steps=steps, sampler=sampler))
    assert [step.index for step in seen] == list(range(steps))
    assert pipe.decode(seen[-1].sample).isfinite().all()


def test_eta_is_for_samplers_that_have_it(pipe: Pipeline) -> None:
    default, noisy = pipe.txt2img("a", steps=3), pipe.txt2img("a", steps=3, eta=1.0)
    assert torch.equal(default, pipe.txt2img("a", steps=3, eta=0.0))
    assert (default - noisy).abs().max() > PIXEL
    ancestral, plain = (pipe.txt2img("a", steps=3, sampler="euler_ancestral", eta=eta) for eta in (None, 0.0))
    assert (ancestral - plain).abs().max() > PIXEL
    with pytest.raises(ValueError, match="sampler euler has no eta"):
        pipe.txt2img("a", steps=3, sampler="euler", eta=1.0)


@pytest.mark.parametrize("diffusion", [
    DiffusionConfig(prediction="v", zero_terminal_snr=True),
    DiffusionConfig(prediction="x0", schedule="cosine"),
])  # fmt: skip
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_parameterisations(
    kept: Callable[..., Pipeline], diffusion: DiffusionConfig, sampler: str
) -> None:
    assert kept(diffusion).txt2img("a", steps=4, sampler=sampler).isfinite().all()


# --- stream -------------------------------------------------------------------------------------------------


def test_stream_leaves_everything_to_the_caller(pipe: Pipeline) -> None:
    stream = pipe.stream(PROMPTS[:2], steps=5)
    step = next(stream)
    assert torch.is_grad_enabled()
    assert (step.index, step.x.shape, step.denoised.shape) == (0, (2, 4, 8, 8), (2, 4, 8, 8))
    assert pipe.decode(step.denoised).shape == (2, 3, 32, 32)  # a preview
    stream.close()  # an early stop
    *_, last = pipe.stream(PROMPTS[:2], steps=5)
    assert torch.equal(pipe.decode(last.sample), pipe.txt2img(PROMPTS[:2], steps=5))


def test_progress_counts_all_batches(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe.txt2img(PROMPTS, steps=2, batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_modules_in_training_are_left_as_they_are(build: Callable[..., Pipeline]) -> None:
    source = build()
    for module in (source.unet, source.text_encoder):
        module.train().requires_grad_(True)  # type: ignore[union-attr]
    live = Pipeline(
        source.unet, source.autoencoder, source.text_encoder, source.schedule.config, device="cpu"
    )
    assert live.unet is source.unet
    images = live.txt2img(["a"], steps=2)
    assert not images.requires_grad
    assert live.unet.training
    assert all(p.requires_grad and p.grad is None for p in live.unet.parameters())


# --- models that read no text -------------------------------------------------------------------------------


def test_a_model_without_text(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    silent = build(text=False)
    silent.save(tmp_path)
    loaded = Pipeline.load(tmp_path, device="cpu")
    assert (loaded.text_encoder, loaded.tokenizer) == (None, None)
    assert evaluations(loaded, prompts=["", ""], steps=3) == 6  # there is nothing to guide by
    for options in ({"prompts": "an apple"}, {"prompts": "", "negative": "an apple"}):
        with pytest.raises(ValueError, match="reads no text, so a prompt must be empty; got 'an apple'"):
            loaded.txt2img(**options)  # type: ignore[arg-type]


# --- limits of the parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
    ({"steps": 1001}, "steps must be between 1 and 1000, got 1001"),
    ({"guidance": float("nan")}, "guidance scale must be a finite number, got nan"),
    ({"guidance": float("inf")}, "guidance scale must be a finite number, got inf"),
    ({"sampler": "eular"}, "unknown sampler 'eular': did you mean euler"),
    ({"size": (33, 32)}, "size 33x32: sides must be multiples of 8; the nearest is 32x32"),
    ({"size": (62, 13)}, "the nearest is 64x16"),
    ({"size": (0, 3)}, "the nearest is 8x8"),
    ({"batch": 0}, "at least one picture and a batch of at least 1 are needed, got 1 and 0"),
    ({"prompts": []}, "at least one picture"),
    ({"eta": 2.0}, "eta must be between 0 and 1, got 2.0"),
])  # fmt: skip
def test_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe.txt2img(**{"prompts": "a", **options})
    assert "\n" not in str(caught.value)


def test_other_sizes_than_the_trained_one(pipe: Pipeline) -> None:
    assert pipe.txt2img("a", steps=2, size=(40, 8)).shape == (1, 3, 8, 40)


def test_batches() -> None:
    assert batches(5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert batches(1, 9) == [range(1)]


def test_nan_in_the_trajectory_names_the_step(build: Callable[..., Pipeline]) -> None:
    broken = build()
    calls = 0

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * torch.nan if calls == 2 else output

    broken.unet.register_forward_hook(forward)
    with pytest.raises(ValueError, match=r"not finite after step 2 of 3 \(sampler ddim, guidance 7.5"):
        broken.txt2img("a", steps=3)
    assert calls == 2  # stopped there


def test_nan_in_the_decoder_is_no_black_picture(build: Callable[..., Pipeline]) -> None:
    broken = build()
    broken.autoencoder.decoder.conv_out.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"decoding in torch\.float32 gave values that are not finite"):
        broken.txt2img("a", steps=2)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_zero_terminal_snr_starts_at_pure_noise(build: Callable[..., Pipeline], sampler: str) -> None:
    pipe = build(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
    seen: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    assert torch.isfinite(pipe.txt2img([""], steps=4, sampler=sampler, guidance=1)).all()
    assert seen == [999, 749, 499, 249]
