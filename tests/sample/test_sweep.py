"""Sweeps: each cell as the plain command makes it, the table, the labelled grids, every mistake told first."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.config import configs_folder, find_config
from sample import sweep
from sample.__main__ import main
from sample.images import read_parameters
from sample.sweep import GAP, TEXT, Sweep, labelled, read_sweep

SIDE = 32  # pixels of the tiny model's pictures


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def write(folder: Path, model: Path, **config: Any) -> Path:
    """A sweep of two steps on the CPU."""
    options = {"model": str(model), "device": "cpu", "steps": 2, **config.pop("options", {})}
    options = {name: value for name, value in options.items() if name not in config.get("axes", {})}
    path = folder / "sweep é.yaml"
    text = yaml.safe_dump({"options": options, **config}, allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def run(config: Path, out: Path) -> list[dict[str, str]]:
    """Runs it; the rows of the table."""
    assert main(["sweep", str(config), "--out", str(out)]) == 0
    with open(out / "sweep.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_hand(model: Path, out: Path, *arguments: str) -> np.ndarray:
    """The first picture of the plain command."""
    common = ["--model", str(model), "--device", "cpu", "--steps", "2", "--out", str(out)]
    assert main([*arguments, *common]) == 0
    return pixels(out / "00000.png")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models loaded by a sweep."""
    seen: list[str] = []
    plain = sweep.load_pipeline

    def load(args: Any) -> Any:
        seen.append(args.model)
        return plain(args)

    monkeypatch.setattr(sweep, "load_pipeline", load)
    return seen


