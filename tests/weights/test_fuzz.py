"""Random damage to weight files of each form: they are read or refused in one line, and nothing else happens.

No other exception, no hang, no code run, little memory. Each run tries the same cases; LDM_FUZZ_SECONDS=60
tries new ones for about a minute.
"""

import itertools
import json
import math
import os
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import save_file
from test_source import Canary, memory_here, save

from ldm.weights.source import Source, open_source

SECONDS = float(os.environ.get("LDM_FUZZ_SECONDS", "0"))
TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5),
    "c": torch.tensor([0.5, 70000.0], dtype=torch.bfloat16),
}
FORMS = ("safetensors", "zip", "legacy", "zip canary", "legacy canary")
SHARE = 1 / 11  # of the time for each test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    set_hypothesis_home_dir(path / "hypothesis")  # else it writes into the checkout
    (path / "shard.safetensors").write_bytes(whole(path, "safetensors"))
    return path


@pytest.fixture(autouse=True)
def bounded_memory(folder: Path) -> Iterator[None]:
    measured = Path("/proc/self/clear_refs").exists()
    before = memory_here() if measured else 0
    yield
    assert not measured or memory_here("VmHWM") - before < 200e6


def whole(folder: Path, form: str) -> bytes:
    """A valid file, or one that makes a folder "canary" when its pickle is run."""
    path = folder / "whole"
    if form == "safetensors":
        save_file(TENSORS, path, metadata={"config": '{"n": [1, null]}', "name": "x"})
        return path.read_bytes()
    content: dict[str, Any] = {"state_dict": dict(TENSORS), "global_step": 3}
    if "canary" in form:
        content = {"evil": Canary(os.mkdir, str(folder / "canary")), **content}
    return save(path, content, form.split()[0]).read_bytes()


def probe(folder: Path, data: bytes) -> Source | None:
    """Open `data` as a file and read all of it; None where it was refused."""
    path = folder / "file"
    path.write_bytes(data)
    begun = time.perf_counter()
    try:
        source = open_source(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for options in ({}, {"dtype": torch.bfloat16, "allow_nan": True}):
                for name, tensor in source.read(source.entries, **options):
                    assert tensor.shape == source.entries[name].shape and tensor.is_contiguous()
                    tensor.sum() if tensor.numel() and tensor.dtype.itemsize > 1 else None  # within the mapping
        assert source.nbytes <= 16 * (len(data) + 1000)
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
    else:
        return source
    finally:
        assert not (folder / "canary").exists(), "the file was run"
        assert time.perf_counter() - begun < 5
    assert told.isprintable() and len(told) <= 1000
    return None


def fuzz(strategy: st.SearchStrategy[Any], examples: int, check: Callable[[Any], object]) -> None:
    """`check` on `examples` of `strategy`, always the same; or on new ones, until the time is over."""
    end = time.perf_counter() + SECONDS * SHARE
    for _ in itertools.count():

        @settings(
            max_examples=examples,
            derandomize=not SECONDS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(case: Any) -> None:
            check(case)

        run()
        if time.perf_counter() >= end:
            break


def test_the_undamaged_files_are_read(folder):
    for form in FORMS[:3]:
        source = probe(folder, whole(folder, form))
        assert source is not None and source.entries.keys() == TENSORS.keys()
    for form in FORMS[3:]:
        assert probe(folder, whole(folder, form)) is None


# Bytes put over others, put in, taken out, doubled, cut off; places are fractions of the file
NUMBERS = [struct.pack("<q", n) for n in (0, 1, -1, 2**31, 2**32 - 1, 2**62, -(2**63), 100_000_000)]
PLACES = st.integers(0, 999).map(lambda n: n / 1000)
BYTES = st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from([*NUMBERS, b"\0", b"\xff", b"PK\5\6"]))
CHANGES = st.lists(
    st.tuples(st.sampled_from("oooooidct"), PLACES, BYTES, st.integers(1, 64)), min_size=1, max_size=3
)


def changed(data: bytes, changes: list[tuple[str, float, bytes, int]]) -> bytes:
    for kind, place, new, length in changes:
        at = int(place * len(data))
        match kind:
            case "o":
                data = data[:at] + new + data[at + len(new) :]
            case "i":
                data = data[:at] + new + data[at:]
            case "d":
                data = data[:at] + data[at + length :]
            case "c":
                data = data[:at] + data[at : at + length] * 2 + data[at + length :]
            case "t":
                data = data[:at]
    return data


@pytest.mark.parametrize("form", FORMS)
def test_random_damage(form, folder):
    """Rows 1 to 3, at random."""
    data = whole(folder, form)
    fuzz(CHANGES, 120, lambda changes: probe(folder, changed(data, changes)))


TEXT = st.sampled_from(["", "a", "é", '"', "\\", "\n", "\0", "\x1b[2J", "\u2028", "\ud800", "😀", "x" * 3000])
NUMBER = st.sampled_from([-1, 0, 1, 2, 24, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, None, "x", [], {}])
SIZES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "BOOL": 1,
    "F8_E4M3": 1,
    "C64": 8,
    "F8_E8M0": 1,
    "F4": 1,
    "U16": 2,
}
TABLES = st.lists(
    st.tuples(TEXT, st.sampled_from(list(SIZES)), st.lists(st.integers(0, 3), max_size=4)), max_size=3
)
FAULTS = st.one_of(
    st.tuples(st.just("dtype"), st.one_of(st.sampled_from(list(SIZES)), NUMBER)),
    st.tuples(st.just("shape"), st.one_of(st.lists(NUMBER, max_size=4), NUMBER)),
    st.tuples(st.just("data_offsets"), st.one_of(st.lists(NUMBER, min_size=1, max_size=3), NUMBER)),
    st.tuples(st.sampled_from(["", "extra"]), NUMBER),
)


