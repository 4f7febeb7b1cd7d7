"""`ldm-weights lora`: each command on files and checkpoints, against the weights it should give, and mistakes."""

from pathlib import Path

import pytest
import torch
from test_loras import trained

from ldm.models.lora import attach
from ldm.models.lora_math import delta
from ldm.weights.lora import FORMS, LoRAFile, read_lora
from sample.pipeline import Pipeline
from sample.weights import main

LAYER = "mid_block.attention.blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[Path]:
    """Two LoRAs for the tiny model."""
    pipe, folder = Pipeline.load(model, "cpu"), tmp_path_factory.mktemp("lo ras")
    return [trained(pipe, folder / f"{seed}.safetensors", seed) for seed in (1, 2)]


def run(*arguments: object) -> int:
    return main(["lora", *map(str, arguments)])


def read(path: Path, model: Path) -> LoRAFile:
    pipe = Pipeline.load(model, "cpu")
    assert pipe.text_encoder is not None
    return read_lora(path, {"unet": pipe.unet.config, "text": pipe.text_encoder.config})


def test_inspect(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(files[0]), "  form          ldm"]
    assert lines[2].startswith("  UNet          48 of ") and "rank 2, alpha / rank 1," in lines[2]
    assert "text encoder  6 of 6 layers" in lines[3] and len(lines) == 8


@pytest.mark.parametrize("form", [form for form in FORMS if form != "cloneofsimo"])
def test_convert(form: str, files: list[Path], model: Path, tmp_path: Path) -> None:
    path = tmp_path / ("peft" if form == "peft" else f"{form}.safetensors")
    assert run("convert", files[0], path, "--to", form) == 0
    assert run("convert", path, tmp_path / "back.safetensors", "--model", model) == 0
    assert (tmp_path / "back.safetensors").read_bytes() == files[0].read_bytes()


def test_merge_is_the_hand_merge(files: list[Path], model: Path, tmp_path: Path) -> None:
    """And a model with the merged weights draws what the model draws with the LoRAs."""
    assert run("merge", model, tmp_path / "m", f"{files[0]}:0.5", files[1]) == 0
    base, after = Pipeline.load(model, "cpu"), Pipeline.load(tmp_path / "m", "cpu")
    loras = [read(file, model) for file in files]
    by_hand = base.unet.get_submodule(LAYER).weight + 0.5 * delta(loras[0].parts["unet"][LAYER])
    by_hand = by_hand + delta(loras[1].parts["unet"][LAYER])
    torch.testing.assert_close(after.unet.get_submodule(LAYER).weight, by_hand)
    assert torch.equal(after.unet.conv_in.weight, base.unet.conv_in.weight)
    expected = after.txt2img("a", steps=2)
    base.add_lora(files[0], 0.5)
    base.add_lora(files[1])
    torch.testing.assert_close(base.txt2img("a", steps=2), expected, atol=2e-3, rtol=0)


def test_extract_finds_what_was_merged(files: list[Path], model: Path, tmp_path: Path) -> None:
    assert run("merge", model, tmp_path / "m", files[0]) == 0
    assert run("extract", model, tmp_path / "m", tmp_path / "x.safetensors", "--energy", "0.99999") == 0
    found, expected = read(tmp_path / "x.safetensors", model), read(files[0], model)
    for part, weights in expected.parts.items():
        assert found.parts[part].keys() == weights.keys()
        for layer, factors in weights.items():
            assert found.parts[part][layer].rank == 2
            torch.testing.assert_close(delta(found.parts[part][layer]), delta(factors), atol=1e-4, rtol=1e-4)


def test_combine_and_resize(files: list[Path], model: Path, tmp_path: Path) -> None:
    arguments = (f"{files[0]}:0.5", f"{files[1]}:-1")
    for method, more in (("sum", []), ("average", []), ("svd", ["--rank", 3])):
        assert run("combine", tmp_path / f"{method}.safetensors", *arguments, "--method", method, *more) == 0
    one, two = (read(file, model).parts["unet"][LAYER] for file in files)
    expected = 0.5 * delta(one) - delta(two)
    made = {
        method: read(tmp_path / f"{method}.safetensors", model).parts["unet"][LAYER]
        for method in ("sum", "svd", "average")
    }
    torch.testing.assert_close(delta(made["sum"]), expected)
    assert [factors.rank for factors in made.values()] == [4, 3, 2]
    values = torch.linalg.svdvals(expected)
    torch.testing.assert_close(
        (delta(made["svd"]) - expected).norm(), values[3:].norm(), atol=1e-4, rtol=1e-3
    )
    assert (delta(made["average"]) - expected).norm() > 0.1 * expected.norm()
    assert run("resize", tmp_path / "sum.safetensors", tmp_path / "r.safetensors", "--rank", 3) == 0
    resized = read(tmp_path / "r.safetensors", model).parts["unet"][LAYER]
    torch.testing.assert_close(delta(resized), delta(made["svd"]), atol=1e-4, rtol=1e-4)


def test_a_lora_attached_twice_over(files: list[Path], model: Path, tmp_path: Path) -> None:
    """The sum of a LoRA and its negative changes nothing."""
    assert run("combine", tmp_path / "zero.safetensors", files[0], f"{files[0]}:-1") == 0
    pipe = Pipeline.load(model, "cpu")
    assert pipe.text_encoder is not None
    ids = pipe.tokenizer(["a"])
    before = pipe.text_encoder(ids)
    attach(pipe.text_encoder, read(tmp_path / "zero.safetensors", model).parts["text"])
    torch.testing.assert_close(pipe.text_encoder(ids), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "ONE", "DST", "--to", "onnx"], "form must be one of ldm, kohya"),
        (["convert", "ONE", "DST", "--to", "cloneofsimo"], "are missing or not among them"),
        (["convert", "ONE", "ONE"], "exists; give a new name"),
        (["convert", "ONE", "DST", "--model", "emoji"], "another model: matched 0 of 54"),
        (["resize", "ONE", "DST"], "say how much is kept"),
        (["resize", "ONE", "DST", "--rank", "0"], "rank must be at least 1, got 0"),
        (["resize", "ONE", "DST", "--energy", "2"], "energy kept must be above 0"),
        (["combine", "DST", "ONE", "--method", "mean"], "--method must be"),
        (["combine", "DST", "ONE", "--method", "svd"], "--rank and --energy go with --method svd"),
        (["combine", "DST", "ONE", "--rank", "2"], "--rank and --energy go with --method svd"),
        (["extract", "MODEL", "MODEL", "DST", "--rank", "2"], "do not differ in any layer"),
        (["extract", "MODEL", "emoji", "DST", "--rank", "2"], "differ in the kind of their UNet"),
        (["merge", "emoji", "DST", "ONE"], "another model: matched 0 of 54"),
        (["inspect", "MODEL/unet.safetensors"], "holds no LoRA"),
        (["inspect", "nothing.safetensors"], "nothing.safetensors does not exist"),
    ],
)
def test_mistakes_end_in_one_line_and_no_file(
    arguments: list[str], message: str, files: list[Path], model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"ONE": files[0], "MODEL": model, "DST": tmp_path / "new" / "dst.safetensors"}
    for place, path in places.items():
        arguments = [each.replace(place, str(path)) for each in arguments]
    assert run(*arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("ldm-weights: error: ") and told.count("\n") == 1
    assert not list(tmp_path.rglob("*dst*"))
