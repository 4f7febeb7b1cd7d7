"""Weight files of strangers: what is whole comes back bit for bit, lazily; what is not is refused in one line.

Rows are those of the project's table of faults. Memory is measured in processes of their own.
"""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.weights import source
from ldm.weights.io import save_weights
from ldm.weights.source import Entry, open_source

ROOT = Path(__file__).parents[2]
FORMS = ("zip", "legacy")
TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "single": torch.linspace(-3, 3, 24).reshape(2, 3, 4),
    "double": torch.tensor([1e300], dtype=torch.float64),
    "long": torch.tensor([[0, 1, 2**62]]),
    "flag": torch.tensor([True, False]),
    "byte": torch.tensor([7, 255], dtype=torch.uint8),
    "scalar": torch.tensor(0.18215),
    "none": torch.zeros(0, 3),
}


def save(path: Path, content: object, form: str = "zip") -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def read_all(path: Path, **options: object) -> dict[str, torch.Tensor]:
    opened = open_source(path)
    return dict(opened.read(opened.entries, **options))


def refused(path: Path, match: str | None = None) -> str:
    """The one line of the error with which opening, or else reading, `path` ends."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        read_all(path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


# What is whole


@pytest.mark.parametrize("name", ["zip.ckpt", "legacy.pt", "zip.safetensors", "weights.bin"])
def test_round_trip_is_bit_equal_whatever_the_suffix(name, tmp_path):
    path = tmp_path / name
    if name == "weights.bin":
        save_file(TENSORS, path, metadata={"n": "3", "name": "x"})
    else:
        save(
            path, {"state_dict": TENSORS, "global_step": 875000, "name": "x", "list": [1]}, name.split(".")[0]
        )
    opened = open_source(path)
    assert opened.entries == {key: Entry(value.shape, value.dtype) for key, value in TENSORS.items()}
    assert opened.nbytes == sum(value.nbytes for value in TENSORS.values())
    assert opened.path == path
    if name == "weights.bin":
        assert (opened.format, opened.metadata) == ("safetensors", {"n": 3, "name": "x"})
    else:
        assert (opened.format, opened.metadata) == ("pickle", {"global_step": 875000, "name": "x"})
    for order in (list(TENSORS), list(TENSORS)[::-2]):
        tensors = dict(opened.read(order))
        assert list(tensors) == order
        for key, value in tensors.items():
            assert type(value) is torch.Tensor and value.is_contiguous()
            assert torch.equal(value, TENSORS[key]) and value.dtype == TENSORS[key].dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda t: t, ["weight", "bias"]),
        (
            lambda t: {"state_dict": t, "other": torch.zeros(3), "optimizer_states": [{"state": {0: t}}]},
            ["weight", "bias"],
        ),
        (lambda t: {"model": t, "epoch": 3}, ["weight", "bias"]),
        (lambda t: {"params": {"worse": torch.zeros(1)}, "params_ema": t}, ["weight", "bias"]),
        (lambda t: {"model": "not a table", **t}, ["weight", "bias"]),
        (
            lambda t: {"string_to_token": {"*": 265}, "string_to_param": {"*": t["bias"]}, "name": "cat"},
            ["*"],
        ),
        (lambda t: list(t.values()), ["0", "1"]),
        (lambda t: {key: nn.Parameter(value) for key, value in t.items()}, ["weight", "bias"]),
    ],
)
def test_known_containers_are_looked_into(form, wrap, names, tmp_path):
    table = nn.Linear(2, 3).state_dict()  # an OrderedDict with an attribute, as all of them are
    opened = open_source(save(tmp_path / "file", wrap(table), form))
    assert list(opened.entries) == names
    found = dict(opened.read(names))
    assert all(not tensor.requires_grad for tensor in found.values())
    assert torch.equal(found[names[-1]], table["bias"])


def test_the_originals_embeddings_are_read(tmp_path):
    """A ParameterDict, of which only the tensors are taken; before torch 1.6 its source code came along."""
    vectors = torch.randn(2, 8)
    table = nn.ParameterDict({"*": nn.Parameter(vectors)})
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}
    assert torch.equal(read_all(save(tmp_path / "a.pt", content))["*"], vectors)
    refused(save(tmp_path / "b.pt", content, "legacy"), "holds the source code of a class, which is not run")


def test_any_dense_layout_is_read_and_a_view_with_gaps_is_not(tmp_path):
    kernel = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    matrix = torch.randn(4, 5)
    path = save(tmp_path / "file.pt", {"kernel": kernel, "matrix": matrix.T})
    for options in ({}, {"dtype": torch.float64}):
        found = read_all(path, **options)
        assert torch.equal(found["kernel"].float(), kernel) and found["kernel"].is_contiguous()
        assert torch.equal(found["matrix"].float(), matrix.T)
    for view in (matrix[:, :2], torch.ones(1).expand(10**9), matrix[::2]):
        refused(save(tmp_path / "view.pt", {"view": view}), "view.pt holds view, a view with gaps")


def test_tied_weights_share_storage_but_not_without_end(tmp_path):
    big = torch.randn(10_000)
    path = save(tmp_path / "tied.pt", {"a": big, "b": big, "tail": big[100:]})
    assert torch.equal(read_all(path)["tail"], big[100:])
    refused(save(tmp_path / "many.pt", {str(index): big for index in range(100)}), "far more than its")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
@pytest.mark.parametrize("name", ["zip.ckpt", "a.safetensors"])
def test_unconverted_tensors_are_views_of_the_mapped_file(name, tmp_path):
    path = tmp_path / name
    tensors = {"a": torch.randn(100_000), "b": torch.randn(3)}
    save_file(tensors, path) if "safe" in name else save(path, tensors)
    (_, tensor), *_ = open_source(path).read(["a"])
    spans = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if name in line
    ]
    assert any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in spans)
    tensor.zero_()  # a private copy: the file keeps its values
    assert torch.equal(read_all(path)["a"], tensors["a"])


@pytest.mark.parametrize("name", ["zip.ckpt", "legacy.pt", "a.safetensors"])
@pytest.mark.parametrize("piece", [64, source.PIECE])
def test_conversion_changes_floating_tensors_only(name, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PIECE", piece)  # several pieces a tensor, several mappings a file
    monkeypatch.setattr(source, "WINDOW", 4 * piece)
    path = tmp_path / name
    tensors = {key: value for key, value in TENSORS.items() if key != "double"}
    tensors |= {"long": torch.randint(0, 9, (7, 50)), "odd": torch.randn(201, 3)}
    save_file(tensors, path) if "safe" in name else save(path, tensors, name.split(".")[0])
    found = read_all(path, dtype=torch.bfloat16)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert found[key].dtype == expected.dtype and torch.equal(found[key], expected), key
    with pytest.raises(ValueError, match="floating formats only, not torch.int8"):
        read_all(path, dtype=torch.int8)


def test_float8_and_complex_tensors(tmp_path):
    tensors = {"e4": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn), "c": torch.tensor([1 + 2j])}
    for path in (save(tmp_path / "a.pt", tensors), tmp_path / "a.safetensors"):
        save_file(tensors, path) if path.suffix == ".safetensors" else None
        found = read_all(path, dtype=torch.float32)
        assert found["e4"].tolist() == [1.0, -448.0] and found["c"].tolist() == [1 + 2j]


def test_an_old_file_of_somebody_else(tmp_path):
    """lpips ships one of 2018, written by the first releases of torch."""
    lpips = importlib.util.find_spec("lpips")
    if lpips is None or lpips.origin is None:
        pytest.skip("needs lpips")
    found = read_all(Path(lpips.origin).parent / "weights" / "v0.1" / "vgg.pth")
    assert found["lin4.model.1.weight"].shape == (1, 512, 1, 1) and len(found) == 5


# Shards


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "m-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "m-00002-of-00002.safetensors")
    write_index(
        folder,
        a="m-00001-of-00002.safetensors",
        b="m-00001-of-00002.safetensors",
        c="m-00002-of-00002.safetensors",
    )
    return folder


def write_index(folder: Path, **where: object) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": where}))
    return path


def test_shards_are_read_through_their_index(shards):
    opened = open_source(shards / "m.safetensors.index.json")
    assert (opened.format, opened.metadata, opened.nbytes) == ("safetensors", {"total_size": 36}, 36)
    assert {key: value.sum().item() for key, value in opened.read(["c", "a", "b"])} == {
        "c": 8,
        "a": 2,
        "b": 0,
    }


def test_shards_may_be_pickles(tmp_path):
    for number, form in enumerate(FORMS):
        save(tmp_path / f"{form}.bin", {form: torch.full((3,), float(number))}, form)
    found = read_all(write_index(tmp_path, zip="zip.bin", legacy="legacy.bin"), dtype=torch.float16)
    assert found["zip"].tolist() == [0] * 3 and found["legacy"].tolist() == [1] * 3


def test_a_hubs_cache_of_links_is_read(shards, tmp_path):
    """There the names are links from a snapshot's folder to blobs that lie together elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in shards.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / shards.name / file.name)
    assert len(read_all(snapshot / "m.safetensors.index.json")) == 3


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/m.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        3,
        None,
        ["x"],
    ],
)
def test_shards_outside_the_folder_are_refused(name, shards):
    save_file({"c": torch.ones(1)}, shards.parent / "secret.safetensors")
    refused(write_index(shards, c=name), "index.json names the shard .*, which is not a plain file name")


