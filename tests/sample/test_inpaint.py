"""Painting a part anew: what is kept stays, what is white changes; the model for it equals diffusers'."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula import filled
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.editing import keep_known, resampled
from ldm.diffusion.samplers import SAMPLERS, euler_ancestral
from ldm.diffusion.schedule import DiffusionConfig
from ldm.diffusion.step import Step, levels
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import TextEncoder
from ldm.models.unet import UNet
from ldm.seeding import generator
from ldm.weights.compvis import AUTOENCODER_PREFIX, TRANSFORMERS_PREFIX, UNET_PREFIX
from ldm.weights.io import load_strict
from ldm.weights.kinds import find_kind
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import convert
from sample.__main__ import main
from sample.images import read_mask, read_parameters, to_pil, to_tensor
from sample.pipeline import Pipeline

PIXEL = 2 / 255
FEW = ("ddim", "plms", "euler_ancestral", "heun", "dpmpp_2m_sde")


@pytest.fixture
def image() -> Tensor:
    """A picture of 40 x 32 pixels, every value of 8 bits."""
    coarse = torch.randint(0, 256, (1, 3, 4, 5), generator=generator("inpaint test")) / 127.5 - 1
    return torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="nearest")[0]


def mask_of(kind: str) -> Tensor:
    """(1, 32, 40): all black, all white, or white on the right from column 20 on."""
    mask = torch.full((1, 32, 40), kind == "white")
    if kind == "right":
        mask[:, :, 20:] = True
    return mask


def round_trip(pipe: Pipeline, image: Tensor, seed: int = 0) -> Tensor:
    return pipe.img2img(image, "a", strength=0, seed=seed, steps=3)


# --- a plain model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", FEW)
def test_a_black_mask_is_the_autoencoder(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    how: dict[str, Any] = {"steps": 3, "sampler": sampler, "seed": 5}
    made = pipe.inpaint(image, mask_of("black"), "a", paste=False, **how)
    assert_close(made, round_trip(pipe, image, 5), atol=1e-5, rtol=0)
    assert torch.equal(pipe.inpaint(image, mask_of("black"), "a", **how)[0], image)


@pytest.mark.parametrize("sampler", FEW)
def test_a_white_mask_is_txt2img(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    how: dict[str, Any] = {"steps": 3, "sampler": sampler, "seed": 5}
    for paste in (True, False):
        made = pipe.inpaint(image, mask_of("white"), ["a", "b"], paste=paste, **how)
        assert torch.equal(made, pipe.txt2img(["a", "b"], size=(40, 32), **how))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_stays(pipe: Pipeline, image: Tensor, sampler: str) -> None:
    start = pipe.start(image[None], [0], mask=mask_of("right"))
    *_, last = pipe.stream(["a"], steps=4, sampler=sampler, start=start)
    assert torch.equal(last.sample[..., :5], start.latents[..., :5])
    assert (last.sample - start.latents)[..., 5:].abs().min() > 0
    assert torch.equal(last.denoised[..., :5], start.latents[..., :5])
    made = pipe.inpaint(image, mask_of("right"), "a", steps=4, sampler=sampler)[0]
    assert torch.equal(made[..., :20], image[..., :20])
    assert (made - image)[..., 20:].abs().mean() > PIXEL


def test_what_is_painted_sees_what_is_kept(pipe: Pipeline, image: Tensor) -> None:
    one, other = (pipe.inpaint(picture, mask_of("right"), "a", steps=4) for picture in (image, -image))
    assert (one - other)[..., 20:].abs().max() > PIXEL


def test_the_network_sees_the_known_latents_at_each_level() -> None:
    """x = known + sigma eps outside the mask whatever the sampler has there, and the answer is known."""
    mask = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    known, eps = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1, 2), 0.5)
    seen: list[list[float]] = []

    def denoise(x: Tensor, sigma: Any) -> Tensor:
        seen.append(x.flatten().tolist())
        return x * 0

    kept = keep_known(denoise, known, eps, mask)
    for sigma in (4.0, torch.tensor(4.0), torch.tensor([4.0])):
        assert kept(torch.full((1, 1, 1, 2), 7.0), sigma).flatten().tolist() == [0, 3]
    assert seen == [[7, 5]] * 3


def test_one_white_pixel_frees_its_latent_cell(pipe: Pipeline, image: Tensor) -> None:
    mask = mask_of("black")
    mask[0, 9, 14] = True
    start = pipe.start(image[None], [0, 1], mask=mask)
    assert start.mask is not None
    assert start.mask.shape == (2, 1, 8, 10)
    assert start.mask[0, 0].nonzero().tolist() == [[2, 3]]


def test_strength_and_batches(pipe: Pipeline, image: Tensor) -> None:
    how: dict[str, Any] = {"steps": 4, "sampler": "ddpm", "strength": 0.5, "seed": 1}
    made = [pipe.inpaint(image, mask_of("right"), ["a", "b", "a"], batch=n, **how) for n in (1, 3)]
    assert_close(made[0], made[1], atol=0.01 * PIXEL, rtol=0)
    nothing = pipe.inpaint(image, mask_of("right"), "a", **{**how, "strength": 0}, paste=False)
    assert torch.equal(nothing, round_trip(pipe, image, 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"mask": torch.ones(1, 32, 32, dtype=torch.bool)}, "the mask is 32x32, the picture 40x32"),
    ({"resample": 0}, "resample must be at least 1"),
    ({"strength": math.nan}, "strength must be between 0"),
])  # fmt: skip
def test_refused(pipe: Pipeline, image: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(**{"images": image, "mask": mask_of("right"), "prompts": "a", "steps": 2, **options})


# --- RePaint ------------------------------------------------------------------------------------------------


def test_resampling_evaluates_each_step_but_the_last_n_times(pipe: Pipeline, image: Tensor) -> None:
    seen: list[float] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0])))
    try:
        made = pipe.inpaint(image, mask_of("right"), "a", steps=3, resample=2)
    finally:
        handle.remove()
    assert seen == [667, 667, 334, 334, 1]
    assert (made - pipe.inpaint(image, mask_of("right"), "a", steps=3)).abs().max() > PIXEL


def test_resampling_once_is_the_sampler() -> None:
    def denoise(x: Tensor, sigma: Any) -> Tensor:
        return x / (1 + sigma**2)

    def noise(index: int, part: int = 0) -> Tensor:
        return torch.randn(3, 2, generator=generator("once", index, part), dtype=torch.float64)

    x, sigmas = 9 * noise(99), torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    plain = list(euler_ancestral(denoise, x, sigmas, noise=noise))
    once = list(resampled(euler_ancestral, denoise, x, sigmas, times=1, noise=noise))
    assert [step.index for step in once] == [0, 1, 2]
    for one, other in zip(plain, once, strict=True):
        assert torch.equal(one.x, other.x)


def test_resampling_stays_on_the_noise_law() -> None:
    """Data N(0, 1) and a sampler that is exact for it: the variance at each level is 1 + sigma^2, however
    often each step is taken, and every draw is another."""
    count, seen = 100_000, []

    def noise(index: int, part: int = 0) -> Tensor:
        seen.append((index, part))
        return torch.randn(count, generator=generator("law", index, part), dtype=torch.float64)

    def exact(denoise: Any, x: Tensor, sigmas: Tensor, *, noise: Any) -> Iterator[Step]:
        for i, (sigma, sigma_next) in levels(sigmas):
            before, after = 1 + sigma**2, 1 + sigma_next**2
            x = after / before * x + (after - after**2 / before) ** 0.5 * noise(i, 1)
            yield Step(i, sigma_next, x, denoise(x, sigma))

    sigmas = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    x = (1 + float(sigmas[0]) ** 2) ** 0.5 * noise(999)
    for step in resampled(exact, lambda x, sigma: x, x, sigmas, times=3, noise=noise):
        assert float(step.x.var()) == pytest.approx(1 + step.sigma**2, rel=0.015)
    assert len(seen) == 1 + 3 * 3 + 1 + 3 * 2
    assert len(set(seen)) == len(seen)


# --- a model for inpainting ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1 for inpainting as diffusers' folder. Its posterior is a point."""
    config = find_kind("tiny_sd15").config
    assert config.unet is not None and config.autoencoder is not None and config.text is not None
    parts: dict[str, Any] = {
        UNET_PREFIX: UNet(replace(config.unet, in_channels=9)),
        AUTOENCODER_PREFIX: AutoencoderKL(config.autoencoder),
        TRANSFORMERS_PREFIX: TextEncoder(replace(config.text, layers=2)),
    }
    for prefix, part in parts.items():
        load_strict(part, filled(part.config, prefix), "the formula")
    quant_conv = parts[AUTOENCODER_PREFIX].quant_conv
    quant_conv.weight.data[4:], quant_conv.bias.data[4:] = 0, -60
    folder = tmp_path_factory.mktemp("nine")
    Pipeline(*parts.values(), DiffusionConfig(), device="cpu").save(folder / "ours", torch.float32)
    return convert(open_checkpoint(folder / "ours"), folder / "diffusers", "diffusers")