def test_two_axes(model: Path, tmp_path: Path, loads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    axes = {"guidance": [1, 4], "sampler": ["ddim", "euler_ancestral"]}
    config = write(tmp_path, model, prompts=["an apple"], options={"seed": 3}, axes=axes)
    rows = run(config, out)
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(out / "sweep.csv"), str(out / "grid-0000.png")]
    assert loads == [str(model)]
    assert list(rows[0]) == ["guidance", "sampler", "seconds", "files"]
    expected = [("1", "ddim"), ("1", "euler_ancestral"), ("4", "ddim"), ("4", "euler_ancestral")]
    assert [(row["guidance"], row["sampler"]) for row in rows] == expected
    assert [row["files"] for row in rows] == [f"0000{i}.png" for i in range(4)]
    assert all(float(row["seconds"]) > 0 for row in rows)
    sheet, made = pixels(out / "grid-0000.png"), [pixels(out / row["files"]) for row in rows]
    for i, row in enumerate(rows):
        options = ["--seed", "3", "--guidance", row["guidance"], "--sampler", row["sampler"]]
        assert np.array_equal(made[i], by_hand(model, tmp_path / str(i), "txt2img", "an apple", *options))
        p = read_parameters(out / row["files"])
        assert p == read_parameters(tmp_path / str(i) / "00000.png")
    assert len({each.tobytes() for each in made}) == 4
    # The first axis runs along the columns; each picture stands whole on the sheet
    rows_of_sheet = sheet[: -GAP - SIDE], sheet[-GAP - SIDE :]
    assert [[holds(part, each) for each in made] for part in rows_of_sheet] == [
        [True, False, True, False], [False, True, False, True]
    ]  # fmt: skip
    assert read_parameters(out / "grid-0000.png")["sweep"]["axes"] == axes
    assert main(["again", str(out / "00001.png"), "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), made[1])


def test_one_axis_of_prompts(model: Path, tmp_path: Path) -> None:
    prompts = ["an apple", "ein Äpfelchen\n🍎"]
    out = tmp_path / "out"
    rows = run(write(tmp_path, model, axes={"prompt": prompts}), out)
    assert [row["prompt"] for row in rows] == prompts
    for i, prompt in enumerate(prompts):
        assert read_parameters(out / rows[i]["files"])["prompt"] == prompt
        made = by_hand(model, tmp_path / str(i), "txt2img", prompt)
        assert np.array_equal(pixels(out / rows[i]["files"]), made)


def test_three_axes_and_several_prompts(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    axes = {"seed": [1, 2], "negative": ["a fish"], "guidance-rescale": [0, 0.5]}
    rows = run(write(tmp_path, model, prompts=["a", "b"], axes=axes), out)
    assert [(row["seed"], row["guidance-rescale"]) for row in rows] == [
        ("1", "0"), ("1", "0.5"), ("2", "0"), ("2", "0.5")
    ]  # fmt: skip
    assert [len(row["files"].split()) for row in rows] == [2] * 4
    pages = sorted(out.glob("grid-*.png"))
    assert len(pages) == 2  # a value of the third axis each
    for page, path in enumerate(pages):
        sheet = pixels(path)
        for column in range(2):
            files = rows[2 * column + page]["files"].split()
            both = np.concatenate([pixels(out / file) for file in files], axis=1)
            assert holds(sheet, both)
            other = rows[2 * column + 1 - page]["files"].split()
            assert not holds(sheet, pixels(out / other[0]))


def test_a_weaker_model_is_loaded_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the check of all cells and for the cells; each picture is the plain command's."""
    loads: list[str] = []
    plain = sweep.weaker_of

    def load(args: Any) -> Any:
        loads.append(args.autoguide)
        return plain(args)

    monkeypatch.setattr(sweep, "weaker_of", load)
    axes = {"guidance": [2, 3], "seed": [1, 2]}
    config = write(tmp_path, model, options={"autoguide": str(model)}, prompts=["a"], axes=axes)
    out = tmp_path / "out"
    rows = run(config, out)
    assert loads == [str(model)]
    monkeypatch.undo()
    options = ["--autoguide", str(model), "--guidance", "3", "--seed", "2"]
    made = by_hand(model, tmp_path / "hand", "txt2img", "a", *options)
    assert np.array_equal(pixels(out / rows[3]["files"]), made)


def holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture stands somewhere on a sheet, pixel by pixel."""
    height, width = picture.shape[:2]
    corners = np.argwhere((sheet[: sheet.shape[0] - height + 1, : sheet.shape[1] - width + 1]
                           == picture[0, 0]).all(axis=-1))  # fmt: skip
    return any(np.array_equal(sheet[y : y + height, x : x + width], picture) for y, x in corners)


def test_pictures_and_masks(model: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "--in é.png")
    Image.fromarray((np.arange(40) > 20).repeat(32).reshape(40, 32).T).save(tmp_path / "mask.png")
    files = [str(tmp_path / "--in é.png"), str(tmp_path / "mask.png")]
    axes = {"strength": [0.4, 1]}
    out = tmp_path / "img2img"
    rows = run(write(tmp_path, model, command="img2img", files=files[:1], prompts=["a"], axes=axes), out)
    for i, row in enumerate(rows):
        arguments = ["img2img", files[0], "a", "--strength", row["strength"]]
        made = by_hand(model, tmp_path / f"i{i}", *arguments)
        assert np.array_equal(pixels(out / row["files"]), made)
    out = tmp_path / "inpaint"
    axes = {"paste": [True, False]}
    rows = run(write(tmp_path, model, command="inpaint", files=files, prompts=["a"], axes=axes), out)
    made = by_hand(model, tmp_path / "p", "inpaint", *files, "a", "--no-paste")
    assert np.array_equal(pixels(out / rows[1]["files"]), made)
    assert not np.array_equal(pixels(out / rows[0]["files"]), made)


def test_each_model_is_loaded_once(model: Path, tmp_path: Path, loads: list[str]) -> None:
    """Even where the axis of the models is not the slowest; the table keeps the order of the axes."""
    other = tmp_path / "other"
    other.symlink_to(model)
    axes = {"seed": [0, 1], "model": [str(model), str(other)]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"options": {"device": "cpu", "steps": 1}, "axes": axes}, sort_keys=False))
    rows = run(path, tmp_path / "out")
    assert loads == [str(model), str(other)]
    assert [(row["seed"], row["model"]) for row in rows] == [
        (seed, name) for seed in ("0", "1") for name in (str(model), str(other))
    ]
    for row in rows:
        p = read_parameters(tmp_path / "out" / row["files"])
        assert (str(p["seed"]), p["model"]) == (row["seed"], row["model"])


def test_other_forms_of_options(model: Path, tmp_path: Path) -> None:
    """Null is the default, a list gives an option several times, a file may give the prompts."""
    (tmp_path / "prompts.txt").write_text("a pear\n")
    options = {"prompts_file": str(tmp_path / "prompts.txt"), "sampler": "unipc"}
    axes = {"schedule": [None, "karras"], "sampler_option": [["order=2", "variant=bh1"]]}
    out = tmp_path / "out"
    rows = run(write(tmp_path, model, options=options, axes=axes), out)
    told = [read_parameters(out / row["files"]) for row in rows]
    assert [p.get("schedule") for p in told] == [None, "karras"]
    assert [(p["prompt"], p["sampler_option"]) for p in told] == [("a pear", ["order=2", "variant=bh1"])] * 2


def test_warnings_are_told_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"guidance": [1, 2], "seed": [0, 1]}
    run(write(tmp_path, model, prompts=["a"], options={"negative": "b"}, axes=axes), tmp_path / "out")
    assert capsys.readouterr().err == "ldm-sample: warning: --negative has no effect with --guidance 1\n"


def test_forms_of_the_model(model: Path, tmp_path: Path) -> None:
    """The network in the form each cell asks for, whatever the cell before asked for."""
    out = tmp_path / "out"
    axes = {"deep_cache": ["2", None], "token_merging": [0.5, 0]}
    rows = run(write(tmp_path, model, prompts=["a"], axes=axes), out)
    made = [pixels(out / row["files"]) for row in rows]
    assert len({each.tobytes() for each in made}) == 4
    for i, options in enumerate((["--deep-cache", "2", "--token-merging", "0.5"], ["--deep-cache", "2"])):
        assert np.array_equal(made[i], by_hand(model, tmp_path / str(i), "txt2img", "a", *options))
    assert np.array_equal(made[3], by_hand(model, tmp_path / "3", "txt2img", "a"))


def test_what_is_done_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After CTRL-C: the pictures made, and the table of these."""
    plain, made = sweep.make, []

    def make(command: str, args: Any, pipe: Any, weak: Any, dry: bool = False) -> Any:
        made.append(dry)
        if made.count(False) == 3:
            raise KeyboardInterrupt
        return plain(command, args, pipe, weak, dry)

    monkeypatch.setattr(sweep, "make", make)
    config = write(tmp_path, model, axes={"seed": [0, 1, 2, 3]})
    assert main(["sweep", str(config), "--out", str(tmp_path / "out")]) == 130
    assert made == [True] * 4 + [False] * 3  # all is checked first
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.png", "00001.png", "sweep.csv"]
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) == 3


def test_labels() -> None:
    """Pictures of two sizes in three rows: labels above and to the left, on white, and no picture is touched."""
    cells = [[Image.effect_noise((40 - 8 * j, 24), 90).convert("RGB") for _ in range(2)] for j in range(3)]
    rows = ["steps 1", "steps 20", "steps 300"]
    sheet = np.array(labelled(cells, ["a long name of a column", "b"], rows, "seed 4"))
    blank = np.array(labelled(cells, ["", ""], ["", "", ""], ""))
    top = 2 * (TEXT + 2 * GAP)
    assert (blank[: TEXT + 2 * GAP] == 255).all()
    assert (blank[:, : 2 * GAP] == 255).all()
    left = next(x for x in range(sheet.shape[1]) if np.array_equal(
        sheet[top : top + 24, x : x + 40], np.array(cells[0][0])
    ))  # fmt: skip
    assert left > 50  # "steps 300"
    second = next(x for x in range(left + 40, sheet.shape[1]) if np.array_equal(
        sheet[top : top + 24, x : x + 40], np.array(cells[0][1])
    ))  # fmt: skip
    assert second - left > 100  # "a long name of a column"
    for j in range(3):
        y = top + j * (24 + GAP)
        for x, cell in zip((left, second), cells[j], strict=True):
            assert np.array_equal(sheet[y : y + 24, x : x + cell.width], np.array(cell))
        assert (sheet[y : y + 24, :left] < 128).any()  # black letters beside the row
    assert (sheet[: top // 2] < 128).any()  # the title
    for x in (left, second):
        assert (sheet[top // 2 : top, x : x + 20] < 128).any()  # above its column


def test_the_shipped_sweep() -> None:
    found = read_sweep("configs/sample/sweep.yaml")
    assert (found.command, list(found.axes)) == ("txt2img", ["guidance", "sampler"])
    assert (configs_folder() / "sample" / "sweep.yaml").is_file()
    assert isinstance(found, Sweep) and find_config("configs/sample/sweep.yaml").is_file()
    first = {name: values[0] for name, values in found.axes.items()}
    parsed = sweep.arguments(found, first, Path("out"))
    assert (parsed.guidance, parsed.sampler, parsed.steps, parsed.out) == (1.0, "ddim", 20, "out")


AXES = {"guidance": [1, 2]}


@pytest.mark.parametrize(("config", "message"), [
    ({"axes": {"gidance": [1]}}, "txt2img has no option --gidance"),
    ({"axes": AXES, "options": {"strength": 0.5}}, "txt2img has no option --strength"),
    ({"axes": AXES, "options": {"prompts": "a"}}, "txt2img has no option --prompts"),
    ({"axes": AXES, "command": "txt2mg"}, "command must be one of txt2img, img2img"),
    ({"axes": AXES, "command": "img2img"}, "img2img takes 1 files (init), got 0"),
    ({"axes": AXES, "files": ["a.png"]}, "txt2img takes 0 files (none), got 1"),
    ({"axes": {}}, "axes must be one to three options with their values, got 0"),
    ({}, "axes must be one to three options with their values, got 0"),
    ({"axes": {name: [1] for name in ("seed", "steps", "guidance", "eta")}}, "one to three options"),
    ({"axes": {"guidance": []}}, "axes.guidance must be a list of values, got []"),
    ({"axes": {"guidance": 3}}, "axes.guidance must be a list of values, got 3"),
    ({"axes": {"guidance": [1, "much"]}}, "argument --guidance: invalid float value: 'much'"),
    ({"axes": {"guidance": [1, float("nan")]}}, "guidance scale must be a finite number, got nan"),
    ({"axes": {"steps": [2, 0]}}, "steps must be between 1 and 1000, got 0"),
    ({"axes": {"steps": [2, True]}}, "argument --steps: invalid int value: 'True'"),
    ({"axes": {"sampler": ["ddim", "eulr"]}}, "unknown sampler 'eulr'"),
    ({"axes": {"schedule": ["karras", "kara"]}}, "schedule"),
    ({"axes": {"size": ["32x32", "30x32"]}}, "the nearest is 32x32"),
    ({"axes": {"tile": [8, 0]}}, "--tile must be at least 1 latent cell, got 0"),
    ({"axes": {"eta": [0, 1]}, "options": {"sampler": "euler"}}, "eta"),
    ({"axes": {"guidance_rescale": [0.1]}, "options": {"guidance-rescale": 0}}, "is an axis and a fixed"),
    ({"axes": {"prompt": ["a"]}, "prompts": ["b"]}, "prompts and an axis prompt exclude each other"),
    ({"axes": AXES, "options": {"out": "x"}}, "out and n are not for sweeps"),
    ({"axes": {"n": [1, 2]}}, "out and n are not for sweeps"),
    ({"axes": AXES, "option": {"seed": 1}}, "unknown key option; did you mean options?"),
    ({"axes": AXES, "options": {"prompts_file": "/nowhere.txt"}}, "/nowhere.txt: is missing"),
])  # fmt: skip
def test_mistakes_are_one_line_before_any_work(
    model: Path, tmp_path: Path, config: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, pipe: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(sweep, "load_pipeline", lambda args: pipe)
    path = write(
        tmp_path, model, **{"prompts": ["a"] if "prompt" not in config.get("axes", {}) else [], **config}
    )
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert message in told.err and told.err.startswith("ldm-sample: error: ")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"bad.yaml": "axes: [", "list.yaml": "- a", "none.yaml": None}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        assert main(["sweep", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert name in told.err
    assert not (tmp_path / "out").exists()
