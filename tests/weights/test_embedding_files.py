"""Files of new words: every form read and written to the bit, each broken file refused in one line."""

import base64
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from ldm.weights.embedding_pictures import NoEmbedding, sequence
from ldm.weights.embeddings import Embedding, described, read_embeddings, write_embeddings
from ldm.weights.io import save_weights

ONE, THREE = torch.randn(1, 768), torch.randn(3, 768)


def only(path: Path, token: str | None = None) -> Embedding:
    [found] = read_embeddings(path, token).embeddings
    return found


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "form", "token"),
    [
        ("a.safetensors", None, "<cat-toy>"),
        ("a.safetensors", "diffusers", "<cat-toy>"),
        ("a.bin", None, "<cat-toy>"),
        ("my cat.pt", None, "my cat"),
        ("my cat.safetensors", "webui", "my cat"),
        ("my cat.png", None, "<cat-toy>"),  # the table in the picture knows the name
    ],
)
def test_round_trip(name: str, form: str | None, token: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / name
    for vectors in (ONE.to(dtype), THREE.to(dtype)):
        write_embeddings(path, [Embedding("<cat-toy>", vectors)], form, step=7)
        found = only(path)
        assert found.token == token
        kept = torch.float32 if name.endswith(".png") else dtype
        assert found.vectors.dtype == kept
        assert torch.equal(found.vectors, vectors.to(kept))
        assert only(path, "<x>").token == "<x>"
    assert [each.name for each in path.parent.iterdir()] == [name], "nothing is left beside it"


def test_several_words(tmp_path: Path) -> None:
    words = [Embedding("<s1>", ONE), Embedding("<s2>", THREE)]
    for name in ("a.bin", "a.safetensors"):
        write_embeddings(tmp_path / name, words)
        found = read_embeddings(tmp_path / name).embeddings
        assert {each.token for each in found} == {"<s1>", "<s2>"}
        for each in found:
            assert torch.equal(each.vectors, ONE if each.token == "<s1>" else THREE)


# Forms of others, as their programs write them


def original(table: Any) -> dict[str, Any]:
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}


