"""LoRAs in the commands: options and tags, pictures that ask for different ones, the record, and every mistake."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.models.lora import LoRAConfig, add_lora
from ldm.weights.lora_writing import write_lora
from sample.__main__ import main
from sample.adapters import LORAS, find_adapter
from sample.images import read_parameters
from sample.loras import Asked, located, read_tags
from sample.pipeline import Pipeline


def trained(pipe: Pipeline, path: Path, seed: int, form: str = "ldm") -> Path:
    """A LoRA that changes much, of UNet and text tower."""
    assert pipe.text_encoder is not None
    weights, configs = {}, {"unet": pipe.unet.config, "text": pipe.text_encoder.config}
    for part, module in (("unet", pipe.unet), ("text", pipe.text_encoder)):
        lora = add_lora(module, LoRAConfig(rank=2, targets=("transformer",)), seed=seed)
        with torch.no_grad():
            for adapter in lora.adapters.values():
                nn.init.normal_(adapter.up, std=1.0, generator=torch.Generator().manual_seed(seed))
        weights[part] = lora.weights
        lora.remove()
    return write_lora(weights, path, configs, form)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Two LoRAs for the tiny model, one in kohya's form."""
    pipe, folder = Pipeline.load(model, "cpu"), tmp_path_factory.mktemp("ad apters")
    trained(pipe, folder / "style.safetensors", 1)
    trained(pipe, folder / "Möd 2.safetensors", 2, "kohya")
    return folder


def make(model: Path, out: Path, *arguments: object) -> list[np.ndarray]:
    common = ["--model", str(model), "--out", str(out), "--device", "cpu", "--steps", "2", "--size", "32x32"]
    assert main(["txt2img", *map(str, arguments), *common]) == 0
    return [np.array(Image.open(path)) for path in sorted(out.glob("0*.png"))]


def test_option_and_tag_say_the_same(model: Path, folder: Path, tmp_path: Path) -> None:
    [plain] = make(model, tmp_path / "plain", "an apple")
    [option] = make(model, tmp_path / "option", "an apple", "--lora", f"{folder / 'style.safetensors'}:0.8")
    [tag] = make(model, tmp_path / "tag", "an apple<lora:style:0.8>", "--adapters", folder)
    assert np.array_equal(option, tag)
    assert np.abs(plain.astype(int) - option).mean() > 5
    [none] = make(model, tmp_path / "none", "an apple<lora:style:0>", "--adapters", folder)
    assert np.array_equal(none, plain)


