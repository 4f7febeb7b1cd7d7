"""Previews: the linear fit against closed form and the shipped decoder, a tiny decoder, `txt2img --preview`."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.metrics import psnr
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, PointPosterior, make_autoencoder
from ldm.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ldm.weights.io import save_weights
from ldm.weights.tiny import to_original
from sample import looking
from sample.__main__ import main
from sample.pipeline import Pipeline
from sample.preview import due, linear_previewer, save_preview, tiny_previewer

TINY = AutoencoderConfig(base_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4)
FITS = TinyAutoencoderConfig(
    channels=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
)  # 4 channels, 1/4


def tiny_file(path: Path, config: TinyAutoencoderConfig, half: str = "decoder") -> TinyAutoencoder:
    """A random tiny autoencoder, of which `path` holds one half in the original's names."""
    network = TinyAutoencoder(config).eval().requires_grad_(False)
    tensors = to_original(network.state_dict(), config)
    save_weights(path, {n.removeprefix(f"{half}."): t for n, t in tensors.items() if n.startswith(half)})
    return network


# --- the linear map -----------------------------------------------------------------------------------------


class Affine(Autoencoder):
    """A first stage that is linear: latents are affine in the mean colour of a cell, and back."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.matrix = torch.tensor([[2.0, 1, 0], [0, 3, -1], [1, 0, 1], [0.5, 0, 0]])  # (4, 3), of rank 3

    def encode(self, images: Tensor) -> PointPosterior:
        return PointPosterior(torch.einsum("ij,bjhw->bihw", self.matrix, F.avg_pool2d(images, self.factor)))

    def scale_latents(self, z: Tensor) -> Tensor:
        return z + 5

    def decode_latents(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("ji,bihw->bjhw", torch.linalg.pinv(self.matrix), latents - 5)
        return F.interpolate(colours, scale_factor=float(self.factor))


def test_the_linear_map_of_a_linear_first_stage_is_exact() -> None:
    """At any scale and shift of the latents, and where a channel of theirs follows from the others."""
    stage = Affine()
    colours = torch.rand(2, 3, 5, 7) * 2 - 1
    latents = stage.encode_latents(F.interpolate(colours, scale_factor=4.0))
    assert_close(linear_previewer(stage)(latents), colours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("values", [{}, {"codebook_size": 32, "scale_factor": 1.0}], ids=["KL", "VQ"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_first_stage(values: dict, dtype: torch.dtype) -> None:
    stage = make_autoencoder(AutoencoderConfig(**{**vars(TINY), **values})).requires_grad_(False).to(dtype)
    latents = torch.randn(2, 4, 8, 6, dtype=dtype)
    images = linear_previewer(stage)(latents)
    assert (images.shape, images.dtype) == ((2, 3, 8, 6), torch.float32)
    assert images.abs().max() <= 1
    assert images.std() > 0.01
    torch.manual_seed(1)  # of which the fit is no function
    assert_close(linear_previewer(stage)(latents), images, rtol=0, atol=1e-3)


def test_it_leaves_the_random_state_alone() -> None:
    stage = make_autoencoder(TINY)
    before = torch.get_rng_state()
    linear_previewer(stage)
    assert torch.equal(torch.get_rng_state(), before)


def agreement(images: Tensor, truth: Tensor) -> tuple[float, float]:
    """PSNR in dB, over all pictures, and the correlation of all values."""
    both = torch.stack([images.flatten(), truth.flatten()])
    return float(psnr(images.reshape(1, 1, 1, -1), truth.reshape(1, 1, 1, -1))), float(
        torch.corrcoef(both)[0, 1]
    )


def test_the_shipped_model_shows_what_it_makes() -> None:
    """Of real estimates, at the first step and at the last, near the decoded picture's mean in each cell.

    Measured: 20.5 dB and 0.97; colours in a wrong order or mirrored sides give at most 11.5 dB. (Under strong
    guidance the first estimate leaves the range in which a decoder is nearly linear: 16 dB.)
    """
    emoji = Pipeline.load("emoji", device="cpu")
    prompts = ["a rainbow, noto emoji", "a crescent moon, fluent 3d emoji", "a banana, noto emoji"]
    preview = linear_previewer(emoji.autoencoder)
    for step in emoji.stream(prompts, steps=4, seed=3, guidance=1.0):
        if step.index not in (0, 3):
            continue
        truth = F.avg_pool2d(emoji.decode(step.denoised), emoji.autoencoder.factor)
        images = preview(step.denoised)
        level, correlation = agreement(images, truth)
        assert level > 18
        assert correlation > 0.93
        swapped = [images[:, [2, 1, 0]], preview(step.denoised[:, [1, 0, 2, 3]]), images.flip(-1), -images]
        for wrong in swapped:  # colours, channels of the latents, sides, the sign
            level, correlation = agreement(wrong, truth)
            assert level < 14
            assert correlation < 0.75


# --- a tiny decoder -----------------------------------------------------------------------------------------


def test_a_tiny_decoder(tmp_path: Path) -> None:
    network = tiny_file(tmp_path / "tiny.safetensors", FITS)
    z = 3 * torch.randn(2, 4, 6, 5)
    images = tiny_previewer(tmp_path / "tiny.safetensors", "cpu", make_autoencoder(TINY))(z.half())
    assert_close(images, network.decode(z.half().float()).clamp(-1, 1))
    assert images.shape == (2, 3, 24, 20)


def test_a_tiny_decoder_that_gives_no_colours(tmp_path: Path) -> None:
    tiny_file(tmp_path / "tiny", TinyAutoencoderConfig(in_channels=1, channels=8))
    with pytest.raises(ValueError, match="tiny gives pictures of 1 channels, not of 3"):
        tiny_previewer(tmp_path / "tiny")


# --- the file -----------------------------------------------------------------------------------------------


def test_when_it_is_shown() -> None:
    assert [i for i in range(12) if due(i, 12, 5)] == [0, 5, 10, 11]
    assert [i for i in range(4) if due(i, 4, 5)] == [0, 3]
    assert [i for i in range(3) if due(i, 3, 1)] == [0, 1, 2]


def test_the_file_is_a_grid_of_a_fixed_size(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0, 1]).reshape(3, 1, 1, 1).expand(3, 3, 4, 8)
    for repeat in (1, 100):  # enlarged and made smaller
        save_preview(images.repeat(1, 1, repeat, repeat), tmp_path / "preview.png")
        sheet = np.array(Image.open(tmp_path / "preview.png"))
        assert sheet.shape == (2 * 96 + 6, 2 * 192 + 6, 3)
        corners = [sheet[2, 2], sheet[2, 196], sheet[100, 2], sheet[100, 196]]
        assert [corner.tolist() for corner in corners] == [[0] * 3, [128] * 3, [255] * 3, [255] * 3]
    assert os.listdir(tmp_path) == ["preview.png"]


# --- the command --------------------------------------------------------------------------------------------


def txt2img(model: Path, out: Path, *arguments: str) -> int:
    options = ["--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "4"]
    return main(["txt2img", "a red apple", *options, *arguments])


@pytest.mark.parametrize("kind", ["linear", "file"])
def test_previews_change_no_picture(
    model: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor any byte of its file, with a sampler that draws noise at each step."""
    tiny_file(tmp_path / "tiny é.safetensors", FITS)
    choice = "linear" if kind == "linear" else str(tmp_path / "tiny é.safetensors")
    more = ("-n", "3", "--batch", "2", "--sampler", "ddpm")
    assert txt2img(model, tmp_path / "plain", *more) == 0
    capsys.readouterr()
    assert txt2img(model, tmp_path / "shown", *more, "--preview", choice) == 0
    plain = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    shown = {path.name: path.read_bytes() for path in (tmp_path / "shown").iterdir()}
    preview = shown.pop("preview.png")
    assert shown == plain
    assert preview.startswith(b"\x89PNG")
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        str(tmp_path / "shown" / name) for name in ("preview.png", *sorted(plain))
    ]
    assert told.err == ""


