"""Commands for models that read channels beside their latents, with tiny random models of each kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated
from ldm.diffusion.process import add_noise, to_sigma_scale
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from sample import txt2img
from sample.__main__ import main
from sample.depth import read_depth
from sample.images import read_parameters, to_pil, to_tensor
from sample.pipeline import Pipeline
from sample.start import reads
from sample.stream import stream as plain_stream

SMALL: dict[str, Any] = {
    "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,),
    "num_heads": 2, "norm_groups": 4, "sample_size": 8,
}  # fmt: skip
F4: dict[str, Any] = {
    "base_channels": 8, "channel_mult": (1, 1, 2), "num_res_blocks": 1, "norm_groups": 4,
}  # fmt: skip
KL = AutoencoderConfig(**F4, scale_factor=0.9, shift_factor=0.1)
VQ = AutoencoderConfig(**F4, z_channels=3, embed_dim=3, codebook_size=64, scale_factor=1.0)
KL3 = AutoencoderConfig(**F4, z_channels=3, scale_factor=1.0)


def made_of(unet: UNetConfig, first_stage: AutoencoderConfig) -> Pipeline:
    torch.manual_seed(0)
    tower = None
    if unet.context_dim is not None:
        tower = TextEncoder(TextConfig(width=16, layers=1, heads=2, mlp_width=32))
    modules = (UNet(unet), make_autoencoder(first_stage), tower)
    for module in modules:
        if module is not None:
            module.requires_grad_(False).eval()
            for parameter in module.parameters():
                if not parameter.any():  # zero-initialised
                    nn.init.normal_(parameter, std=0.1)
    return Pipeline(*modules, DiffusionConfig(), device="cpu")


def model_of(kind: str) -> Pipeline:
    """A tiny model that reads what `kind` says."""
    plain = UNetConfig(**SMALL, context_dim=None, attention="adm", out_channels=3)
    text = UNetConfig(**SMALL, context_dim=16)
    told = UNetConfig(**SMALL, context_dim=16, num_classes=400, cross_only=(2,))
    configs = {
        "instruct": (text, 8, KL), "depth": (text, 5, KL), "inpainting": (text, 9, KL),
        "superresolution": (plain, 6, VQ), "superresolution KL": (plain, 6, KL3),
        "ldm_inpainting": (plain, 7, VQ), "upscaler": (told, 7, KL),
    }  # fmt: skip
    unet, channels, first_stage = configs[kind]
    config = UNetConfig(**{**vars(unet), "in_channels": channels})
    pipe = made_of(config, first_stage)
    assert reads(pipe) == kind.split()[0]
    return pipe


class Session:
    """Runs commands with one model, and remembers the steps and the start of the last."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
        self.pipe = pipe
        self.steps: list[Any] = []
        self.start: Any = None

        def stream(parts: Any, prompts: Any, *, first: int = 0, start: Any = None, **how: Any) -> Any:
            self.start, self.steps = start, []
            for step in plain_stream(parts, prompts, first=first, start=start, **how):
                self.steps.append(step)
                yield step

        monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)
        monkeypatch.setattr(Pipeline, "stream", stream)

    def __call__(self, out: Path, *arguments: object) -> np.ndarray:
        common = ["--out", str(out), "--device", "cpu", "--steps", "2", "--seed", "3"]
        assert main([*map(str, arguments), *common]) == 0
        return np.array(Image.open(out / "00000.png")).astype(int)

    def refuses(self, capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
        """The one line that is told; nothing is written."""
        capsys.readouterr()
        common = ["--out", str(out), "--device", "cpu", "--steps", "2"]
        assert main([*map(str, arguments), *common]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert not out.exists()
        return told.err


@pytest.fixture
def session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Session:
    return Session(model_of(request.param), monkeypatch)


def of_kind(*kinds: str) -> Any:
    return pytest.mark.parametrize("session", kinds, indirect=True)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures of 40 x 32 pixels, and a mask that is white on the right."""
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"in é {i}.png")
    Image.fromarray((np.arange(40) >= 24).repeat(32).reshape(40, 32).T).save(tmp_path / "mask.png")
    return [tmp_path / "in é 0.png", tmp_path / "in é 1.png", tmp_path / "mask.png"]


def image_of(path: Path) -> Tensor:
    return to_tensor(Image.open(path))[None]


def again(picture: Path, out: Path) -> None:
    assert main(["again", str(picture), "--out", str(out)]) == 0
    assert np.array_equal(np.array(Image.open(out / "00000.png")), np.array(Image.open(picture)))
    assert read_parameters(out / "00000.png") == read_parameters(picture)


# --- instruct -----------------------------------------------------------------------------------------------


@of_kind("instruct")
@pytest.mark.parametrize(("text_scale", "image_scale", "negative"), [
    (7.5, 1.5, ""), (1, 1.5, ""), (3, 1, "a fish"), (0, 2, ""), (1, 1, "")
])  # fmt: skip
def test_instruct_by_hand(
    session: Session, files: list[Path], tmp_path: Path, text_scale: float, image_scale: float, negative: str
) -> None:
    """D(0) + s_I (D(i) - D(0)) + s_T (D(i, t) - D(i)), of the mode of the posterior, unscaled."""
    scales = ["--guidance", text_scale, "--image-guidance", image_scale, "--negative", negative]
    session(tmp_path / "out", "instruct", files[0], "make it red", *scales)
    pipe = session.pipe
    with torch.no_grad():
        latents = pipe.autoencoder.encode(image_of(files[0])).mode()
        assert_close(session.start.channels, latents, rtol=0, atol=1e-5)
        sigma = float(pipe.schedule.sigmas[501])
        x = to_sigma_scale(pipe.draw("image", (4, 8, 10), 3, [0]), sigma)
        denoise = Denoiser(concatenated(pipe.unet), pipe.schedule)

        def predicted(text: str, channels: Tensor) -> Tensor:
            return denoise(x, sigma, context=pipe.encode_prompts([text]), channels=channels)

        nothing = predicted(negative, torch.zeros_like(latents))
        image, both = predicted(negative, latents), predicted("make it red", latents)
    wanted = nothing + image_scale * (image - nothing) + text_scale * (both - image)
    assert_close(session.steps[0].denoised, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))


@of_kind("instruct")
def test_instruct(session: Session, files: list[Path], tmp_path: Path) -> None:
    made = session(tmp_path / "a", "instruct", files[0], "make it red", "-n", 2)
    assert made.shape == (32, 40, 3)
    p = read_parameters(tmp_path / "a" / "00001.png")
    assert (p["command"], p["init"], p["size"]) == ("instruct", str(files[0]), [40, 32])
    assert not np.array_equal(made, session(tmp_path / "b", "instruct", files[1], "make it red"))
    other = session(tmp_path / "c", "instruct", files[0], "make it red", "--image-guidance", 3)
    assert not np.array_equal(made, other)
    assert read_parameters(tmp_path / "c" / "00000.png")["image_guidance"] == 3
    again(tmp_path / "c" / "00000.png", tmp_path / "again")


@of_kind("instruct")
def test_instruct_refuses(
    session: Session, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, pipe: Pipeline,
) -> None:  # fmt: skip
    def told(*arguments: object) -> str:
        return session.refuses(capsys, tmp_path / "out", *arguments)

    edit = ("instruct", files[0], "a")
    assert "--image-guidance must be a finite number, got nan" in told(*edit, "--image-guidance", "nan")
    assert "goes with no other kind of guidance" in told(*edit, "--guidance-rescale", "0.5")
    assert "goes with no other kind of guidance" in told(*edit, "--pag", "2")
    assert "takes one prompt, without AND" in told("instruct", files[0], "a AND b")
    assert "--hires needs a model that reads a prompt alone" in told(*edit, "--hires", "64x64")
    assert "nowhere.png: no such file" in told("instruct", tmp_path / "nowhere.png", "a")
    assert "the nearest is 32x32" in told(*edit, "--size", "30x32")
    assert "use ldm-sample instruct" in told("txt2img", "a")
    assert "use ldm-sample instruct" in told("img2img", files[0], "a")
    small = "this model does not read a small picture besides its latents: it reads the picture to edit"
    assert small in told("upscale", files[0])
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)
    nothing = "this model does not read the picture to edit besides its latents: it reads nothing"
    assert nothing in told(*edit)


# --- upscale ------------------------------------------------------------------------------------------------


@of_kind("superresolution", "superresolution KL")
def test_upscale(
    session: Session, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four times the picture, whose sides are cut to even numbers; its own pixels are what is read."""
    Image.open(files[0]).crop((0, 0, 13, 10)).save(tmp_path / "small.png")
    made = session(tmp_path / "a", "upscale", tmp_path / "small.png", "-n", 2)
    assert made.shape == (40, 48, 3)
    assert capsys.readouterr().err.endswith("small.png: cut from 13x10 to 12x10\n")
    expected = image_of(tmp_path / "small.png")[:, :, :, :12].expand(2, -1, -1, -1)
    assert torch.equal(session.start.channels, expected)
    pipe = session.pipe
    with torch.no_grad():
        sigma = float(pipe.schedule.sigmas[501])
        x = to_sigma_scale(pipe.draw("image", (3, 10, 12), 3, [0, 1]), sigma)
        denoised = Denoiser(concatenated(pipe.unet), pipe.schedule)(x, sigma, channels=expected)
    assert_close(session.steps[0].denoised, denoised, rtol=1e-5, atol=1e-4 * float(denoised.abs().max()))
    Image.open(files[1]).crop((0, 0, 12, 10)).save(tmp_path / "other.png")
    assert not np.array_equal(made, session(tmp_path / "b", "upscale", tmp_path / "other.png"))
    assert read_parameters(tmp_path / "b" / "00000.png")["size"] == [48, 40]
    again(tmp_path / "b" / "00000.png", tmp_path / "again")


@of_kind("upscaler")
def test_upscale_by_a_model_that_is_told_the_noise(
    session: Session, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads prompt, picture through noise of its own for each number, and the level of that."""
    asked = ["upscale", files[0], "a fox", "-n", 2, "--guidance", 3]
    made = session(tmp_path / "a", *asked, "--noise-level", 100)
    assert made.shape == (128, 160, 3)
    pipe = session.pipe
    shape = (3, 32, 40)
    read = add_noise(
        image_of(files[0]).expand(2, -1, -1, -1),
        pipe.draw("low", shape, 3, [0, 1]),
        pipe.schedule.alpha_bar[100],
    )
    assert torch.equal(session.start.channels, read)
    with torch.no_grad():
        sigma = float(pipe.schedule.sigmas[501])
        x = to_sigma_scale(pipe.draw("image", (4, *shape[1:]), 3, [0, 1]), sigma)
        denoise = Denoiser(concatenated(pipe.unet), pipe.schedule)
        told = {"channels": read, "y": torch.tensor([100, 100])}
        uncond, cond = (
            denoise(x, sigma, context=pipe.encode_prompts([t] * 2), **told) for t in ("", "a fox")
        )
    wanted = uncond + 3 * (cond - uncond)
    assert_close(session.steps[0].denoised, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))
    assert read_parameters(tmp_path / "a" / "00000.png")["noise_level"] == 100
    again(tmp_path / "a" / "00000.png", tmp_path / "again")
    assert not np.array_equal(made, session(tmp_path / "b", *asked))
    fast = session(
        tmp_path / "c", *asked, "--noise-level", 100, "--fast-conv", 1, "--pag", 1, "--token-merging", 0.5
    )
    assert fast.shape == made.shape
    for level in (-1, 351):
        told_off = session.refuses(capsys, tmp_path / "out", *asked, "--noise-level", level)
        assert f"--noise-level must be between 0 and 350, got {level}" in told_off


@of_kind("superresolution")
def test_upscale_refuses(
    session: Session, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, pipe: Pipeline,
) -> None:  # fmt: skip
    def told(*arguments: object) -> str:
        return session.refuses(capsys, tmp_path / "out", *arguments)

    Image.new("RGB", (40, 1)).save(tmp_path / "thin.png")
    assert "thin.png is 40x1; sides of 2 or more are needed" in told("upscale", tmp_path / "thin.png")
    asked = told("upscale", files[0], "--size", "64x64")
    assert "--size is not for choice here: this picture becomes 160x128" in asked
    assert "reads no text" in told("upscale", files[0], "a prompt")
    assert "it reads a small picture" in told("instruct", files[0], "")
    assert "use ldm-sample upscale" in told("txt2img", "")
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)
    assert "does not read a small picture" in told("upscale", files[0])


# --- depth --------------------------------------------------------------------------------------------------


@pytest.fixture
def depths(tmp_path: Path) -> list[Path]:
    """Ramps from left to right and downwards."""
    across = np.tile(np.linspace(20, 200, 40), (32, 1)).astype(np.uint8)
    down = np.tile(np.linspace(20, 200, 32)[:, None], (1, 40)).astype(np.uint8)
    Image.fromarray(across).save(tmp_path / "across.png")
    Image.fromarray(down).save(tmp_path / "down.png")
    return [tmp_path / "across.png", tmp_path / "down.png"]


@of_kind("depth")
@pytest.mark.parametrize("command", ["txt2img", "img2img"])
def test_depth(session: Session, files: list[Path], depths: list[Path], tmp_path: Path, command: str) -> None:
    """Scaled to the latents, least at -1 and most at 1; read at each step, with strength or without."""
    arguments: list[object] = [command, "an apple", "--size", "40x32"]
    if command == "img2img":
        arguments = [command, files[0], "an apple", "--strength", 0.5]
    made = [session(tmp_path / path.stem, *arguments, "--depth", path) for path in depths]
    assert not np.array_equal(made[0], made[1])
    channels = session.start.channels
    assert channels.shape == (1, 1, 8, 10)
    assert_close(channels[0, 0, :, 4], torch.linspace(-1, 1, 8), rtol=0, atol=0.02)
    assert float(channels.min()) == -1 and float(channels.max()) == pytest.approx(1, abs=1e-4)
    if command == "img2img":
        assert session.start.strength == 0.5 and len(session.steps) == 1
    pipe = session.pipe
    sampled = list(plain_stream(pipe, ["an apple"], start=session.start, size=(40, 32), steps=2, seed=3))
    assert torch.equal(sampled[-1].sample, session.steps[-1].sample)
    p = read_parameters(tmp_path / "down" / "00000.png")
    assert p["depth"] == str(depths[1])
    again(tmp_path / "down" / "00000.png", tmp_path / "again")
    assert read_depth(depths[1], (40, 32)).shape == (1, 32, 40)


@of_kind("depth")
def test_depth_refuses(
    session: Session, files: list[Path], depths: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pipe: Pipeline,
) -> None:  # fmt: skip
    def told(*arguments: object) -> str:
        return session.refuses(capsys, tmp_path / "out", *arguments)

    for without in (["txt2img", "a"], ["img2img", files[0], "a"]):
        assert "this UNet reads a depth picture besides the latents" in (line := told(*without))
        assert "--depth" in line
    assert "nowhere.png: no such file" in told("txt2img", "a", "--depth", "nowhere.png")
    assert "it has colours" in told("img2img", files[0], "a", "--depth", files[1])
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)
    assert "this model does not read a depth picture besides its latents: it reads nothing" in told(
        "txt2img", "a", "--depth", depths[0]
    )
    assert "this model does not read a depth picture" in told("img2img", files[0], "a", "--depth", depths[0])


# --- inpainting ---------------------------------------------------------------------------------------------


@of_kind("ldm_inpainting", "inpainting")
def test_inpaint(session: Session, files: list[Path], tmp_path: Path) -> None:
    """[masked latents, mask in -1..1] with black under the mask, or Stable Diffusion's [mask, ...] with grey."""
    picture, _, mask = files
    old = reads(session.pipe) == "ldm_inpainting"
    prompt = "" if old else "an apple"
    made = session(tmp_path / "a", "inpaint", picture, mask, prompt)
    given = np.array(Image.open(picture)).astype(int)
    assert np.array_equal(made[:, :24], given[:, :24])
    assert np.abs(made[:, 24:] - given[:, 24:]).mean() > 10
    image = image_of(picture)
    image[..., 24:] = -1 if old else 0
    latents = session.pipe.encode(image, 3, [0], "masked")
    cells = torch.zeros(1, 1, 8, 10)
    cells[..., 6:] = 1
    expected = torch.cat([latents, 2 * cells - 1] if old else [cells, latents], dim=1)
    assert_close(session.start.channels, expected, rtol=0, atol=1e-5)
    assert session.start.mask is None  # it reads the mask: nothing is kept by force
    # What is under the mask is not seen, what is beside it is
    for columns, same in ((slice(24, 40), True), (slice(0, 24), False)):
        changed = given.copy()
        changed[:, columns] = 255 - changed[:, columns]
        Image.fromarray(changed.astype(np.uint8)).save(tmp_path / "changed.png")
        out = tmp_path / str(same)
        other = session(out, "inpaint", tmp_path / "changed.png", mask, prompt)
        assert np.array_equal(other[:, 24:], made[:, 24:]) is same
    again(tmp_path / "a" / "00000.png", tmp_path / "again")


@of_kind("ldm_inpainting")
def test_outpaint_by_a_model_without_text(session: Session, files: list[Path], tmp_path: Path) -> None:
    made = session(tmp_path / "a", "outpaint", files[0], "", "--left", 8, "--overlap", 0)
    assert np.array_equal(made[:, 8:], np.array(Image.open(files[0])))
    assert session.start.channels.shape == (1, 4, 8, 12)
    picture = to_pil(session.pipe.decode(session.steps[-1].sample))[0]
    assert np.array_equal(made[:, :8], np.array(picture)[:, :8])
