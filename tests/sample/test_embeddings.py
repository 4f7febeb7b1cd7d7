"""New words in the commands and in Python: they act, are recorded, made again, and each mistake is one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.weights.embeddings import Embedding, write_embeddings
from ldm.weights.io import save_weights
from sample import invert, txt2img
from sample.__main__ import main
from sample.embeddings import add_embedding, inversion_of
from sample.images import read_parameters
from sample.pipeline import Pipeline

WIDTH = 16


def vectors(count: int = 2, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def write(
    path: Path, token: str = "<cat-toy>", count: int = 2, seed: int = 0, form: str | None = None
) -> Path:
    write_embeddings(path, [Embedding(token, vectors(count, seed))], form)
    return path


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command; its words are those of the command alone."""
    for module in (txt2img, invert):
        monkeypatch.setattr(module, "load_pipeline", lambda args: pipe)
    yield
    for token in [*inversion_of(pipe).tokens]:
        pipe.remove_embedding(token)


def run(out: Path, *arguments: object, command: str = "txt2img") -> np.ndarray:
    common = ["--out", str(out), "--device", "cpu", "--steps", "1", "--seed", "3"]
    assert main([command, *map(str, arguments), *common]) == 0
    return pixels(out)


def pixels(out: Path, name: str = "00000.png") -> np.ndarray:
    return np.array(Image.open(out / name))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, command: str = "txt2img") -> str:
    assert main([command, *map(str, arguments), "--device", "cpu", "--steps", "1"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


# From Python


def test_from_python(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    model, prompt = build(), "a photo of <cat-toy>"
    before, plain = model.txt2img(prompt, steps=1), model.txt2img("an apple", steps=1)
    assert model.add_embedding(write(tmp_path / "a.safetensors")) == ["<cat-toy>"]
    assert torch.equal(model.txt2img("an apple", steps=1), plain)
    drawn = model.txt2img(prompt, steps=1)
    assert not torch.allclose(drawn, before, atol=1e-3)
    assert model.add_embedding(vectors(), "<same>") == ["<same>"]
    assert torch.equal(model.txt2img("a photo of <same>", steps=1), drawn)
    assert model.add_embedding(vectors(1)[0], "Style X") == ["style x"]
    model.save(tmp_path / "model", torch.float32)
    model.remove_embedding("<cat-toy>")
    assert torch.equal(model.txt2img(prompt, steps=1), before)
    again = Pipeline.load(tmp_path / "model", "cpu")
    assert_close(again.txt2img(prompt, steps=1), before, rtol=0, atol=1e-5)  # it has its own words alone


def test_a_word_is_no_part_of_a_model_without_clip(build: Callable[..., Pipeline]) -> None:
    with pytest.raises(ValueError, match="has no CLIP text tower; embeddings are words of such a one"):
        build(text=False).add_embedding(vectors(), "<x>")


def test_all_words_of_a_file_or_none(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    model = build()
    save_weights(tmp_path / "a.safetensors", {"<a>": vectors(), "cat": vectors()})
    with pytest.raises(ValueError, match="a.safetensors: placeholder 'cat' is a token already"):
        model.add_embedding(tmp_path / "a.safetensors")
    assert inversion_of(model).tokens == []
    with pytest.raises(ValueError, match="given as a tensor needs a token"):
        add_embedding(model, vectors())


# From the commands


def test_a_picture_with_it_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is drawn, recorded by its hash whatever the form of the file, and made again; another file is told."""
    file, prompt = write(tmp_path / "birb=1.pt"), "a (photo:1.2) of birb=1, and more"
    plain = run(tmp_path / "plain", prompt)
    drawn = run(tmp_path / "out", prompt, "--embedding", file)
    assert not np.array_equal(plain, drawn)
    told = read_parameters(tmp_path / "out" / "00000.png")
    assert told["embedding"] == [str(file)]
    assert [*told["embedding_hashes"]] == ["birb=1"]
    run(tmp_path / "out", "<x> photo", "--embedding", f"{write(tmp_path / 'b.bin')}=<x>")
    other = read_parameters(tmp_path / "out" / "00001.png")["embedding_hashes"]
    assert other == {"<x>": told["embedding_hashes"]["birb=1"]}
    assert "embedding_hashes" not in read_parameters(tmp_path / "plain" / "00000.png")
    capsys.readouterr()
    picture = str(tmp_path / "out" / "00000.png")
    assert main(["again", picture, "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(pixels(tmp_path / "again"), drawn)
    assert "warning" not in capsys.readouterr().err
    write(file, seed=1)
    assert main(["again", picture, "--out", str(tmp_path / "again")]) == 0
    assert "warning: embedding_hashes differ" in capsys.readouterr().err
    assert not np.array_equal(pixels(tmp_path / "again", "00001.png"), drawn)


def test_several_and_the_negative_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "a.bin", "<a>"), write(tmp_path / "b.safetensors", "<b>", seed=1)]
    both = [f"--embedding={file}" for file in files]
    drawn = run(tmp_path / "out", "<A> photo", "--negative", "(<b>:0.5)", *both)
    assert "warning" not in capsys.readouterr().err
    assert not np.array_equal(drawn, run(tmp_path / "x", "<a> photo", "--negative", "(b:0.5)", *both))
    assert "warning: no prompt says '<b>' of --embedding " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["birb style.safetensors", "birb style.pt", "birb style.png"])
def test_a_folder_of_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the file's name, whatever the file calls its word; others of that name are passed over."""
    folder, prompt = tmp_path / "adapters", "a fish, Birb Style <lora:cat:1>, sx"
    write(folder / name, "<other>")
    write(folder / "cat.pt")
    write(folder / "s.pt")
    if not name.endswith(".safetensors"):
        save_weights(folder / "birb style.safetensors", {"up": torch.ones(4, 2), "down": torch.ones(2, 3)})
    plain = run(tmp_path / "plain", prompt.replace("<lora:cat:1>", ""))
    drawn = run(tmp_path / "out", prompt.replace("<lora:cat:1>", ""), "--adapters", folder)
    assert not np.array_equal(plain, drawn)
    assert [*read_parameters(tmp_path / "out" / "00000.png")["embedding_hashes"]] == ["birb style"]
    said = "a birb style" if name.endswith(".pt") else "a <other>"  # asked for, it is called as the file says
    by_name = run(tmp_path / "x", said, "--embedding", "birb style", "--adapters", folder)
    assert np.array_equal(by_name, run(tmp_path / "y", said, "--embedding", folder / name))
    assert not np.array_equal(by_name, run(tmp_path / "z", said))
    assert "warning" not in capsys.readouterr().err


def test_a_file_named_like_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(tmp_path / "plain", "a cat")
    write(tmp_path / "adapters" / "cat.pt")
    assert np.array_equal(run(tmp_path / "out", "a cat", "--adapters", tmp_path / "adapters"), plain)
    assert "cat.pt not used: 'cat' is a word of its own" in capsys.readouterr().err


def test_other_commands(tmp_path: Path) -> None:
    file, given = write(tmp_path / "a.bin", "<a>"), tmp_path / "in.png"
    Image.new("RGB", (32, 32), "orange").save(given)
    plain = run(tmp_path / "plain", given, "<a>", command="img2img")
    assert not np.array_equal(
        plain, run(tmp_path / "o", given, "<a>", "--embedding", file, command="img2img")
    )
    for out, more in (("p", []), ("q", ["--embedding", file])):
        assert (
            main(["invert", str(given), "<a>", "--steps=2", "--out", str(tmp_path / out), *map(str, more)])
            == 0
        )
    pictures = [pixels(tmp_path / out, "inverted-0000.png") for out in ("p", "q")]
    assert not np.array_equal(*pictures)
    assert "<a>" in read_parameters(tmp_path / "q" / "inverted-0000.png")["embedding_hashes"]


def test_a_sweep_over_embeddings(tmp_path: Path, model: Path) -> None:
    """Each cell has its own words and none of the cell before."""
    for name, seed in (("a", 0), ("b", 1)):
        write(tmp_path / f"{name}.bin", "<x>", seed=seed)
    (tmp_path / "s.yaml").write_text(
        f"prompts: [a <x>]\noptions: {{model: '{model}', device: cpu, steps: 1, syntax: plain}}\n"
        f"axes: {{embedding: ['{tmp_path}/a.bin', '{tmp_path}/b.bin', '{tmp_path}/a.bin']}}\n"
    )
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 0
    first, other, same = (np.array(Image.open(path)) for path in sorted((tmp_path / "out").rglob("0*.png")))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


# Mistakes


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.bin")
    torch.save({"<x>": torch.ones(1, 768)}, tmp_path / "sd1.bin")
    save_weights(tmp_path / "xl.safetensors", {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)})
    for arguments, message in [
        ([f"{tmp_path}/none.bin"], "none.bin does not exist"),
        ([tmp_path], "is a folder"),
        (
            [f"{tmp_path}/sd1.bin"],
            "sd1.bin: the embedding of '<x>' has width 768 (Stable Diffusion 1); the model's",
        ),
        ([f"{tmp_path}/xl.safetensors"], "is an embedding for Stable Diffusion XL"),
        ([f"{file}=cat"], "a.bin: placeholder 'cat' is a token already"),
        ([f"{file}="], "--embedding must be like FILE or FILE=TOKEN"),
        ([file, "--embedding", file], "'<cat-toy>' is a token already"),
        (["a", "--adapters", f"{tmp_path}/no"], "/no is no folder"),
        (["birb", "--adapters", tmp_path], "no 'birb' in"),
    ]:
        line = fails(capsys, "a fish", "--out", tmp_path / "out", "--embedding", *arguments)
        assert line.startswith("ldm-sample: error: ")
        assert message in line
    assert not (tmp_path / "out").exists()


def test_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--embedding creature` is a file that ships with a model, also under another word."""
    file = write(tmp_path / "models" / "tiny" / "embedding" / "creature.safetensors", "<creature>")
    monkeypatch.setattr("sample.adapters.SHIPPED", tmp_path / "models")
    by_name = run(tmp_path / "a", "a <creature>", "--embedding", "creature")
    assert np.array_equal(by_name, run(tmp_path / "b", "a <creature>", "--embedding", file))
    assert np.array_equal(by_name, run(tmp_path / "c", "a <x>", "--embedding", "creature=<x>"))
    assert not np.array_equal(by_name, run(tmp_path / "d", "a <creature>"))