def test_a_shard_that_links_elsewhere_is_refused(shards):
    save_file({"c": torch.ones(1)}, shards.parent / "secret.safetensors")
    (shards / "link.safetensors").symlink_to("../secret.safetensors")
    refused(write_index(shards, c="link.safetensors"), "link to another folder")


def test_shards_that_do_not_fit_their_index_are_refused(shards):
    first = "m-00001-of-00002.safetensors"
    refused(
        write_index(shards, a="m-00003-of-00002.safetensors"), "m-00003-of-00002.safetensors does not exist"
    )
    refused(write_index(shards, a=first, c=first), "names 1 tensors that are not in their shards, first c")
    refused(write_index(shards), "no weight_map")
    save(shards / "p.bin", {"p": torch.ones(1)})
    refused(write_index(shards, a=first, p="p.bin"), "shards of both formats")
    write_index(shards, a="n.safetensors.index.json")
    shutil.copy(shards / "m.safetensors.index.json", shards / "n.safetensors.index.json")
    refused(shards / "m.safetensors.index.json", "n.safetensors.index.json is a text")  # no index of an index


# What is no weight file


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><head>", "a web page, perhaps of a failed download"),
        (b"\n <HTML>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n",
            "git-lfs pointer .* run .git lfs pull",
        ),
        ("Zugriff verweigert – übel\n".encode(), "is a text"),
        (b'{"model_type": "clip"}', "JSON but no index of shards .it has no weight_map"),
        (b'{"a": 1', "JSON but no index"),
        (b'{"a":' * 100_000, "JSON but no index .* nested too deep"),
        (b"GGUF\3\0\0\0\0\0\0\0", "a GGUF file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "an ONNX model"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01\x00v\x00", "a NumPy array"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed by gzip"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"PK\5\6" + b"\0" * 18, "an empty zip archive"),
        (b"PK\3\4" + b"\0" * 500, "zip archive whose end is missing"),
        (bytes(range(200, 256)) * 3, "of an unknown kind"),
        (b"\x00" * 100, "not a safetensors file"),
    ],
)
def test_other_files_are_named_for_what_they_are(data, told, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path / "model.safetensors", rf"model\.safetensors .*{told}")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening one would wait for a writer
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(tmp_path / "fifo", "fifo is a pipe or a device")
    refused(Path("/dev/zero"), "a pipe or a device")
    refused(tmp_path, "is a folder; expected .safetensors")
    refused(tmp_path / "loop", "cannot be read: Too many levels")
    refused(Path("a\0b"), "cannot be read")
    refused(Path("x" * 5000), "cannot be read: File name too long")
    for name in ("dangling", "nothing.ckpt"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            open_source(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)
    refused(tmp_path / "a.safetensors", "cannot be read: Permission denied")


def test_other_archives_are_named_for_what_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as archive:
        archive.writestr("photos/1.jpg", b"x" * 500)
    refused(tmp_path / "photos.ckpt", "zip archive but not of torch.save; it holds 1.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "program.pt")
    refused(tmp_path / "program.pt", "TorchScript program")


def test_names_of_strangers_cannot_write_to_the_terminal(tmp_path):
    evil = "\x1b[2J\nroot#\u2028\ud800" + "x" * 5000
    line = refused(save(tmp_path / "a.pt", {evil: torch.ones(2)[::2].expand(5)}), "a view with gaps")
    assert len(line) <= 1000 and "?[2J root#" in line


# Damage and malice: safetensors


def safetensors(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "length 2^63": (safetensors({"a": entry(0, 4)}, b"1234", 2**63), "header claims"),
    "length above the limit": (safetensors({"a": entry(0, 4)}, b"1234", 100_000_001), "header claims"),
    "length above the file": (safetensors({"a": entry(0, 4)}, b"1234", 5000), "header claims"),
    "cut": (safetensors({"a": entry(0, 4)}, b"123"), "not a safetensors file"),
    "too long": (safetensors({"a": entry(0, 4)}, b"12345"), "not a safetensors file"),
    "overlap": (safetensors({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "not a safetensors file"),
    "same place": (safetensors({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "not a safetensors file"),
    "hole": (safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), "not a safetensors file"),
    "backwards": (safetensors({"a": entry(4, 0)}, b"1234"), "not a safetensors file"),
    "negative": (safetensors({"a": entry(-4, 0)}, b"1234"), "not a safetensors file"),
    "unknown format": (safetensors({"a": entry(0, 4, "F33")}, b"1234"), "unknown format F33"),
    "format no text": (safetensors({"a": {**entry(0, 4), "dtype": {}}}, b"1234"), "unknown format"),
    "absurd shape": (safetensors({"a": entry(0, 4, shape=[2**40, 2**40])}, b"1234"), "too large"),
    "overflowing shape": (safetensors({"a": entry(0, 0, shape=[2**61, 8, 0])}), "too large"),
    "shape of 2^64": (safetensors({"a": entry(0, 0, shape=[2**64, 0])}), "is none"),
    "negative shape": (safetensors({"a": entry(0, 4, shape=[-1, -1])}, b"1234"), "is none"),
    "fraction": (safetensors({"a": entry(0, 4, shape=[1.0])}, b"1234"), "is none"),
    "too many axes": (safetensors({"a": entry(0, 4, shape=[1] * 1000)}, b"1234"), "is none"),
    "shape and size differ": (safetensors({"a": entry(0, 4, shape=[2])}, b"1234"), "not a safetensors file"),
    "duplicate": (
        safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"),
        "names a twice",
    ),
    "no entry": (safetensors({"a": 3}), "entry for a is none"),
    "no object": (safetensors(b"[1]    "), "no object"),
    "no JSON": (safetensors(b"{\xff\xfe}  "), "not a safetensors file"),
    "deep": (safetensors(b'{"a":' * 50_000), "nested too deep"),
    "huge number": (safetensors(b'{"a":' + b"9" * 5000 + b"}"), "not a safetensors file"),
    "deep metadata": (safetensors({"__metadata__": {"a": {"b": 1}}}), "not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(case, tmp_path):
    """Row 3: in one line and at once."""
    data, told = BAD_HEADERS[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    begun = time.perf_counter()
    refused(tmp_path / "bad.safetensors", told)
    assert time.perf_counter() - begun < 1


def test_header_length_that_looks_like_another_file_is_no_matter(tmp_path):
    """A header of 640 bytes begins as a pickle does, one of 123 as JSON, one of 35,615 as gzip."""
    for length in (0x280, 0x7B, 0x8B1F, 0x207B):
        text = json.dumps({"a": entry(0, 4)}).encode().ljust(length)
        (tmp_path / "a").write_bytes(safetensors(text, struct.pack("<f", 2.5)))
        assert read_all(tmp_path / "a")["a"].item() == 2.5


def test_hostile_metadata_stays_text(tmp_path):
    texts = {"deep": "[" * 100_000, "digits": "9" * 5000, "json": '{"a": [1]}'}
    save_file(TENSORS, tmp_path / "a.safetensors", metadata=texts)
    assert open_source(tmp_path / "a.safetensors").metadata == {**texts, "json": {"a": [1]}}


# Damage and malice: pickles


class Canary:
    """Writes a file when its pickle is run."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.reduced


@pytest.mark.parametrize("form", [*FORMS, "plain 2", "plain 3", "plain 4", "plain 5"])
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda path: Canary(os.system, f"touch '{path}'"), "posix.system"),
        (lambda path: Canary(exec, f"open({str(path)!r}, 'w')"), "(__builtin__|builtins).exec"),
        (lambda path: Canary(eval, f"open({str(path)!r}, 'w')"), "(__builtin__|builtins).eval"),
        (lambda path: Canary(os.mkdir, str(path)), "posix.mkdir"),
        (lambda path: Canary(io.open, str(path), "w"), "_?io.open"),
        (lambda path: Canary(torch.save, 1, str(path)), "torch.serialization.save"),
        (lambda path: Canary(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    ],
)
def test_code_in_a_pickle_is_not_run(form, call, told, tmp_path):
    """Row 1: the error names what the file would have called; the canary stays absent."""
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(1)}, "evil": call(canary)}
    if form in FORMS:
        save(path, content, form)
    else:
        path.write_bytes(pickle.dumps(content["evil"], protocol=int(form[-1])))
    refused(path, f"model.ckpt needs the global {told}, .* was not run; ask for a .safetensors")
    assert not canary.exists()


def lightning(monkeypatch, name):
    """A class as the training framework of the original has it, in the module `name`."""
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return module.ModelCheckpoint


@pytest.mark.parametrize("form", FORMS)
def test_the_name_of_a_callback_in_the_originals_files_is_harmless(form, tmp_path, monkeypatch):
    """Stable Diffusion 1's own .ckpt files hold this one; the class is not imported, and not called."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = lightning(monkeypatch, name)
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": {callback: {"best": 0.5}}, "global_step": 7}
    path = save(tmp_path / "model.ckpt", content, form)
    called = save(tmp_path / "called.ckpt", {"a": callback()}, form)
    monkeypatch.delitem(sys.modules, name)
    source = open_source(path)
    assert dict(source.read(["a"]))["a"].tolist() == [1.0]
    assert source.metadata["global_step"] == 7
    assert name not in sys.modules
    refused(called, "instruction|calls|global")


@pytest.mark.parametrize("form", FORMS)
def test_foreign_classes_are_named(form, tmp_path, monkeypatch):
    """Row 2: training frameworks leave their classes in the files they write."""
    name = "pytorch_lightning.callbacks.other"
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": {lightning(monkeypatch, name): {"best": 0.5}}}
    path = save(tmp_path / "model.ckpt", content, form)
    refused(
        path, f"needs the global {name}.ModelCheckpoint, which .* ask for a .safetensors file, or convert"
    )
    refused(save(path, nn.Linear(1, 1), form), "global torch.nn.modules.linear.Linear")
    refused(
        save(path, {"a": nn.ParameterList([nn.Parameter(torch.ones(1))])}, form),
        "container.ParameterList",
    )


def test_there_is_no_other_way_in():
    """Row 2: nowhere is a pickle read without restriction (test_imports.py looks at the calls as well)."""
    for package in ("ldm", "sample", "train"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(
                r"weights_only\s*=\s*False|pickle\.load|import pickle\b", path.read_text()
            ), path


@pytest.mark.filterwarnings("ignore")  # of sparse and quantized tensors
@pytest.mark.parametrize("form", FORMS)
def test_other_tensors_than_dense_are_refused(form, tmp_path):
    path = tmp_path / "model.pt"
    refused(
        save(path, {"a": torch.eye(3).to_sparse()}, form), "sparse or quantized tensors .*_rebuild_sparse"
    )
    refused(
        save(path, {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, form), "quantized"
    )
    refused(save(path, torch.ones(1), form), "holds one Tensor and no table")
    refused(save(path, {"epoch": 3, "list": [torch.ones(1)]}, form), "no tensors by name, only epoch, list")
    refused(save(path, {}, form), "no tensors by name, only none")


def test_an_old_torch_reads_no_pickles(tmp_path, monkeypatch):
    """Row 1: torch 2.9 has a hole in its restricted reader. Safetensors do not need it."""
    path = save(tmp_path / "model.ckpt", TENSORS)
    save_file(TENSORS, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(path, "is a pickle, which torch 2.9.1.cpu reads unsafely; install 2.10 or newer")
    open_source(tmp_path / "model.safetensors")
    monkeypatch.setattr(torch, "__version__", "3.0.0a0")
    open_source(path)


@pytest.mark.parametrize("name", ["a.safetensors", "zip", "legacy"])
def test_any_cut_is_refused(name, tmp_path):
    """Row 3: at whatever byte a download stopped."""
    path = tmp_path / name
    tensors = {"a": torch.arange(10.0), "b": torch.ones(3)}
    save_file(tensors, path) if "safe" in name else save(path, {"state_dict": tensors}, name)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), *range(max(0, len(whole) - 30), len(whole))]:
        path.write_bytes(whole[:length])
        refused(path, name)
    path.write_bytes(whole + b"\0")
    refused(path, name)


def archive(
    path: Path, change: object = None, compression: int = zipfile.ZIP_STORED, **records: bytes
) -> Path:
    """A zip archive of torch, its records changed and written by another tool."""
    save(path, {"a": torch.arange(10.0)})
    with zipfile.ZipFile(path) as old:
        content = {name.split("/", 1)[1]: old.read(name) for name in old.namelist()}
    content |= {
        name.replace("_", ".", 1) if name == "data_pkl" else name: data for name, data in records.items()
    }
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(f"model/{name}", data)
    return path


def test_zip_bombs_are_not_inflated(tmp_path):
    path = archive(tmp_path / "a.pt")
    assert read_all(path)["a"].tolist() == list(range(10))  # another tool's archive is fine as such
    archive(path, compression=zipfile.ZIP_DEFLATED)
    refused(path, "packed, which torch.save does not do")
    archive(path, data_pkl=b"\0" * 50_000_000, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "packed")
    archive(path, data_pkl=b"\0" * 17_000_000)
    refused(path, "a pickle of 17000000 bytes")


def test_a_storage_must_be_as_long_as_claimed(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.arange(10.0)})
    with zipfile.ZipFile(path) as old:
        program = old.read("a/data.pkl")
    for numbers in (b"\x00", b"\x09", b"\x0b", b"\xff"):
        changed = program.replace(b"K\x0at", b"K" + numbers + b"t")
        assert changed != program
        archive(path, data_pkl=changed)
        refused(path, f"claims {numbers[0] * 4} bytes for storage 0 and holds 40")
    changed = program.replace(b"K\x0at", b"\x8a\x08" + b"\xff" * 7 + b"\x7ft")  # 2^63 - 1
    refused(archive(path, data_pkl=changed), "bytes for storage 0 and holds 40")
    changed = program.replace(b"K\x0a\x85", b"J\xff\xff\xff\x7f\x85")  # the shape alone
    refused(archive(path, data_pkl=changed), "is damaged")
    with zipfile.ZipFile(path, "a") as twice, pytest.warns(UserWarning, match="Duplicate"):
        twice.writestr("model/data.pkl", program)
    refused(path, "parts overlap")
    with zipfile.ZipFile(path, "a") as other:
        other.writestr("evil/data.pkl", program)
    refused(path, "out of place")


def test_archives_of_big_endian_machines_are_refused(tmp_path):
    refused(archive(tmp_path / "a.pt", byteorder=b"big"), "big-endian machine")


def program(*parts: bytes) -> bytes:
    """A pickle whose one dictionary has the value of `parts` as a key."""
    return b"\x80\x02}" + b"".join(parts) + b"K\x01s."


GROWTH = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100))
FLOOD = b"".join(b"\x8a\x09" + (n * (2**61 - 1)).to_bytes(9, "little") + b"Ns" for n in range(1, 9))
BIG = b"J\xff\xff\xff\x7f\x85R"
PROGRAMS = {
    "hashing visits 2^100 nodes": (program(GROWTH), "would grow without end"),
    "hashing overflows the stack": (program(b")" + b"\x85" * 100_000), "would grow without end"),
    "a tuple for a key": (program(b"K\x01K\x02\x86"), "keys are neither texts nor numbers"),
    "numbers of one hash": (b"\x80\x02}" + FLOOD + b".", "keys are neither texts nor numbers"),
    "growth in a call": (
        program(b"ccollections\nOrderedDict\n" + GROWTH + b"\x85R"),
        "would grow without end",
    ),
    "depth in a call": (
        program(b"ccollections\nOrderedDict\n]])" + b"\x85" * 100_000 + b"K\x01\x86aa\x85R"),
        "would grow without end",
    ),
    "2 GB of storage": (
        program(b"ctorch.storage\nUntypedStorage\n" + BIG),
        "calls torch.storage.UntypedStorage",
    ),
    "8 GB of storage": (program(b"ctorch\nFloatStorage\n" + BIG), "calls torch.FloatStorage, .* not run"),
    "a text is called": (program(b"X\x01\0\0\0a" + BIG), "calls a, "),
    "2 GB of bytes": (program(b"cbuiltins\nbytearray\n" + BIG), "needs the global builtins.bytearray"),
    "8 GB of tensor": (program(b"ctorch\nTensor\n" + BIG), "needs the global torch.Tensor"),
    "an object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses the pickle instruction NEWOBJ"),
    "an object of arguments": (
        b"\x80\x02ctorch.nn.modules.container\nParameterDict\nK\x01\x85\x81.",
        "uses the pickle instruction NEWOBJ",
    ),
    "a table of no parameters": (
        b"\x80\x02ctorch.nn.modules.container\nParameterDict\n)\x81}b.",
        "is damaged, or not of torch.save: '_parameters'",
    ),
    "a table that is called": (
        b"\x80\x02ctorch.nn.modules.container\nParameterDict\n)R.",
        "calls torch.nn.modules.container.ParameterDict",
    ),
    "a later protocol": (b"\x80\x04\x95\x02\0\0\0\0\0\0\0}\x94.", "uses the pickle instruction FRAME"),
    "holds itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "no tensors by name, only a"),
    "a list of itself": (b"\x80\x02]q\0h\0a.", "no tensors by name, only 0"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b".", "takes values that are not there"),
    "too few marks": (b"\x80\x02(tttttt.", "is damaged"),
    "4 GB of text": (b"\x80\x02X\xff\xff\xff\xffabc.", "is damaged"),
    "a huge number": (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "holds one int"),
    "nothing in memory": (b"\x80\x02h\x07.", "is damaged"),
    "no storage": (b"\x80\x02NQ.", "is damaged"),
    "nothing": (b"\x80\x02.", "takes values that are not there"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_malicious_programs_end_at_once(case, tmp_path):
    """Rows 1 and 3: no instruction may take long, or the memory, or the process."""
    parts, told = PROGRAMS[case]
    begun = time.perf_counter()
    refused(archive(tmp_path / "a.pt", data_pkl=parts), f"a.pt .*{told}")
    whole = save(tmp_path / "b.pt", {"a": torch.ones(1)}, "legacy").read_bytes()
    first = whole.index(b"\x80\x02}q\x00X\x01\0\0\0a")  # put before the fourth of its five pickles
    (tmp_path / "b.pt").write_bytes(whole[:first] + parts + whole[first:])
    refused(tmp_path / "b.pt", "b.pt (is|has|calls|needs|uses)")
    assert time.perf_counter() - begun < 2


def test_a_storage_has_one_length(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.arange(10.0), "b": torch.arange(9.0)})
    with zipfile.ZipFile(path) as old:
        both = old.read("a/data.pkl")
    refused(
        archive(path, data_pkl=both.replace(b"X\x01\0\0\x001", b"X\x01\0\0\x000")),
        "storage 0 with 36 and 40 bytes",
    )


def test_the_listing_of_an_archive_is_bounded(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.arange(10.0)})
    whole = bytearray(path.read_bytes())
    for at, size in ((-58, "<Q"), (-10, "<I")):  # in its long and in its short form
        changed = bytearray(whole) if size == "<Q" else bytearray(whole[:-98] + whole[-22:])
        struct.pack_into(size, changed, len(changed) + at, 20_000_000)
        path.write_bytes(changed)
        refused(path, "claims 20000000 bytes of names")


def test_an_old_file_must_hold_what_it_claims(tmp_path):
    """Rows 3: a storage left out of the list would come back with what happened to be in memory."""
    path = save(tmp_path / "a.pt", {"a": torch.arange(2.0)}, "legacy")
    whole = path.read_bytes()
    key = re.search(rb"\x80\x02\]q\x00X.\0\0\0(\d+)q\x01a\.", whole, re.DOTALL)
    assert key is not None
    path.write_bytes(whole[: key.start()] + b"\x80\x02]q\0." + whole[key.end() :])
    refused(path, "is damaged: it has .* bytes and claims")
    path.write_bytes(whole.replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85"))  # a shape beyond the storage
    refused(path)


# Values


@pytest.fixture(params=["a.safetensors", "zip", "legacy"])
def damaged(request, tmp_path):
    tensors = {
        "fine": torch.ones(3),
        "first": torch.tensor([1.0, float("nan"), float("inf")]),
        "ints": torch.tensor([1]),
        "second": torch.tensor([[float("-inf")]], dtype=torch.float16),
    }
    path = tmp_path / request.param
    save_file(tensors, path) if "safe" in request.param else save(path, tensors, request.param)
    return path


def test_not_finite_values_are_refused_before_anything_is_handed_out(damaged):
    """Row 6: the first tensor is named and all are counted; the rest of the file can be read."""
    opened = open_source(damaged)
    for dtype in (None, torch.float16):
        told = "2 tensors hold NaN or infinite values, the first is first .3 values in all.; the file is damaged; --allow-nan"
        with pytest.raises(ValueError, match=told):
            opened.read(opened.entries, dtype)
        with pytest.raises(
            ValueError, match="1 tensor holds NaN or infinite values, the first is second .1 values"
        ):
            opened.read(["fine", "second"], dtype)
        assert len(list(opened.read(["fine", "ints"], dtype))) == 2
        with pytest.warns(
            UserWarning, match="2 tensors hold NaN or infinite values, the first is first"
        ) as caught:
            found = dict(opened.read(opened.entries, dtype, allow_nan=True))
        assert len(caught) == 1
        assert found["first"].isnan().tolist() == [False, True, False] and found["second"].item() == float(
            "-inf"
        )


def test_values_beyond_the_format_are_refused(tmp_path):
    """Row 6: a cast must not make infinities of what the file holds."""
    tensors = {"low": torch.tensor([65519.0, -65519.0]), "high": torch.tensor([1.0, -70000.0])}
    save_weights(tmp_path / "a.safetensors", tensors)
    opened = open_source(tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"tensor high reaches 70000, beyond torch.float16 \(at most 65504\); .*bfloat16 or float32",
    ):
        opened.read(opened.entries, torch.float16)
    assert dict(opened.read(["low"], torch.float16))["low"].tolist() == [65504.0, -65504.0]
    assert dict(opened.read(["high"], torch.bfloat16))["high"][1] == -70144


def test_unknown_names_are_refused(tmp_path):
    """Row 5: by name, before anything is read."""
    save_weights(tmp_path / "a.safetensors", TENSORS)
    with pytest.raises(ValueError, match="holds no x, y; it holds 9 other tensors"):
        open_source(tmp_path / "a.safetensors").read(["half", "x", "y"])


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    for form in FORMS:
        path = save(tmp_path / form, {"a": torch.ones(4)}, form)
        opened = open_source(path)
        save(path, {"a": torch.ones(5)}, form)
        with pytest.raises(ValueError, match="changed while it was read: tensor a differs"):
            opened.read(["a"])


# Memory and time


PEAK = """
import json, struct, sys, time
import torch
from ldm.weights.source import open_source
path, action = sys.argv[1:]
torch.aminmax(torch.ones(9)), torch.ones(9).half()
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before, begun = memory("VmRSS"), time.perf_counter()
opened = open_source(path)
kept = {}
for name, tensor in opened.read(opened.entries, torch.float16):
    if action == "convert":
        kept[name] = tensor
print(json.dumps([memory("VmHWM") - before, time.perf_counter() - begun]))
"""
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


def peak(path: Path, action: str) -> tuple[int, float]:
    """Bytes that a fresh process needed beyond its start, and seconds."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), action], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    memory, seconds = json.loads(run.stdout)
    return memory, seconds


def sparse(path: Path, sizes: list[int]) -> Path:
    """A safetensors file of float32 zeros that takes no room on the disk."""
    header, begin = {}, 0
    for index, size in enumerate(sizes):
        header[f"tensor.{index}"] = entry(begin, begin + size, shape=[size // 4])
        begin += size
    data = safetensors(header)
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(len(data) + begin)
    return path


@linux
def test_opening_a_large_file_reads_its_header_only(tmp_path):
    """1 GB in well under a second and next to no memory."""
    path = sparse(tmp_path / "a.safetensors", [2**20] * 1000)
    open_source(path)
    before, begun = memory_here(), time.perf_counter()
    assert open_source(path).nbytes == 1000 * 2**20
    assert time.perf_counter() - begun < 0.5 and memory_here("VmHWM") - before < 30e6


@linux
@pytest.mark.parametrize("form", FORMS)
def test_opening_a_pickle_reads_no_tensors(form, tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.zeros(12_000_000)}, form)
    open_source(path)
    before = memory_here()
    assert open_source(path).nbytes == 48e6 and memory_here("VmHWM") - before < 20e6


@linux
@pytest.mark.parametrize(
    "data",
    [
        safetensors({}, claimed=2**63),
        safetensors(b"{" + b" " * 15_999_998 + b"["),
        safetensors(b'{"a":[' + b"{}," * 5_000_000),
        safetensors(b'{"a":[' + b'"b",' * 500_000),
        safetensors(b"{" + b",".join(b'"%x":0' % n for n in range(299_000)) + b"}"),
    ],
    ids=range(5),
)
def test_damaged_headers_cost_no_memory(data, tmp_path):
    """Row 3: below 200 MB and 1 s, whatever the header claims."""
    (tmp_path / "a").write_bytes(data)
    before, begun = memory_here(), time.perf_counter()
    refused(tmp_path / "a")
    assert time.perf_counter() - begun < 2  # twice the aim, for slow machines
    assert memory_here("VmHWM") - before < 200e6


def memory_here(key: str = "VmRSS") -> int:
    """Memory of this process in bytes; asked for the present one, its peak is counted from now on."""
    if key == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


@linux
@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "zip"])
def test_conversion_needs_the_memory_of_its_result(form, tmp_path):
    """600 MB of float32 as float16: 300 MB and a window; streamed, the window alone."""
    path = tmp_path / "a"
    sizes = [200_000_000, *[1_000_000] * 200, 200_000_000]
    if form == "safetensors":
        sparse(path, sizes)
    else:
        with torch.serialization.skip_data():  # writes holes in place of the values
            save(path, {f"t{index}": torch.empty(size // 4) for index, size in enumerate(sizes)})
    memory, _ = peak(path, "convert")
    assert memory < 1.1 * 300e6 + 300e6
    memory, _ = peak(path, "stream")
    assert memory < 100e6 + 300e6 + 50e6  # the largest tensor, the one before, the window
