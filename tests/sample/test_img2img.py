"""Pictures from pictures: where sampling starts, what the ends of the strength are, seeds in between."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula import filled, named_input, reference
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.editing import cut, slerp
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.seeding import generator
from ldm.weights.compvis import UNET_PREFIX
from ldm.weights.io import load_strict
from sample import words
from sample.__main__ import main
from sample.images import read_parameters, to_pil, to_tensor
from sample.pipeline import Pipeline
from sample.start import Start

PIXEL = 2 / 255


@pytest.fixture
def image() -> Tensor:
    """Two pictures of 32 x 40 pixels (W x H 40 x 32) with large shapes in them."""
    coarse = torch.rand((2, 3, 4, 5), generator=generator("img2img test")) * 2 - 1
    return torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="nearest")


def calls(pipe: Pipeline, draw: Callable[[], Any]) -> list[float]:
    """The timesteps at which `draw` evaluates the UNet."""
    seen: list[float] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    try:
        draw()
    finally:
        handle.remove()
    return seen


# --- closed form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "strength", "taken"), [
    (10, 0.6, 6), (10, 0.0, 0), (10, 1e-6, 1), (10, 0.04, 1), (10, 0.15, 2), (10, 0.35, 4), (10, 0.95, 10),
    (10, 1, 10), (1, 0.3, 1), (1, 1.0, 1), (50, 0.29, 15), (3, 0.5, 2),
])  # fmt: skip
def test_steps_taken(steps: int, strength: float, taken: int) -> None:
    assert cut(steps, strength) == (steps, taken)


def test_more_strength_never_takes_fewer_steps() -> None:
    taken = [cut(17, i / 1000)[1] for i in range(1001)]
    assert taken == sorted(taken)
    assert set(taken) == set(range(18))


@pytest.mark.parametrize(
    ("steps", "strength", "whole"), [(10, 0.5, 20), (6, 0.6, 10), (7, 1, 7), (3, 0.8, 4)]
)
def test_exact_steps(steps: int, strength: float, whole: int) -> None:
    assert cut(steps, strength, exact=True) == (whole, steps)


@pytest.mark.parametrize("strength", [-1e-9, 1.0001, math.nan, math.inf, -1])
def test_strength_outside_its_range(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be between 0 .* and 1"):
        cut(10, strength)


def test_slerp() -> None:
    """Of orthogonal noises cos and sin; in general of the norm of both, and at the ends one of them."""
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    third = slerp(a, b, 1 / 3)
    assert_close(third[0], 3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert_close(third[1], torch.tensor([4 / 3, 4 / 3]))  # parallel: linear
    x, y = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(slerp(x, y, 0), x)
    assert torch.equal(slerp(x, y, 1), y)
    for share in (0.2, 0.5, 0.9):
        assert slerp(x, y, share).std() == pytest.approx(1, abs=0.05)
    y = y * (x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    assert_close(slerp(x, y, 0.3).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    with pytest.raises(ValueError, match="variation strength must be between 0 and 1, got nan"):
        slerp(x, y, math.nan)


# --- the original -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> Pipeline:
    """Stable Diffusion 1 with 32 base channels and the reference's weights in the UNet."""
    config = UNetConfig(model_channels=32, context_dim=64, sample_size=16)
    unet = UNet(config)
    load_strict(unet, filled(config, UNET_PREFIX), "the formula")
    text = TextEncoder(TextConfig(width=64, layers=1, heads=2, mlp_width=32))
    first_stage = AutoencoderKL(AutoencoderConfig(base_channels=32, num_res_blocks=1))
    parts = [part.eval().requires_grad_(False) for part in (unet, first_stage, text)]
    return Pipeline(*parts, DiffusionConfig(), device="cpu")  # type: ignore[arg-type]