def test_random_headers(folder):
    """Row 3: shapes, offsets and formats that nobody would write, in one tensor of a file that is right else."""

    def check(case: tuple[list[tuple[str, str, list[int]]], tuple[str, Any], int, dict[str, Any]]) -> None:
        table, (field, value), off, metadata = case
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, dtype, shape in table:
            begin, end = end, end + SIZES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        if table and field:
            header[table[0][0]][field] = value
        text = json.dumps(header).encode()
        probe(folder, struct.pack("<q", len(text) + off) + text + bytes(end))

    off = st.sampled_from([0] * 12 + [1, -1, 2**40])
    metadata = st.dictionaries(TEXT, st.one_of(TEXT, TEXT, NUMBER), max_size=2)
    fuzz(st.tuples(TABLES, FAULTS, off, metadata), 250, check)


# Pieces of programs that torch's reader knows, or should refuse
SNIPPETS = st.sampled_from(
    [
        *(bytes([code]) for code in b"}])(tRbsuaeQN0.2\x85\x86\x87\x88\x89\x93\x94\x81\x8f\x95"),
        *(
            b"q\0",
            b"q\1",
            b"h\0",
            b"h\1",
            b"K\0",
            b"K\x0c",
            b"J\xff\xff\xff\x7f",
            b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        ),
        *(
            b"X%b%b" % (struct.pack("<I", len(text)), text)
            for text in (b"storage", b"0", b"cpu", b"a", b"posix", b"mkdir")
        ),
        b"cposix\nmkdir\n",
        b"cbuiltins\nexec\n",
        b"cbuiltins\nbytearray\n",
        b"ccollections\nOrderedDict\n",
        b"ccollections\nOrderedDict\n)R",
        b"ctorch\nFloatStorage\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nTensor\n",
        b"ctorch\nSize\n",
        b"ctorch\nfloat32\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x0ctQ",
        b"(X\x07\0\0\0storagectorch\nLongStorage\nX\x01\0\0\x001X\x03\0\0\0cpuK\x05tQ",
        b"K\0K\x03K\x04\x86K\x04K\x01\x86",
        b"K\0J\xff\xff\xff\x7fK\x04\x86K\0K\x01\x86",
    ]
)


