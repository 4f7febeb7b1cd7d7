"""What the README and the course's README name is there: files, pictures, commands that parse, configs."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where the packages `notebooks` and `benchmarks` are

from notebooks import pictures  # noqa: E402
from sample.__main__ import parser as sample_parser  # noqa: E402
from sample.commands import check  # noqa: E402
from sample.weights import parser as weights_parser  # noqa: E402
from train.__main__ import parser as train_parser  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "notebooks/README.md"]
PARSERS = {"ldm-sample": sample_parser, "ldm-train": train_parser, "ldm-weights": weights_parser}
LINK = re.compile(r"!?\[[^]]*\]\(([^)#\s]+)[^)]*\)")
FENCE = re.compile(r"^```(\w*)\n(.+?)^```", re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Each line of a shell block, and each code in the text, that is a whole command of ours."""
    lines = [
        line for kind, block in FENCE.findall(page) if kind in ("sh", "bash") for line in block.splitlines()
    ]
    lines = [part.strip() for line in lines for part in re.split(r"&&|;", line.partition("  #")[0])]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", page))]
    inline = [code for code in inline if len(code.split()) > 2]  # `ldm-train lora` is a name
    ours = re.compile(r"(?:\S*/)?(?:ldm-\w+|python) (?!.*\.\.\.)")
    return [line for line in lines + inline if ours.match(line)]


def links(page: str) -> list[str]:
    """The files that a page links to, as they stand there."""
    return [link for link in LINK.findall(page) if "://" not in link]


def missing(page: str, folder: Path) -> list[str]:
    """Links to files that are not there, and configs of the repository that commands name."""
    configs = re.findall(r"\bconfigs/[\w/.]+\w", " ".join(commands(page)))
    return [link for link in links(page) if not (folder / link).exists()] + [
        name for name in configs if not (ROOT / name).exists()
    ]


def known(module: str, *words: str) -> bool:
    """Whether a module is there and has the options, by its text: to import benchmarks takes seconds."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    texts = [file.read_text(encoding="utf-8") for file in (path, path.parent / "common.py") if file.is_file()]
    given = [word for word in words if word.startswith("--") and " " not in word]
    return path.is_file() and all(any(f'"{word}"' in text for text in texts) for word in given)


def parses(command: str) -> bool:
    """Whether a command line is right; one of another program is."""
    program, *words = shlex.split(command)
    program = Path(program).name
    try:
        if program in PARSERS:
            args = PARSERS[program]().parse_args(words)
            if program == "ldm-sample":
                check(args)
        elif words[:1] == ["-m"] and words[1].startswith(("benchmarks.", "notebooks.")):
            return known(*words[1:])
    except SystemExit as status:
        return not status.code  # 0 after --help
    return True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_what_a_page_names_is_there(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_commands_of_a_page_parse(path: Path) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    assert [command for command in found if not parses(command)] == []


def test_the_glossary_names_what_is_in_the_code() -> None:
    """Each name of its second column, but for those it says to be a notebook's."""
    page = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    _, rows = page.split("## Glossary")
    cells = [row.split(" | ")[1] for row in rows.splitlines() if row.startswith("| ")]
    assert len(cells) > 20
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("ldm", "sample", "train")
        for path in (ROOT / folder).rglob("*.py")
    ]
    words = set(re.findall(r"\w+", "\n".join(sources)))
    named = [name for cell in cells if "notebook" not in cell for name in re.findall(r"`([^`]+)`", cell)]
    parts = [(name, re.findall(r"[A-Za-z_]\w*", name.removesuffix(".py"))) for name in named]
    assert [name for name, each in parts if not set(each) <= words] == []


def test_what_is_wrong_on_a_page_is_found(tmp_path: Path) -> None:
    page = "![a](there.png) [b](gone.md#part) [c](https://example.org)\n```sh\nldm-train lora configs/train/gone.yaml\n```\n"
    (tmp_path / "there.png").touch()
    assert missing(page, tmp_path) == ["gone.md", "configs/train/gone.yaml"]
    for wrong in (
        "ldm-sample txt2img a --stepz 3",
        "ldm-sample txt2img",
        "ldm-train flow x.yaml",
        "ldm-weights",
        "python -m benchmarks.nothing",
        "python -m benchmarks.unet --nothing",
    ):
        assert not parses(wrong)


# --- pictures -----------------------------------------------------------------------------------------------


def test_pictures_are_there_and_small() -> None:
    names = {path.stem for path in pictures.FOLDER.glob("*.png")}
    assert names == {*pictures.COMMANDS, *pictures.FIGURES}
    for name in names:
        path = pictures.FOLDER / f"{name}.png"
        assert path.stat().st_size <= pictures.LARGEST
        assert min(Image.open(path).size) > 150


def test_the_readme_shows_each_picture_with_its_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]+\]\(notebooks/pictures/(\w+)\.png\)", readme)
    assert sorted(shown) == sorted([*pictures.COMMANDS, *pictures.FIGURES])
    text = " ".join(readme.split())
    assert [command for command in pictures.COMMANDS.values() if command not in text] == []


def test_commands_of_pictures_parse() -> None:
    assert all(parses(command) for command in pictures.COMMANDS.values())


@pytest.mark.parametrize("name", pictures.FIGURES)
def test_a_figure_is_that_of_its_notebook(name: str) -> None:
    notebook, heading = pictures.FIGURES[name]
    data = pictures.figure(ROOT / f"notebooks/{notebook}.ipynb", heading)
    now, kept = (
        Image.open(file).convert("RGB") for file in (io.BytesIO(data), pictures.FOLDER / f"{name}.png")
    )
    assert now.size == kept.size
    mean = sum(ImageStat.Stat(ImageChops.difference(now, kept)).mean)
    assert mean < 1, f"python -m notebooks.pictures {name}"
    with pytest.raises(ValueError, match="no figure below '## Nowhere'"):
        pictures.figure(ROOT / f"notebooks/{notebook}.ipynb", "## Nowhere")


def test_a_command_makes_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and pictures, but the same way from the command to the file."""
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    command = pictures.COMMANDS["attention"].replace("--steps 20", "--steps 1")
    monkeypatch.setitem(pictures.COMMANDS, "attention", command)
    assert pictures.main(["attention"]) == 0
    assert Image.open(tmp_path / "attention.png").mode == "P"


def test_unknown_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main(["cat"]) == 2
    assert "no picture is called 'cat': grid" in capsys.readouterr().err


def test_the_wildcards_are_what_the_model_knows() -> None:
    from omegaconf import OmegaConf

    from sample.prompt_sources import read_prompts
    from train.emoji_names import with_article

    concepts = OmegaConf.load(ROOT / "configs/train/emoji.yaml").data.concepts
    assert read_prompts(ROOT / "configs/sample/wildcards/thing.txt") == [
        with_article(each) for each in concepts
    ]