def test_six_of_ten_steps_as_the_original(original: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its six steps, from its start. That is noised to timestep 601 and denoised from 501 on, one index lower;
    ours is noised to where it starts, so it is given the latents that then come to the same start."""
    golden = reference("sd15-tiny.safetensors")
    noise, alpha_bar = named_input("noise", 1, 4, 16, 16), original.schedule.alpha_bar.float()
    by_hand = alpha_bar[601].sqrt() * named_input("z0", 1, 4, 16, 16) + (1 - alpha_bar[601]).sqrt() * noise
    assert_close(by_hand, golden["img2img.encoded"], atol=1e-5, rtol=0)
    contexts = {name: named_input(name, 1, 77, 64) for name in ("cond", "uncond")}
    monkeypatch.setattr(words, "contexts", lambda _, texts, how: {t: contexts[t[0].text] for t in texts})
    monkeypatch.setattr(original, "noise", lambda shape, *keys: noise)
    z0 = (golden["img2img.encoded"] - (1 - alpha_bar[501]).sqrt() * noise) / alpha_bar[501].sqrt()
    *_, last = original.stream(["cond"], negative="uncond", steps=10, start=Start(z0, strength=0.6))
    assert last.index == 5
    expected = golden["img2img.decoded"]
    assert float((last.sample - expected).norm() / expected.norm()) < 1e-3


# --- behaviour ----------------------------------------------------------------------------------------------


def test_by_hand(pipe: Pipeline, image: Tensor) -> None:
    """Half of four steps: the picture's latents at timestep 251, then to 1 and to 0, in DDIM's notation."""
    alpha_bar = pipe.schedule.alpha_bar.float()
    posterior = pipe.autoencoder.encode(image[:1])
    z = posterior.mean + posterior.std * torch.randn(4, 8, 10, generator=generator(9, "encode", 4))
    noise = torch.randn(1, 4, 8, 10, generator=generator(9, "image", 4))
    x = alpha_bar[251].sqrt() * (z - 0.1) * 0.9 + (1 - alpha_bar[251]).sqrt() * noise
    context = pipe.encode_prompts(["a red apple"])
    for t, t_prev in ((251, 1), (1, 0)):
        eps = pipe.unet(x, torch.tensor([float(t)]), context)
        x0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x = alpha_bar[t_prev].sqrt() * x0 + (1 - alpha_bar[t_prev]).sqrt() * eps
    expected = pipe.autoencoder.decode(x / 0.9 + 0.1).clamp(-1, 1)
    made = pipe.img2img(image[0], "a red apple", strength=0.5, steps=4, guidance=1, seed=9, first=4)
    assert_close(made, expected, atol=1e-4, rtol=0)


def test_strength_0_is_the_autoencoder(pipe: Pipeline, image: Tensor) -> None:
    made = pipe.img2img(image, ["a", "b"], strength=0, seed=5, steps=3)
    noise = torch.stack([torch.randn(4, 8, 10, generator=generator(5, "encode", i)) for i in range(2)])
    expected = pipe.autoencoder.decode(pipe.autoencoder.encode(image).sample(noise)).clamp(-1, 1)
    assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m"])
def test_strength_1_is_txt2img(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    how: dict[str, Any] = {"seed": 5, "steps": 3, "sampler": sampler}
    made = pipe.img2img(image, ["a", "b"], strength=1, **how)
    assert torch.equal(made, pipe.txt2img(["a", "b"], size=(40, 32), **how))
    almost = pipe.img2img(image, ["a", "b"], strength=0.99, **how)  # as many steps, but not forgotten
    assert (made - almost).abs().max() > PIXEL


def test_the_more_strength_the_less_is_left(pipe: Pipeline, image: Tensor) -> None:
    """The network of random weights takes pictures apart: what it was started from fades step by step."""
    found = pipe.img2img(image, ["a", "a"], strength=0, steps=8)
    far = [
        float((pipe.img2img(image, ["a", "a"], strength=s, steps=8) - found).square().mean())
        for s in (0.1, 0.3, 0.6, 1)
    ]
    assert far == sorted(far)
    assert far[0] < far[-1] / 4


def test_the_timesteps(pipe: Pipeline, image: Tensor) -> None:
    def timesteps(**more: Any) -> list[float]:
        return calls(pipe, lambda: pipe.img2img(image[0], "a", **more))

    assert timesteps(strength=0.5, steps=4) == [251, 1]
    assert timesteps(strength=1e-6, steps=4) == [1]
    assert timesteps(strength=0, steps=4) == []
    assert timesteps(strength=0.5, steps=4, exact_steps=True) == [376, 251, 126, 1]
    with pytest.raises(ValueError, match="3 exact steps at strength 0.001 are the end of 3000 steps"):
        timesteps(strength=0.001, steps=3, exact_steps=True)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    prompts, images = ["a", "b", "a"], image[[0, 1, 1]]
    one, all_ = (
        pipe.img2img(images, prompts, batch=batch, steps=4, sampler=sampler, seed=2) for batch in (1, 3)
    )
    assert_close(one, all_, atol=0.01 * PIXEL, rtol=0)
    assert (one[1] - one[2]).abs().max() > PIXEL
    last = pipe.img2img(image[1], "a", steps=4, sampler=sampler, seed=2, first=2)
    assert_close(last, one[2:], atol=0.01 * PIXEL, rtol=0)


def test_progress_counts_the_steps_taken(pipe: Pipeline, image: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    pipe.img2img(
        image[0], ["a"] * 3, batch=2, strength=0.5, steps=4, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(("options", "message"), [
    ({"strength": 1.5}, "strength must be between 0 .* and 1 .*, got 1.5"),
    ({"strength": math.nan}, "got nan"),
    ({"images": torch.zeros(3, 32, 33)}, "size 33x32: sides must be multiples of 8; the nearest is 32x32"),
    ({"images": torch.zeros(3, 3, 32, 32)}, "3 images for 2 prompts; expected one, or one a prompt"),
    ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
    ({"images": torch.full((3, 32, 32), math.nan)}, "encoding the picture gave values that are not finite"),
    ({"prompts": []}, "at least one picture"),
])  # fmt: skip
def test_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe.img2img(**{"images": torch.zeros(3, 32, 32), "prompts": ["a", "b"], "steps": 4, **options})
    assert "\n" not in str(caught.value)


# --- variations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_variations_lie_between_two_seeds(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    how: dict[str, Any] = {"steps": 3, "sampler": sampler}

    def both(**more: Any) -> Tensor:
        of_text = pipe.txt2img("a", size=(40, 32), **how, **more)
        return torch.cat([of_text, pipe.img2img(image[0], "a", **how, **more)])

    one, other = both(seed=1), both(seed=2)
    assert torch.equal(both(seed=1, variation=(2, 0)), one)
    assert torch.equal(both(seed=1, variation=(2, 1)), other)
    far = [float((both(seed=1, variation=(2, share)) - one).square().mean()) for share in (0.1, 0.4, 0.8)]
    assert far == sorted(far)
    assert far[0] > 0
    with pytest.raises(ValueError, match="variation strength must be between 0 and 1, got 2"):
        both(variation=(2, 2))


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, image: Tensor) -> Path:
    to_pil(image)[0].save(tmp_path / "in é.png")
    return tmp_path / "in é.png"


def run(model: Path, out: Path, *arguments: object) -> int:
    common = ["--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "4"]
    return main([*map(str, arguments), *common])


def test_command(
    model: Path, pipe: Pipeline, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(model, out, "img2img", file, "a red apple", "--strength", 0.5, "-n", 2, "--seed", 3) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.splitlines() == [str(out / name) for name in ("00000.png", "00001.png", "grid-0000.png")]
    p = read_parameters(out / "00001.png")
    assert (p["command"], p["prompt"], p["image"], p["strength"], p["init"], p["size"]) == (
        "img2img", "a red apple", 1, 0.5, str(file), [40, 32]
    )  # fmt: skip
    picture = to_tensor(Image.open(file))
    expected = to_pil(pipe.img2img(picture, ["a red apple"] * 2, strength=0.5, steps=4, seed=3))[1]
    assert np.array_equal(np.array(Image.open(out / "00001.png")), np.array(expected))


def test_strength_0_by_command(model: Path, file: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", "img2img", file, "a", "--strength", 0) == 0
    assert Image.open(tmp_path / "out" / "00000.png").size == (40, 32)


def test_pictures_are_made_to_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = Image.new("RGBA", (34, 45), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "odd.png", exif=exif)
    for name, size, options in (("a", (48, 32), []), ("b", (16, 24), ["--size", "16x24"])):
        out = tmp_path / name
        assert run(model, out, "img2img", tmp_path / "odd.png", "a", "--strength", 0, *options) == 0
        told = capsys.readouterr().err
        assert told.endswith(f"odd.png: scaled and cut from 45x34 to {size[0]}x{size[1]}\n")
        assert Image.open(out / "00000.png").size == size


def test_variation_by_command(model: Path, file: Path, tmp_path: Path) -> None:
    def made(name: str, *arguments: object) -> np.ndarray:
        assert run(model, tmp_path / name, "txt2img", "a", *arguments) == 0
        return np.array(Image.open(tmp_path / name / "00000.png"))

    two = made("2", "--seed", 2)
    assert np.array_equal(two, made("1 to 2", "--variation-seed", 2, "--variation-strength", 1))
    assert not np.array_equal(two, made("half", "--variation-seed", 2, "--variation-strength", 0.5))
    p = read_parameters(tmp_path / "half" / "00000.png")
    assert (p["variation_seed"], p["variation_strength"]) == (2, 0.5)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--strength", "1.01"], "strength must be between 0 (the picture as it is) and 1 (all anew), got 1.01"),
    (["--strength", "nan"], "got nan"),
    (["--size", "30x32"], "the nearest is 32x32"),
    (["--variation-seed", "3"], "--variation-seed and --variation-strength need each other"),
    (["--variation-seed", "3", "--variation-strength", "nan"], "--variation-strength must be between 0 and 1"),
    (["--first", "-1"], "--first must be at least 0, got -1"),
    (["--strength", "1e-5", "--exact-steps"], "4 exact steps at strength 1e-05 are the end of 400000 steps"),
    (["--sampler", "dimm"], "unknown sampler 'dimm'"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path, file: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(model, tmp_path / "out", "img2img", file, "a", *arguments) == 2
    told = capsys.readouterr()
    error = told.err.splitlines()[-1]
    assert (told.out, len([line for line in told.err.splitlines() if "warning" not in line])) == ("", 1)
    assert error.startswith("ldm-sample: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("text.png", "not an image"), ("absent.png", "no such file")):
        assert run(model, tmp_path / "out", "img2img", tmp_path / name, "a") == 2
        assert capsys.readouterr().err == f"ldm-sample: error: {tmp_path / name}: {message}\n"
    assert not (tmp_path / "out").exists()