def test_random_programs(folder):
    """Rows 1 and 2: an archive whose data.pkl was written, or changed, by somebody else."""
    data = whole(folder, "zip")
    (folder / "old").write_bytes(data)
    with zipfile.ZipFile(folder / "old") as old:
        records = {name: old.read(name) for name in old.namelist()}
    main = next(name for name in records if name.endswith("data.pkl"))

    def check(case: tuple[float, list[bytes], int]) -> None:
        place, snippets, taken = case
        program = records[main]
        at = int(place * len(program))
        program = program[:at] + b"".join(snippets) + program[at + taken :]
        with zipfile.ZipFile(folder / "new", "w") as new:
            for name, content in (records | {main: program}).items():
                new.writestr(name, content)
        probe(folder, (folder / "new").read_bytes())

    places = st.one_of(st.just(2 / len(records[main])), st.floats(0, 1))
    fuzz(st.tuples(places, st.lists(SNIPPETS, max_size=25), st.sampled_from([0, 0, 1, 7, 10**6])), 250, check)


def test_random_archives(folder):
    """Row 3: records left out, renamed, packed, doubled, lengthened."""
    (folder / "old").write_bytes(whole(folder, "zip"))
    with zipfile.ZipFile(folder / "old") as old:
        records = {name: old.read(name) for name in old.namelist()}
    names = [
        *records,
        "../evil",
        "/evil",
        "old/",
        "whole/data/7",
        "whole/constants.pkl",
        "other/data.pkl",
    ]

    def check(case: tuple[list[tuple[str, int, bool, bytes]], bytes]) -> None:
        changes, end = case
        with zipfile.ZipFile(folder / "new", "w") as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed_names = {name for name, times, _, _ in changes if times == 0}
            for name, content in records.items():
                if name not in changed_names:
                    new.writestr(name, content)
            for name, times, packed, more in changes:
                for _ in range(times):
                    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                    new.writestr(name, records.get(name, b"") + more, compress_type=method)
        probe(folder, (folder / "new").read_bytes() + end)

    change = st.tuples(
        st.sampled_from(names), st.integers(0, 2), st.booleans(), st.sampled_from([b"", b"x", bytes(10**6)])
    )
    fuzz(
        st.tuples(st.lists(change, max_size=3), st.sampled_from([b"", b"", b"\0", b"PK\5\6" + bytes(18)])),
        120,
        check,
    )


def test_random_bytes(folder):
    starts = st.sampled_from(
        [b"", b"PK\3\4", b"\x80\x02", b"\x80\x04", b"{", b"<", b"GGUF", b"\x08\x07\x12", bytes(7) + b"{"]
    )
    legacy = whole(folder, "legacy")[:40]
    cases = st.tuples(st.one_of(starts, st.just(legacy)), st.binary(max_size=400))
    fuzz(cases, 250, lambda case: probe(folder, b"".join(case)))


def test_random_indices(folder):
    """An index of shards that names what it should not."""
    shard = st.sampled_from(
        ["shard.safetensors", "file", "whole", "..", "/dev/zero", "../x", "nothing", "", 3, None, ["a"], {}]
    )
    where = st.dictionaries(st.one_of(st.sampled_from(list(TENSORS)), TEXT), shard, max_size=3)
    good = st.dictionaries(st.sampled_from(list(TENSORS)), st.just("shard.safetensors"), min_size=1)
    index = st.tuples(where, good, st.sampled_from(["weight_map"] * 9 + ["other"]), NUMBER)
    fuzz(
        index,
        150,
        lambda case: probe(folder, json.dumps({case[2]: case[0] | case[1], "metadata": case[3]}).encode()),
    )