OTHERS: dict[str, tuple[str, Any, str, str]] = {
    "the original": ("birb.pt", original(nn.ParameterDict({"*": nn.Parameter(THREE)})), "birb", "original"),
    "the original, named": ("birb.pt", original(nn.ParameterDict({"@b": THREE})), "@b", "diffusers"),
    "the web UI": (
        "birb.pt",
        original({"*": THREE}) | {"name": "n", "step": 9, "sd_checkpoint": None, "sd_checkpoint_name": None},
        "birb",
        "original",
    ),
    "diffusers": ("learned_embeds.bin", {"<birb>": THREE}, "<birb>", "diffusers"),
    "a parameter": ("learned_embeds.bin", {"<birb>": nn.Parameter(THREE)}, "<birb>", "diffusers"),
    "kohya": ("birb.safetensors", {"emb_params": THREE}, "birb", "webui"),
    "kohya, pickled": ("birb.pt", {"emb_params": THREE}, "birb", "webui"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_forms_of_others(case: str, tmp_path: Path) -> None:
    name, content, token, form = OTHERS[case]
    path = tmp_path / name
    save_weights(path, content) if name.endswith(".safetensors") else torch.save(content, path)
    found = read_embeddings(path)
    assert found.form == form
    assert found.embeddings[0].token == token
    assert torch.equal(found.embeddings[0].vectors, THREE)
    assert not found.embeddings[0].vectors.requires_grad


def test_one_vector_without_an_axis(tmp_path: Path) -> None:
    torch.save({"<birb>": ONE[0]}, tmp_path / "a.bin")
    assert torch.equal(only(tmp_path / "a.bin").vectors, ONE)


def test_words_beside_a_lora(tmp_path: Path) -> None:
    """cloneofsimo's files: the header marks the words; all other tensors are the LoRA's."""
    tensors = {
        "unet:0:up": torch.randn(8, 4),
        "unet:0:down": torch.randn(4, 6),
        "<s1>": ONE[0],
        "<s2>": THREE[0],
    }
    marks = {"unet": '["CrossAttention"]', "unet:0:rank": "4", "<s1>": "<embed>", "<s2>": "<embed>"}
    save_weights(tmp_path / "a.safetensors", tensors, marks)
    found = read_embeddings(tmp_path / "a.safetensors")
    assert found.form == "lora"
    assert [each.token for each in found.embeddings] == ["<s1>", "<s2>"]
    assert torch.equal(found.embeddings[0].vectors, ONE)


def picture(path: Path, text: bytes | str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", text.decode() if isinstance(text, bytes) else text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def table(**more: Any) -> bytes:
    return json.dumps({"string_to_param": {"*": {"TORCHTENSOR": THREE.tolist()}}, **more}).encode()


def in_pixels(path: Path, text: bytes, height: int = 128) -> Path:
    """What the web UI writes into pixels, after its description: two strips of nibbles, parted by black columns."""
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    cells = np.resize(packed, -(-(len(packed) + 1) // (3 * height)) * 3 * height)  # it repeats the beginning
    strips = []
    for nibbles in (cells & 15, cells >> 4):
        pattern = np.random.default_rng(0).integers(1, 15, len(cells), dtype=np.uint8) << 4  # of discs, there
        seed, mixed = 0, []
        for value in nibbles:
            seed = (1664525 * seed + 1013904223) % 2**32
            mixed.append(int(value) ^ (seed % 255 & 15))
        strips.append((np.array(mixed, np.uint8) | pattern).reshape(height, -1, 3))
    inner, black = np.full((height, 40, 3), 77, np.uint8), np.zeros((height, 1, 3), np.uint8)
    framed = np.concatenate([strips[0], black, inner, black, strips[1]], axis=1)
    Image.fromarray(np.pad(framed, ((3, 2), (4, 1), (0, 0)))).save(path)
    return path


def test_a_picture_of_the_web_ui(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", base64.b64encode(table(name="birb", step=5000)))
    assert only(path).token == "birb"
    assert torch.equal(only(path).vectors, THREE)
    assert only(picture(tmp_path / "b.png", base64.b64encode(table()))).token == "b"


def test_the_same_in_pixels(tmp_path: Path) -> None:
    found = only(in_pixels(tmp_path / "a.png", table(name="birb")))
    assert found.token == "birb"
    assert torch.equal(found.vectors, THREE)
    reference = [
        253,
        242,
        127,
        44,
        157,
        27,
        239,
        133,
        38,
        79,
        167,
        4,
        177,
        95,
        130,
    ]  # of the web UI's own test
    assert sequence(15).tolist() == [value & 15 for value in reference]


def test_what_inspect_says(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_embeddings(path, [Embedding("<cat>", torch.ones(2, 1024).half())], step=40)
    assert described(path).splitlines() == [
        str(path),
        "  form      original",
        "  word      a: 2 vectors of width 1024 (Stable Diffusion 2), float16, mean norm 32.000",
        "  name      <cat>",
        "  step      40",
    ]


def weights_command(*arguments: object) -> int:
    from sample.weights import main

    return main(["embedding", *map(str, arguments)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    write_embeddings(source, [Embedding("a", THREE.half())], step=40)
    assert weights_command(source) == 0
    assert "word      a: 3 vectors of width 768 (Stable Diffusion 1), float16" in capsys.readouterr().out
    assert weights_command(source, target, "--token", "<cat>") == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert only(target).token == "<cat>"
    assert torch.equal(only(target).vectors, THREE.half())
    assert read_embeddings(target).notes == {"step": 40}
    assert weights_command(target, tmp_path / "c.safetensors", "--to", "webui") == 0
    assert only(tmp_path / "c.safetensors").token == "c"
    for arguments, message in [
        ((source, target), "b.safetensors exists already"),
        ((source, "--to", "webui"), "--to and --token are for writing"),
        ((source, tmp_path / "d.pt", "--to", "lora"), "cannot be written as 'lora' with suffix '.pt'"),
        ((tmp_path / "none.pt",), "does not exist"),
    ]:
        capsys.readouterr()
        assert weights_command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("ldm-weights: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "d.pt").exists()


# Mistakes


def saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def weights(content: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_weights(path, content)


def chunk(text: bytes) -> Callable[[Path], None]:
    return lambda path: picture(path, base64.b64encode(text)) and None


class Canary:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a program": ("a.pt", saved(original({"*": Canary()})), "needs the global .*; the file was not run"),
    "a class": ("a.bin", saved({"<x>": nn.Linear(1, 1)}), "needs the global torch.nn.modules.linear.Linear"),
    "nothing": ("a.pt", lambda path: path.write_bytes(b""), "is empty"),
    "text": ("a.pt", lambda path: path.write_text("hello"), "is a text"),
    "half a file": (
        "a.safetensors",
        lambda path: (save_weights(path, {"<x>": ONE}), path.write_bytes(path.read_bytes()[:-9])),
        "is truncated",
    ),
    "no tensors": ("a.pt", saved(original({})), "holds no tensors by name"),
    "one bare tensor": ("a.pt", saved(ONE), "holds one Tensor and no table"),
    "an XL file": ("a.safetensors", weights({"clip_l": ONE, "clip_g": torch.ones(1, 1280)}), "Stable Diffusion XL"),
    "a LoRA": (
        "a.safetensors",
        weights({"a.lora_up.weight": torch.ones(8, 4), "a.lora_down.weight": torch.ones(4, 6)}),
        "is no embedding: it holds 2 tensors, such as a.lora",
    ),
    "a kernel": ("a.bin", saved({"conv": torch.ones(4, 3, 3, 3)}), "is no embedding: it holds 1 tensors"),
    "a number": ("a.bin", saved({"<x>": torch.tensor(1.0)}), "is no embedding"),
    "no vector": ("a.bin", saved({"<x>": torch.ones(0, 768)}), r"holds <x> of shape \(0, 768\)"),
    "whole numbers": ("a.bin", saved({"<x>": torch.ones(1, 768).long()}), "floating-point"),
    "not a number": ("a.safetensors", weights({"<x>": ONE.clone().fill_(torch.nan)}), "NaN or infinite .* <x>"),
    "no name": ("a.bin", saved({" ": ONE}), "names its word ' ', which no prompt can say"),
    "an odd name": ("a.bin", saved({"a\nb": ONE}), r"names its word 'a\\nb'"),
    "a picture": ("a.png", lambda path: Image.new("RGB", (9, 9), "red").save(path), "without an embedding"),
    "a black picture": ("a.png", lambda path: Image.new("RGB", (9, 9)).save(path), "without an embedding"),
    "no picture": ("a.png", lambda path: path.write_bytes(b"no"), "cannot be read"),
    "no base64": ("a.png", lambda path: picture(path, "%%"), "cannot be read"),
    "no JSON": ("a.png", chunk(b"{"), "embedding is damaged"),
    "a list": ("a.png", chunk(b"[]"), "its JSON is no object"),
    "no table": ("a.png", chunk(b"{}"), "has no 'string_to_param'"),
    "a ragged table": (
        "a.png",
        chunk(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [3]]}}}'),
        "embedding is damaged",
    ),
    "too deep": (
        "a.png",
        chunk(b'{"string_to_param": {"*": {"TORCHTENSOR": ' + b"[" * 99 + b"]" * 99 + b"}}}"),
        "embedding is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, message = BAD[case]
    make(tmp_path / name)
    warnings.simplefilter("error")  # pytest takes it back
    with pytest.raises(ValueError, match=message) as raised:
        read_embeddings(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("canary").exists()


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_embeddings(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_embeddings(tmp_path / "none.png")
    words = [Embedding("<s1>", ONE), Embedding("<s2>", ONE)]
    write_embeddings(tmp_path / "a.bin", words)
    with pytest.raises(ValueError, match=r"holds 2 words \(<s1>, <s2>\), so none can be renamed"):
        read_embeddings(tmp_path / "a.bin", "<x>")
    with pytest.raises(ValueError, match="cannot hold 2 words: the form original has one"):
        write_embeddings(tmp_path / "a.pt", words)
    with pytest.raises(
        ValueError, match="cannot be written as 'diffusers' with suffix '.ckpt'; known: diffusers"
    ):
        write_embeddings(tmp_path / "a.ckpt", words[:1])
    with pytest.raises(ValueError, match="cannot be written as 'webui' with suffix '.pt'"):
        write_embeddings(tmp_path / "a.pt", words[:1], "webui")
    save_weights(tmp_path / "x.safetensors", {"a": torch.ones(2, 3, 4)})
    with pytest.raises(NoEmbedding):
        read_embeddings(tmp_path / "x.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "x.safetensors"}