def test_it_shows_the_estimate_every_few_steps(
    model: Path, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_file(tmp_path / "tiny", FITS)
    kept: list[Tensor] = []

    def keep(images: Tensor, path: Path) -> None:
        assert path == tmp_path / "out" / "preview.png"
        kept.append(images)

    monkeypatch.setattr(looking, "save_preview", keep)
    more = ("--preview", str(tmp_path / "tiny"), "--preview-every", "2", "--seed", "5")
    assert txt2img(model, tmp_path / "out", *more) == 0
    estimates = [step.denoised for step in pipe.stream(["a red apple"], steps=4, seed=5)]
    for images, i in zip(kept, (0, 2, 3), strict=True):
        assert_close(images, network.decode(estimates[i]).clamp(-1, 1), rtol=0, atol=1e-5)


def missing(folder: Path) -> None:
    """No file at all."""


def text(folder: Path) -> None:
    (folder / "tiny").write_text("no weights")


def foreign(folder: Path) -> None:
    save_weights(folder / "tiny", {"decoder.conv_in.weight": torch.ones(3)})


def encoder(folder: Path) -> None:
    tiny_file(folder / "tiny", FITS, "encoder")


def channels(folder: Path) -> None:
    tiny_file(folder / "tiny", TinyAutoencoderConfig(latent_channels=16, channels=8, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)))  # fmt: skip


def factor(folder: Path) -> None:
    tiny_file(folder / "tiny", TinyAutoencoderConfig(channels=8))


@pytest.mark.parametrize(("made", "message"), [
    (missing, "tiny does not exist"),
    (text, "tiny is"),
    (foreign, "tiny holds no tiny autoencoder of the TAESD family"),
    (encoder, "there is no decoder of a tiny autoencoder in it"),
    (channels, "tiny is for latents of 16 channels at 1/4 of the size, this model's have 4 at 1/4; --preview linear"),
    (factor, "tiny is for latents of 4 channels at 1/8 of the size, this model's have 4 at 1/4; --preview linear"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(
    model: Path,
    tmp_path: Path,
    made: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(tmp_path)
    assert txt2img(model, tmp_path / "out", "--preview", str(tmp_path / "tiny")) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("ldm-sample: error: ")
    assert message in told.err
    assert not (tmp_path / "out").exists()


def test_previews_each_zero_steps(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert txt2img(model, tmp_path / "out", "--preview", "linear", "--preview-every", "0") == 2
    assert capsys.readouterr().err == "ldm-sample: error: --preview-every must be at least 1 step, got 0\n"
    assert not (tmp_path / "out").exists()