def test_with_convolutions_in_another_form_and_in_another_command(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    lora = ["--lora", str(folder / "style.safetensors")]
    [slow] = make(model, tmp_path / "a", "a", *lora)
    [fast] = make(model, tmp_path / "b", "a", *lora, "--fast-conv", "0.01")
    assert np.abs(slow.astype(int) - fast).max() <= 1
    Image.fromarray(slow).save(tmp_path / "in.png")
    command = [
        "img2img",
        str(tmp_path / "in.png"),
        "a",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    for name, more in (("c", []), ("d", lora)):
        assert main([*command, "--out", str(tmp_path / name), *more]) == 0
    c, d = (np.array(Image.open(tmp_path / name / "00000.png")) for name in "cd")
    assert np.abs(c.astype(int) - d).mean() > 0.1


def test_pictures_of_one_call_may_ask_for_different_ones(model: Path, folder: Path, tmp_path: Path) -> None:
    """Each is what it would be alone, with both, with one, and with none."""
    prompts = [
        "a<lora:style:0.5>",
        "a <lora:style:1><lora:Möd 2:0.7:0.9>",
        "a",
    ]
    together = make(model, tmp_path / "together", *prompts, "--adapters", folder)
    for i, prompt in enumerate(prompts):
        [alone] = make(model, tmp_path / str(i), prompt, "--first", i, "--adapters", folder)
        assert np.abs(alone.astype(int) - together[i]).max() <= 1
    assert np.abs(together[0].astype(int) - together[2]).mean() > 5


def test_recorded_and_repeated(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "style.safetensors"
    arguments = ["a<lora:Möd 2:0.6>", "b", "--lora", f"{file}:0.3", "--adapters", folder]
    pictures = make(model, tmp_path / "a", *arguments)
    recorded = read_parameters(tmp_path / "a" / "00000.png")
    assert (recorded["prompt"], recorded["lora"]) == ("a<lora:Möd 2:0.6>", [f"{file}:0.3"])
    assert set(recorded["lora_hashes"]) == {"style", "Möd 2"}
    assert main(["again", str(tmp_path / "a" / "00000.png"), "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "b" / "00000.png")), pictures[0])
    capsys.readouterr()
    other = ["--out", str(tmp_path / "c"), f"--lora={file}:0.9"]  # another scale, not one more
    assert main(["again", str(tmp_path / "a" / "00001.png"), *other]) == 0
    assert read_parameters(tmp_path / "c" / "00000.png")["lora"] == [f"{file}:0.9"]


def test_a_changed_file_is_told(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, path = Pipeline.load(model, "cpu"), tmp_path / "x.safetensors"
    trained(pipe, path, 1)
    make(model, tmp_path / "a", "a", "--lora", path)
    path.unlink()
    trained(pipe, path, 2)
    assert main(["again", str(tmp_path / "a" / "00000.png"), "--out", str(tmp_path / "b")]) == 0
    assert "lora_hashes differ" in capsys.readouterr().err


def test_from_python_with_a_scale_at_each_step(model: Path, folder: Path) -> None:
    pipe = Pipeline.load(model, "cpu")
    before = pipe.txt2img("a", steps=4)
    lora = pipe.add_lora(folder / "style.safetensors", 1.0)
    whole = pipe.txt2img("a", steps=4)
    lora.set_scale(0.5)
    half = pipe.txt2img("a", steps=4)
    lora.set_scale(1.0)
    for step in pipe.stream(["a"], steps=4):
        latents = step.sample
        lora.set_scale(0.0)  # from the second step on
    changed = pipe.decode(latents)
    pictures = [before, whole, half, changed]
    assert all((a - b).abs().mean() > 0.01 for i, a in enumerate(pictures) for b in pictures[:i])
    lora.remove()
    assert torch.equal(pipe.txt2img("a", steps=4), before)
    assert pipe.loras == {}


def test_scales_of_text_tower_and_network_apart(model: Path, folder: Path) -> None:
    pipe = Pipeline.load(model, "cpu")
    assert pipe.text_encoder is not None
    ids = pipe.tokenizer(["a red apple"])
    plain = pipe.text_encoder(ids)
    lora = pipe.add_lora(folder / "style.safetensors", 1.0, text_scale=0)
    assert torch.equal(pipe.text_encoder(ids), plain)
    with_unet = pipe.txt2img("a", steps=1)
    lora.set_scale(0.0, 1.0)
    assert not torch.equal(pipe.text_encoder(ids), plain)
    assert not torch.equal(pipe.txt2img("a", steps=1), with_unet)


@pytest.mark.parametrize(
    ("prompt", "text", "asked"),
    [
        ("a <lora:x> b", "a  b", [Asked("x", 1, 1)]),
        ("<lora:x y.v2:0.8>", "", [Asked("x y.v2", 0.8, 0.8)]),
        ("<lora:x:0.5:0.8>", "", [Asked("x", 0.8, 0.5)]),  # the text tower's first
        ("<lora:x:unet=-0.5>", "", [Asked("x", -0.5, 1)]),
        ("<lora:x:te=2>", "", [Asked("x", 2, 2)]),
        ("<lora:a:1> (b:1.2) <lora:c:0>", " (b:1.2) ", [Asked("a", 1, 1), Asked("c", 0, 0)]),
        ("a < b", "a < b", []),
    ],
)
def test_tags(prompt: str, text: str, asked: list[Asked]) -> None:
    assert read_tags(prompt) == (text, tuple(asked))


@pytest.mark.parametrize(
    "tag", ["<lora:x:y>", "<lora::1>", "<lora:x:1:2:3>", "<lora:x:nan>", "<lora:x:te=1:te=2>", "<lora:x:a=1>"]
)
def test_tags_of_another_form(tag: str) -> None:
    with pytest.raises(ValueError, match="must be like <lora:name:0.8>"):
        read_tags(tag)


def test_a_file_and_its_scale(tmp_path: Path) -> None:
    assert located("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert located("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert located("c:/b.safetensors") == (Path("c:/b.safetensors"), 1.0)
    (tmp_path / "odd:3").write_bytes(b"")
    assert located(str(tmp_path / "odd:3")) == (tmp_path / "odd:3", 1.0)
    with pytest.raises(ValueError, match="must be like FILE or FILE:0.8"):
        located("a:inf")


def test_names_in_a_folder(folder: Path, tmp_path: Path) -> None:
    assert find_adapter(folder, "style", LORAS) == folder / "style.safetensors"
    with pytest.raises(ValueError, match="no 'Style' in .*; there: style"):
        find_adapter(folder, "Style", LORAS)
    with pytest.raises(ValueError, match="must be given by --adapters DIR"):
        find_adapter(None, "style", LORAS)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_adapter(folder / "nothing", "style", LORAS)
    with pytest.raises(ValueError, match=r"there: no \.safetensors or \.pt file"):
        find_adapter(tmp_path, "x", LORAS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a<lora:stile:1>", "--adapters=FOLDER"], "no 'stile' in FOLDER; there: style"),
        (["a<lora:style:1>"], "must be given by --adapters DIR"),
        (["a<lora:style:x>", "--adapters=FOLDER"], "must be like <lora:name:0.8>"),
        (["a<lora:style><lora:style>", "--adapters=FOLDER"], "'style' is asked for twice for one picture"),
        (["a<lora:style>", "--lora=FOLDER/style.safetensors"], "'style' is asked for twice for one picture"),
        (["a", "--negative=b<lora:style>", "--adapters=FOLDER"], "belongs into the prompt"),
        (["a", "--lora=FOLDER/nothing.safetensors"], "nothing.safetensors does not exist"),
        (["a", "--lora=MODEL/unet.safetensors"], "holds no LoRA"),
        (["a", "--lora=FOLDER/style.safetensors", "--model=emoji"], "another model: matched 0 of"),
    ],
)
def test_mistakes_end_in_one_line_and_no_file(
    arguments: list[str],
    message: str,
    model: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"FOLDER": str(folder), "MODEL": str(model)}
    for place, path in places.items():
        arguments = [each.replace(place, path) for each in arguments]
        message = message.replace(place, path)
    options = [f"--model={model}", f"--out={tmp_path / 'out'}", "--device=cpu", "--steps=1"]
    assert main(["txt2img", *options, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("ldm-sample: error: ") and told.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_plain_syntax_leaves_tags_alone(model: Path, tmp_path: Path) -> None:
    assert len(make(model, tmp_path, "a<lora:nothing:1>", "--syntax", "plain")) == 1


def test_a_shipped_name(
    model: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By option and tag without a folder; a folder that is given has the first word, `./name` is a file."""
    shipped = tmp_path / "models" / "tiny" / "lora"
    shipped.mkdir(parents=True)
    (shipped / "style.safetensors").write_bytes((folder / "style.safetensors").read_bytes())
    monkeypatch.setattr("sample.adapters.SHIPPED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style").write_bytes(b"no LoRA")
    assert located("style:0.8") == (shipped / "style.safetensors", 0.8)
    assert located("style") == (shipped / "style.safetensors", 1.0)
    assert located("./style") == (Path("style"), 1.0)
    assert located("st*le") == (Path("st*le"), 1.0)
    [option] = make(model, tmp_path / "option", "an apple", "--lora", "style:0.8")
    [tag] = make(model, tmp_path / "tag", "an apple<lora:style:0.8>")
    [path] = make(model, tmp_path / "path", "an apple", "--lora", f"{folder / 'style.safetensors'}:0.8")
    assert np.array_equal(option, path)
    assert np.array_equal(tag, path)
    (tmp_path / "other").mkdir()
    common = ["--model", str(model), "--adapters", str(tmp_path / "other")]
    assert main(["txt2img", "an apple<lora:style>", *common]) == 2
    assert "no 'style' in" in capsys.readouterr().err