@pytest.fixture(scope="module")
def painter(nine: Path) -> Pipeline:
    return Pipeline.load(nine, device="cpu")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_as_diffusers(
    nine: Path, painter: Pipeline, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as module

    parts = library.StableDiffusionPipeline.from_pretrained(nine, local_files_only=True).components
    theirs = library.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    picture = torch.rand((3, 64, 64), generator=generator("picture")) * 2 - 1
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 20:51, 13:40] = True  # off the grid of latent cells
    noise = painter.noise((4, 8, 8), (3, "image", 0))
    monkeypatch.setattr(module, "randn_tensor", lambda *shape, **how: noise)
    expected = theirs(
        "a red apple", (picture[None] + 1) / 2, mask[None].float(), negative_prompt="blurry", num_inference_steps=4,
        guidance_scale=5.0, strength=strength, height=64, width=64, output_type="pt",
    ).images  # fmt: skip
    how: dict[str, Any] = {"negative": "blurry", "guidance": 5.0, "steps": 4, "seed": 3}
    made = painter.inpaint(picture, mask, "a red apple", strength=strength, paste=False, **how)
    assert_close((made + 1) / 2, expected, atol=1e-4, rtol=0)
    pasted = painter.inpaint(picture, mask, "a red apple", strength=strength, **how)[0]
    assert torch.equal(pasted, torch.where(mask, made[0], picture))
    plain = painter.txt2img("a red apple", size=(64, 64), **how)
    assert (plain - made).abs().max() > 10 * PIXEL  # the channels count


