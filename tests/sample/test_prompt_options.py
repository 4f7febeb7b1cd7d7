"""Where prompts come from, by the command: files, studies, wildcards, shares; and no prompt at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from sample import txt2img
from sample.__main__ import main
from sample.commands import MAKERS
from sample.images import read_parameters, to_pil, to_tensor
from sample.pipeline import Pipeline
from sample.prompt_sources import expand
from sample.settings import Wording

PIXEL = 2 / 255


@pytest.fixture(autouse=True)
def loaded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, not read anew for each command."""
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: pipe)


def run(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """Runs txt2img on two steps; what the pictures' text chunks say."""
    common = ["--out", str(out), "--device", "cpu", "--steps", "2", "--seed", "3"]
    assert main(["txt2img", *map(str, arguments), *common]) == 0
    return [read_parameters(path) for path in sorted(out.glob("0*.png"))]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def again(picture: Path, out: Path) -> None:
    assert main(["again", str(picture), "--out", str(out)]) == 0
    assert np.array_equal(pixels(out / "00000.png"), pixels(picture))
    assert read_parameters(out / "00000.png") == read_parameters(picture)


def image(path: Path) -> Any:
    return to_tensor(Image.open(path))


# --- a file of prompts --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prömpts.txt"
    path.write_text("# comment\n  ein Äpfelchen 🍎\n\na fish\n", encoding="utf-8")
    return path


def test_a_file_of_prompts(file: Path, tmp_path: Path) -> None:
    """After those of the command line, each -n times; the pictures are those of prompts that were typed."""
    told = run(tmp_path / "a", "a cat", "--prompts-file", file, "-n", 2)
    prompts = ["a cat"] * 2 + ["ein Äpfelchen 🍎"] * 2 + ["a fish"] * 2
    assert [p["prompt"] for p in told] == prompts
    assert [p["image"] for p in told] == list(range(6))
    assert all("prompts_file" not in p for p in told)
    run(tmp_path / "b", "a cat", "ein Äpfelchen 🍎", "a fish", "-n", 2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    file.unlink()  # what the text says is enough
    again(tmp_path / "a" / "00003.png", tmp_path / "again")
    assert main(["again", str(tmp_path / "a" / "grid-0000.png"), "--out", str(tmp_path / "grid")]) == 0
    assert np.array_equal(
        pixels(tmp_path / "grid" / "grid-0000.png"), pixels(tmp_path / "a" / "grid-0000.png")
    )


def test_a_file_alone(file: Path, tmp_path: Path) -> None:
    assert [p["prompt"] for p in run(tmp_path / "a", "--prompts-file", file)] == [
        "ein Äpfelchen 🍎",
        "a fish",
    ]


# --- a study ------------------------------------------------------------------------------------------------

STUDY = """
subject: [an apple, a fish]
artist: [Van Gogh, ""]
negative: [blurry, ""]
template: "{subject}, by {artist}"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "stüdy.yaml").write_text(STUDY, encoding="utf-8")
    return tmp_path / "stüdy.yaml"


def test_a_study(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of its fields, the negative prompt fastest; where it has none, that of --negative."""
    told = run(tmp_path / "a", "--study", study, "--negative", "a cat", "--batch", 3)
    texts = ["an apple, by Van Gogh", "an apple", "a fish, by Van Gogh", "a fish"]
    expected = [(text, negative) for text in texts for negative in ("blurry", "a cat")]
    assert [(p["prompt"], p["negative"]) for p in told] == expected
    assert [p["image"] for p in told] == list(range(8))
    for number in (2, 3):
        text, negative = expected[number]
        run(tmp_path / str(number), text, "--negative", negative, "--first", number)
        one, of_study = tmp_path / str(number) / "00000.png", tmp_path / "a" / f"0000{number}.png"
        assert_close(image(one), image(of_study), rtol=0, atol=PIXEL)  # batches are of one negative prompt
    assert not np.array_equal(pixels(tmp_path / "2" / "00000.png"), pixels(tmp_path / "3" / "00000.png"))
    sheet, cells = pixels(tmp_path / "a" / "grid-0000.png"), [
        pixels(tmp_path / "a" / f"0000{i}.png") for i in range(8)
    ]  # fmt: skip
    at = [
        np.array_equal(sheet[2 + 34 * i : 34 + 34 * i, 2:34], cells[i]) for i in range(sheet.shape[0] // 34)
    ]
    across = [
        np.array_equal(sheet[2:34, 2 + 34 * i : 34 + 34 * i], cells[i]) for i in range(sheet.shape[1] // 34)
    ]
    assert all(at) or all(across)  # the pictures in the order of the prompts
    study.unlink()
    again(tmp_path / "a" / "00005.png", tmp_path / "again")
    capsys.readouterr()
    assert main(["again", str(tmp_path / "a" / "grid-0000.png"), "--out", str(tmp_path / "grid")]) == 2
    told_last = capsys.readouterr().err
    assert "of this grid's pictures differ: make them again one by one" in told_last
    assert told_last.count("\n") == 1 and not (tmp_path / "grid").exists()


def test_a_grid_of_one_negative_prompt_again(study: Path, tmp_path: Path) -> None:
    """That of the study, not the one of the command line, which had no say."""
    study.write_text(STUDY.replace('[blurry, ""]', "[blurry]"), encoding="utf-8")
    run(tmp_path / "a", "--study", study, "--negative", "a cat")
    grid = tmp_path / "a" / "grid-0000.png"
    assert read_parameters(grid)["negative"] == "blurry"
    assert main(["again", str(grid), "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(pixels(tmp_path / "b" / "grid-0000.png"), pixels(grid))


def test_the_pictures_of_a_study_in_batches(study: Path, tmp_path: Path) -> None:
    """The same whatever is made at once."""
    arguments = ["--study", study, "-n", 2]
    one, four = run(tmp_path / "1", *arguments, "--batch", 1), run(tmp_path / "4", *arguments, "--batch", 4)
    assert [p["prompt"] for p in one] == [p["prompt"] for p in four]
    for i in range(len(one)):
        name = f"{i:05d}.png"
        assert_close(image(tmp_path / "1" / name), image(tmp_path / "4" / name), rtol=0, atol=PIXEL)


# --- wildcards ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wild é").mkdir()
    (tmp_path / "wild é" / "fruit.txt").write_text("apple\npear\nbanana\ncherry\nfig\n")
    return tmp_path / "wild é"


def test_wildcards(folder: Path, tmp_path: Path) -> None:
    """Picture i says the same however the pictures are made, and its text tells what; also its negative one."""
    prompt, negative = "a {red|green|blue} __fruit__", "__fruit__"
    arguments = [prompt, "--negative", negative, "--wildcards", folder]
    four = run(tmp_path / "4", *arguments, "-n", 6)
    assert [p["prompt"] for p in four] == [expand(prompt, 3, i, folder) for i in range(6)]
    assert [p["negative"] for p in four] == [expand(negative, 3, i, folder) for i in range(6)]
    assert len({p["prompt"] for p in four}) > 2
    one = run(tmp_path / "1", *arguments, "-n", 6, "--batch", 1)
    later = run(tmp_path / "later", *arguments, "-n", 2, "--first", 4)
    said = [(p["prompt"], p["negative"], p["image"]) for p in four]
    assert [(p["prompt"], p["negative"], p["image"]) for p in one] == said
    assert [(p["prompt"], p["negative"], p["image"]) for p in later] == said[4:]
    for i in range(6):
        name = f"{i:05d}.png"
        assert_close(image(tmp_path / "1" / name), image(tmp_path / "4" / name), rtol=0, atol=PIXEL)
    assert all("wildcards" not in p for p in four)


def test_again_needs_no_folder(folder: Path, tmp_path: Path) -> None:
    told = run(tmp_path / "a", "a __fruit__ \\{as it is\\}", "--wildcards", folder, "-n", 2)
    assert told[0]["prompt"].endswith(" {as it is}")
    (folder / "fruit.txt").unlink()
    again(tmp_path / "a" / "00001.png", tmp_path / "again")
    grid = tmp_path / "a" / "grid-0000.png"
    assert read_parameters(grid)["prompts"] == [p["prompt"] for p in told]
    assert main(["again", str(grid), "--out", str(tmp_path / "grid")]) == 0
    for name in ("00000.png", "00001.png"):
        assert np.array_equal(pixels(tmp_path / "grid" / name), pixels(tmp_path / "a" / name))


def test_without_the_option_braces_are_text(folder: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "a", "a {red|green} __fruit__")[0]["prompt"] == "a {red|green} __fruit__"


def test_a_file_may_hold_wildcards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a __fruit__\na __fruit__\n")
    told = run(tmp_path / "a", "--prompts-file", tmp_path / "p.txt", "--wildcards", folder)
    assert [p["prompt"] for p in told] == [expand("a __fruit__", 3, i, folder) for i in range(2)]


# --- shares -------------------------------------------------------------------------------------------------


def test_shares(pipe: Pipeline, tmp_path: Path) -> None:
    """Van Gogh:3 AND Monet:2 is 0.6 and 0.4; without the option the weights are as they stand."""
    prompt = "Van Gogh:3 AND Monet:2"
    assert run(tmp_path / "a", prompt, "--shares")[0]["shares"] is True
    assert "shares" not in run(tmp_path / "b", "Van Gogh:0.6 AND Monet:0.4")[0]
    run(tmp_path / "c", prompt)
    shares, typed, plain = (image(tmp_path / name / "00000.png") for name in "abc")
    assert_close(shares, typed, rtol=0, atol=PIXEL)
    assert (plain - shares).abs().max() > 10 * PIXEL
    how: dict[str, Any] = {"steps": 2, "seed": 3, "wording": Wording(syntax="webui", shares=True)}
    expected = to_pil(pipe.txt2img(prompt, **how))[0]
    assert np.array_equal(pixels(tmp_path / "a" / "00000.png"), np.array(expected))
    again(tmp_path / "a" / "00000.png", tmp_path / "again")


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", MAKERS)
def test_no_prompt_at_all(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [str(tmp_path / "nowhere.png")] * {"txt2img": 0, "inpaint": 2}.get(command, 1)
    if command == "upscale":  # needs none
        assert main([command, *files, "--out", str(tmp_path / "out")]) == 2
        assert "nowhere.png: no such file" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as caught:
        main([command, *files, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"ldm-sample: error: the following arguments are required: PROMPT; see ldm-sample {command} --help\n"
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompts-file", "nowhere.txt"], "nowhere.txt: is missing, not a text file"),
    (["--prompts-file", "."], ".: is a folder, not a text file"),
    (["--prompts-file", "empty.txt"], "empty.txt: holds no prompt"),
    (["--prompts-file", "latin.txt"], "latin.txt:1: not UTF-8 text"),
    (["--study", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
    (["--study", "typo.yaml"], "typo.yaml: unknown key subjct; did you mean subject?"),
    (["--study", "bad.yaml"], "bad.yaml: not valid YAML"),
    (["__fruit__", "--wildcards", "nowhere"], "nowhere: no folder of wildcards"),
    (["__fruit__", "--wildcards", "."], "wildcard __fruit__: fruit.txt does not exist; known ones:"),
    (["{a|b", "--wildcards", "."], "the prompt: brace at character 1 is never closed"),
    (["a", "--negative", "a}", "--wildcards", "."], "closing brace at character 2 was never opened"),
    (["a (b", "--syntax", "nope"], "syntax of prompts must be one of"),
    (["a:-1 AND b:1", "--shares"], "sum"),
])  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    (tmp_path / "typo.yaml").write_text("subjct: [a]\n")
    (tmp_path / "bad.yaml").write_text("subject: [a\n")
    assert main(["txt2img", *arguments, "--steps", "2", "--device", "cpu", "--out", "out"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert message in told.err
    assert not (tmp_path / "out").exists()
