"""The model "emoji" that ships: small enough, complete, and its pictures show what the prompt says."""

from pathlib import Path

import pytest
import torch

import sample
from sample.__main__ import main
from sample.pipeline import Pipeline

FOLDER = Path(sample.__file__).parent / "models" / "emoji"


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return Pipeline.load("emoji", device="cpu")


def test_it_is_whole_and_small(emoji: Pipeline) -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.stem for file in files] == ["autoencoder", "text_encoder", "unet"]
    assert sum(file.stat().st_size for file in files) <= 48 * 2**20
    assert 10e6 <= sum(p.numel() for p in emoji.unet.parameters()) <= 25e6


def test_colours_follow_the_prompt(emoji: Pipeline) -> None:
    """Away from the white ground apples are more red than blue and blue hearts the reverse, mean of four seeds."""
    prompts = ["a red apple, noto emoji"] * 4 + ["a blue heart, noto emoji"] * 4
    images = emoji.txt2img(prompts, seed=1, steps=15, guidance=4.0, batch=8)
    coloured = (images.amin(dim=1) < 0.6).float()  # (8, H, W)
    assert (coloured.mean(dim=(1, 2)) > 0.05).all()
    excess = ((images[:, 0] - images[:, 2]) * coloured).sum(dim=(1, 2)) / coloured.sum(dim=(1, 2))
    assert excess[:4].mean() > 0.2
    assert excess[4:].mean() < -0.2


def test_the_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["txt2img", "a red apple, noto emoji", "-n", "4", "--seed", "7", "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 5
    assert sum(name.startswith("grid-") for name in names) == 1
    assert str(tmp_path) in capsys.readouterr().out


def test_the_autoencoder_keeps_flat_colours(emoji: Pipeline) -> None:
    image = torch.ones(1, 3, 64, 64)
    image[:, :, 16:48, 16:48] = torch.tensor([0.8, -0.7, -0.6]).reshape(1, 3, 1, 1)
    back = emoji.autoencoder.decode(emoji.autoencoder.encode(image).mode())
    assert (back - image).abs().mean() < 0.06