def test_txt2img_paints_everything(painter: Pipeline) -> None:
    picture = torch.rand((3, 64, 64), generator=generator("picture")) * 2 - 1
    how: dict[str, Any] = {"steps": 2, "seed": 3}
    made = painter.txt2img(["a", "b"], size=(64, 64), **how)
    everywhere = torch.ones(1, 64, 64, dtype=torch.bool)
    assert torch.equal(made, painter.inpaint(picture, everywhere, ["a", "b"], **how))
    assert torch.equal(made, painter.img2img(picture, ["a", "b"], strength=1, **how))


def test_other_channels_are_refused(build: Callable[..., Pipeline]) -> None:
    parts = build()
    config = replace(parts.unet.config, in_channels=5)
    depth = Pipeline(UNet(config), parts.autoencoder, parts.text_encoder, DiffusionConfig(), device="cpu")
    with pytest.raises(ValueError, match="reads a depth picture besides the latents.*img2img --depth"):
        depth.txt2img("a", steps=2)


# --- masks and the command ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, image: Tensor) -> tuple[Path, Path]:
    to_pil(image[None])[0].save(tmp_path / "in é.png")
    Image.fromarray(mask_of("right")[0].numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path / "in é.png", tmp_path / "mask.png"


def inpaint(model: Path, out: Path, *arguments: object) -> int:
    common = ["--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "3"]
    return main(["inpaint", *map(str, arguments), *common])


def test_reading_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = Image.new("L", (4, 2), 127)
    grey.putpixel((1, 0), 128)
    grey.save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.array(read_mask(tmp_path / "grey.png", (4, 2))).tolist() == [[0, 255, 0, 0], [0] * 4]
    assert np.array(read_mask(tmp_path / "clear.png", (4, 2))).min() == 255
    assert capsys.readouterr().err == ""
    assert read_mask(tmp_path / "clear.png", (8, 4)).size == (8, 4)
    assert capsys.readouterr().err == (
        f"ldm-sample: warning: {tmp_path / 'clear.png'}: mask resized from 4x2 to the picture's 8x4\n"
    )


def test_command(
    model: Path, pipe: Pipeline, files: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, picture = tmp_path / "out", to_tensor(Image.open(files[0]))
    assert inpaint(model, out, *files, "a red apple", "--seed", 3, "--resample", 2) == 0
    assert inpaint(model, out, *files, "a red apple", "--seed", 3, "--no-paste") == 0
    assert capsys.readouterr().err == ""
    for i, (resample, paste) in enumerate([(2, True), (1, False)]):
        made = pipe.inpaint(
            picture, mask_of("right"), "a red apple", steps=3, seed=3, resample=resample, paste=paste
        )
        file = out / f"0000{i}.png"
        assert np.array_equal(np.array(Image.open(file)), np.array(to_pil(made)[0]))
        p = read_parameters(file)
        assert (p["command"], p["strength"]) == ("inpaint", 1.0)
        assert (p.get("resample", 1), p.get("paste", True)) == (resample, paste)
        assert (p["init"], p["mask"]) == (str(files[0]), str(files[1]))


def test_picture_and_mask_are_cut_alike(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask in half the size, white where the picture is red; what is not white stays after the cut."""
    picture = Image.new("RGB", (66, 34), (0, 0, 255))
    picture.paste((255, 0, 0), (30, 10, 50, 30))
    small = Image.new("L", (33, 17))
    small.paste(255, (15, 5, 25, 15))
    picture.save(tmp_path / "in.png")
    small.save(tmp_path / "mask.png")
    out = tmp_path / "out"
    assert inpaint(model, out, tmp_path / "in.png", tmp_path / "mask.png", "a") == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("mask.png: mask resized from 33x17 to the picture's 66x34")
    assert told[1].endswith("in.png: scaled and cut from 66x34 to 64x32")
    made = np.array(Image.open(out / "00000.png")).astype(int)
    assert made.shape == (32, 64, 3)
    assert (np.abs(made[:7] - [0, 0, 255]) < 30).all()
    assert (np.abs(made[:, 52:] - [0, 0, 255]) < 30).all()
    assert np.abs(made[12:26, 32:46] - [255, 0, 0]).mean() > 5


@pytest.mark.parametrize(("arguments", "message"), [
    (["--strength", "-0.1"], "strength must be between 0"),
    (["--resample", "0"], "--resample must be at least 1 (each step once), got 0"),
    (["--size", "30x32"], "the nearest is 32x32"),
    (["--steps", "0"], "steps must be between 1 and 1000, got 0"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path, files: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["inpaint", *map(str, files), "a", "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--steps", "3", *arguments]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert message in told.err
    assert not (tmp_path / "out").exists()


def test_a_mask_that_cannot_be_read(
    model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files[1].write_text("no mask")
    assert inpaint(model, tmp_path / "out", *files, "a") == 2
    assert capsys.readouterr().err == f"ldm-sample: error: {files[1]}: not an image\n"
    assert not (tmp_path / "out").exists()
