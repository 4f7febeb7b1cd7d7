"""LoRA and word that ship for "emoji": small, found by name, and they draw a creature that it never saw."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.metrics import distances, thumbnails
from sample.__main__ import main
from sample.adapters import shipped_adapter
from sample.images import read_parameters, read_rgb, to_tensor
from sample.model import SHIPPED
from sample.pipeline import Pipeline

CREATURE = Path(__file__).parents[2] / "configs" / "train" / "creature"
STYLES = ("noto emoji", "fluent 3d emoji", "openmoji emoji")
HOW = {"seed": 77, "steps": 15, "guidance": 4.0, "batch": 12}


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return Pipeline.load("emoji", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """The five that were learned."""
    return torch.stack([to_tensor(read_rgb(path, 64)) for path in sorted(CREATURE.glob("*.png"))])


def from_nearest(images: Tensor, pictures: Tensor) -> Tensor:
    """How far each image is from that of the pictures which it is nearest to."""
    return distances(thumbnails(images), thumbnails(pictures)).amin(dim=1)


def test_all_of_it_is_small() -> None:
    files = [*SHIPPED.glob("emoji/lora/*"), *SHIPPED.glob("emoji/embedding/*")]
    assert {file.parent.name + "/" + file.name for file in files} == {
        "lora/creature.safetensors",
        "embedding/creature.safetensors",
    }
    assert sum(file.stat().st_size for file in files) <= 2 * 2**20


def test_the_subject_appears_and_its_class_stays(emoji: Pipeline, pictures: Tensor) -> None:
    """In three styles, in a prompt not trained on and with seeds that training never drew; aliens stay aliens."""
    asked = [f"a sks alien, {style}" for style in STYLES] + ["the sks alien, noto emoji"]
    aliens = [f"an alien, {style}" for style in STYLES]
    before = emoji.txt2img([text.replace("sks ", "") for text in asked] + aliens, **HOW)
    path = shipped_adapter("lora", "creature")
    assert path is not None
    added = emoji.add_lora(path)
    after = emoji.txt2img(asked + aliens, **HOW)
    added.remove()
    far, near = from_nearest(before[:4], pictures), from_nearest(after[:4], pictures)
    assert (near < 0.7 * far).all(), (near, far)
    coloured = (after[:4].amin(dim=1) < 0.4).float()  # (4, H, W)
    violet = (after[:4, 2] - after[:4, 1]) * coloured  # more blue than green
    assert (violet.sum(dim=(1, 2)) / coloured.sum(dim=(1, 2)) > 0.2).all()
    moved = (thumbnails(after[4:]) - thumbnails(before[4:])).square().mean(dim=1).sqrt()
    assert (moved < 0.3 * from_nearest(before[4:], pictures)).all(), moved


def test_the_word_alone_comes_nearer(emoji: Pipeline, pictures: Tensor) -> None:
    """A violet body: a third nearer than what the model draws of a word that it does not know, and of an alien."""
    how = HOW | {"guidance": 2.0}
    before = emoji.txt2img(["<creature>", "an alien, noto emoji"], **how)
    [word] = emoji.add_embedding(shipped_adapter("embedding", "creature"))
    assert word == "<creature>"
    after = emoji.txt2img([word] * 2, **how)
    emoji.remove_embedding(word)
    assert (from_nearest(after, pictures) < 0.67 * from_nearest(before, pictures).min()).all()


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    how = ["--steps", "2", "--out", str(tmp_path)]
    assert main(["txt2img", "a sks alien, noto emoji", "--lora", "creature", *how]) == 0
    assert main(["txt2img", "<creature>", "--embedding", "creature", *how]) == 0
    assert [*read_parameters(tmp_path / "00000.png")["lora_hashes"]] == ["creature"]
    assert [*read_parameters(tmp_path / "00001.png")["embedding_hashes"]] == ["<creature>"]
