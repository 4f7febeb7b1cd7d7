"""The pipeline: what determines a picture and what does not, files and their faults, limits of parameters."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sample
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig
from ldm.seeding import generator
from ldm.weights.folder import weights_hash
from ldm.weights.io import load_weights, save_weights
from sample import pipeline
from sample.pipeline import Pipeline, batches, find_model

PROMPTS = ["a red apple", "a blue fish", "", "a red apple"]
PIXEL = 2 / 255  # one step of 8 bits, in [-1, 1]


def evaluations(pipe: Pipeline, **options: Any) -> int:
    """How many samples go through the UNet for `txt2img(**options)`."""
    sizes: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
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
def test_every_number_of_steps(build: Callable[..., Pipeline], sampler: str, steps: int) -> None:
    pipe = build(DiffusionConfig(num_timesteps=10))
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
    build: Callable[..., Pipeline], diffusion: DiffusionConfig, sampler: str
) -> None:
    assert build(diffusion).txt2img("a", steps=4, sampler=sampler).isfinite().all()


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


# --- files --------------------------------------------------------------------------------------------------


def states(pipe: Pipeline) -> dict[str, Tensor]:
    parts = {"unet": pipe.unet, "autoencoder": pipe.autoencoder, "text": pipe.text_encoder}
    return {f"{part}.{k}": v for part, m in parts.items() if m is not None for k, v in m.state_dict().items()}


def test_a_round_trip_in_float32_is_bit_equal(pipe: Pipeline, model: Path) -> None:
    loaded = Pipeline.load(model, device="cpu")
    before, after = states(pipe), states(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.schedule.config == pipe.schedule.config
    assert loaded.autoencoder.config == pipe.autoencoder.config
    assert torch.equal(loaded.txt2img(PROMPTS, steps=2), pipe.txt2img(PROMPTS, steps=2))
    assert not any(p.requires_grad for p in loaded.unet.parameters())


def test_half_precision_files_change_a_picture_little(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path)
    tensors, header = load_weights(tmp_path / "unet.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert header["diffusion"]["schedule"] == "scaled_linear"
    loaded = Pipeline.load(tmp_path, device="cpu")
    assert loaded.dtype == torch.float32
    assert_close(loaded.txt2img("a", steps=4), pipe.txt2img("a", steps=4), atol=5 * PIXEL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_half_precision(pipe: Pipeline, model: Path, dtype: torch.dtype) -> None:
    half = Pipeline.load(model, device="cpu", dtype=dtype)
    assert half.dtype == dtype
    images = half.txt2img(PROMPTS, steps=4, guidance=2.0)
    assert images.dtype == torch.float32
    difference = (images - pipe.txt2img(PROMPTS, steps=4, guidance=2.0)).abs().mean()
    assert difference < 0.1  # bfloat16 has 8 bits of mantissa; a wrong picture differs by about 0.4


def test_prediction_and_schedule_travel_with_the_unet(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    config = DiffusionConfig(schedule="cosine", prediction="v", zero_terminal_snr=True, num_timesteps=20)
    build(config).save(tmp_path)
    assert Pipeline.load(tmp_path, device="cpu").schedule.config == config


def test_the_folder_of_a_run_is_its_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"


def test_shipped_names(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "models" / "emoji")
    (tmp_path / "emoji").mkdir()
    monkeypatch.setattr(pipeline, "SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert find_model("emoji") == tmp_path / "models" / "emoji"
    assert find_model("./emoji/../models/emoji").samefile(tmp_path / "models" / "emoji")
    assert sample.Pipeline.load(device="cpu").folder == tmp_path / "models" / "emoji"
    with pytest.raises(
        FileNotFoundError, match="'emojis' is no shipped name and no folder; did you mean emoji"
    ):
        find_model("emojis")
    with pytest.raises(FileNotFoundError, match=r"unet\.safetensors does not exist"):
        Pipeline.load(tmp_path / "emoji")


def test_the_hash_changes_with_the_weights(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "a")
    assert weights_hash(tmp_path / "a") == weights_hash(model)
    assert len(weights_hash(model)) == 12
    data = bytearray((tmp_path / "a" / "unet.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a" / "unet.safetensors").write_bytes(data)
    assert weights_hash(tmp_path / "a") != weights_hash(model)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, header = load_weights(path)
    change(tensors, header)
    save_weights(path, tensors, header)


def with_nan(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["conv_in.bias"][0] = torch.nan


def without_config(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["config"]


def without_diffusion(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["diffusion"]


def with_foreign_config(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["config"]["target"] = "os.system"


def with_other_width(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["config"]["model_channels"] = 32


def without_a_tensor(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["conv_out.bias"]


@pytest.mark.parametrize(("change", "message"), [
    (with_nan, "tensor conv_in.bias holds NaN"),
    (without_config, "header has no 'config'"),
    (without_diffusion, "header has no 'diffusion'"),
    (with_foreign_config, "unknown key target"),
    (with_other_width, "wrong shape"),
    (without_a_tensor, "1 missing: conv_out.bias"),
])  # fmt: skip
def test_faulty_files_are_named(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "m")
    rewrite(folder / "unet.safetensors", change)
    with pytest.raises(ValueError, match="unet.safetensors.*" + message) as caught:
        Pipeline.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["unet", "autoencoder", "text_encoder"])
def test_missing_truncated_and_swapped_files(model: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(model, tmp_path / "m") / f"{name}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}.safetensors is truncated"):
        Pipeline.load(tmp_path / "m")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.safetensors does not exist"):
        Pipeline.load(tmp_path / "m")
    other = "autoencoder" if name != "autoencoder" else "unet"
    shutil.copy(model / f"{other}.safetensors", path)
    with pytest.raises(ValueError, match=rf"{name}.safetensors: unknown key"):
        Pipeline.load(tmp_path / "m")


def test_a_file_is_no_model_folder(model: Path) -> None:
    with pytest.raises(ValueError, match="is a file; expected the folder of a model"):
        Pipeline.load(model / "unet.safetensors")


def test_parts_of_two_models(build: Callable[..., Pipeline]) -> None:
    one, other = build(), build(text=False)
    with pytest.raises(ValueError, match="UNet reads a context of width 16, the text encoder gives None"):
        Pipeline(one.unet, one.autoencoder, None, DiffusionConfig(), device="cpu")
    with pytest.raises(ValueError, match="context of width None, the text encoder gives 16"):
        Pipeline(other.unet, one.autoencoder, one.text_encoder, DiffusionConfig(), device="cpu")


def test_weights_too_large_for_half_precision_are_not_saved(
    build: Callable[..., Pipeline], tmp_path: Path
) -> None:
    large = build(text=False)
    large.unet.conv_in.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"unet\.safetensors: conv_in\.bias is not finite as torch\.float16"):
        large.save(tmp_path)
    assert not (tmp_path / "unet.safetensors").exists()


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
