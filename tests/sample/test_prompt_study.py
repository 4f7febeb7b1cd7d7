"""Studies of prompts: every combination in its order, phrases without a value left out, every mistake told."""

from pathlib import Path

import pytest

from ldm.config import configs_folder, find_config, load_config
from sample.prompt_study import TEMPLATE, PromptStudy, read_study, study_prompts
from train.emoji_names import STYLE_WORDS, caption
from train.tasks.diffusion import DiffusionTaskConfig


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def study(folder: Path, text: str) -> list[tuple[str, str, str]]:
    return read_study(write(folder / "study.yaml", text))


def test_every_combination_in_order(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        """
        artist: [Van Gogh, ""]
        subject: [a red apple, a wolf]
        medium: oil painting
        details: [[soft light, close up], foggy]
        palette: [[red, gold]]
        negative: blurry
        """,
    )
    assert len(found) == 8 and len({name for name, _, _ in found}) == 8
    assert found[0] == (
        "a red apple, soft light, close up, Van Gogh",
        "oil painting of a red apple, soft light, close up, by Van Gogh, red and gold palette",
        "blurry",
    )
    assert found[1] == (
        "a red apple, soft light, close up, no artist",
        "oil painting of a red apple, soft light, close up, red and gold palette",
        "blurry",
    )
    assert [prompt.split(", ")[0] for _, prompt, _ in found[::4]] == [
        "oil painting of a red apple",
        "oil painting of a wolf",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("subject: a wolf", "a wolf"),
        ("subject: a wolf\nmedium: photo", "photo of a wolf"),
        ("subject: a wolf\nmedium:", "a wolf"),
        ("subject: a wolf\nmedium: []", "a wolf"),
        ("subject: a wolf\nstyle_reference: a woodcut", "a wolf, in the style of a woodcut"),
        ("subject: a wolf\nstyle_reference: '  '", "a wolf"),
        ("subject: a wolf\npalette: teal", "a wolf, teal palette"),
        ("subject: 1984\nmedium: 35", "35 of 1984"),
        ("subject: a wolf\ntemplate: 'Best, {subject} !'", "Best, a wolf !"),
        ("subject: a wolf\ntemplate: '({subject}:1.3), {artist}, {a|b}'", "(a wolf:1.3), {a|b}"),
        # words between two fields stand where both say something
        (
            "subject: a\nmedium: b\nartist: c\ntemplate: 'x {subject} y {medium} z {artist} w'",
            "x a y b z c w",
        ),
        ("subject: a\nmedium: ''\nartist: c\ntemplate: 'x {subject} y {medium} z {artist} w'", "x a c w"),
        ("subject: a\ntemplate: '{medium} y {subject} z {artist} w'", "a w"),
    ],
)
def test_phrases_without_a_value_are_left_out(tmp_path: Path, text: str, expected: str) -> None:
    ((name, prompt, negative),) = study(tmp_path, text)
    assert (prompt, negative) == (expected, "")
    assert name == prompt.removeprefix("35 of ") or name in ("a wolf", "a")


def test_a_study_is_plain_data() -> None:
    found = study_prompts(PromptStudy(subject=("a", "b"), negative=("", "c")))
    assert found == [
        ("a, no negative", "a", ""),
        ("a, c", "a", "c"),
        ("b, no negative", "b", ""),
        ("b, c", "b", "c"),
    ]
    full = {
        name: (name,) for name in ("subject", "medium", "details", "artist", "style_reference", "palette")
    }
    ((_, prompt, _),) = study_prompts(PromptStudy(**full))
    assert prompt == TEMPLATE.format(**{name: name for name in full})


def test_equal_alternatives_count_once(tmp_path: Path) -> None:
    assert [prompt for _, prompt, _ in study(tmp_path, "subject: [a, b, a]")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("subjct: a wolf", "study.yaml: unknown key subjct; did you mean subject?"),
        ("subject: a\nzzzzz: 1", "study.yaml: unknown key zzzzz; known keys: subject, medium, details"),
        ("artist: Monet", "study.yaml: subject needs a value"),
        ("subject: ''", "study.yaml: subject needs a value"),
        ("", "study.yaml: subject needs a value"),
        ("- a\n- b", "study.yaml: expected key: value pairs, got list"),
        ("subject: [a", "study.yaml: not valid YAML"),
        ("subject: a\nsubject: b", "study.yaml: not valid YAML"),
        (b"subject: \xe4", "study.yaml: not valid YAML"),
        ("subject: {a: b}", "study.yaml: subject: an alternative must be a text, got {'a': 'b'}; quote it"),
        ("subject: yes", "study.yaml: subject: an alternative must be a text, got True; quote it"),
        ("subject: [[a, b]]", "study.yaml: subject: an alternative must be a text, got ['a', 'b']"),
        ("subject: ['${oc.env:HOME}']", "study.yaml: subject: '${oc.env:HOME}' holds what is not supported"),
        ("subject: a\ntemplate: [a]", "study.yaml: template"),
        (
            "subject: a\ntemplate: '{subjct}'",
            "study.yaml: template: unknown field {subjct}; did you mean {subject}?",
        ),
        ("subject: a\ntemplate: '{subject} {zz}'", "unknown field {zz}; fields: subject, medium"),
        (
            "subject: a\nartist: b\ntemplate: '{subject}'",
            "artist is given, but the template does not use {artist}",
        ),
        (
            f"subject: {list(range(40))}\nmedium: {list(range(26))}",
            "study.yaml: makes 1040 prompts, more than 1000",
        ),
    ],
)
def test_mistakes_in_a_study(tmp_path: Path, text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_study(write(tmp_path / "study.yaml", text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="configs/sample/prompt_study.yaml"):
        read_study("configs/sample/prompt_studi.yaml")
    with pytest.raises(ValueError, match="makes 6 prompts, more than 5"):
        read_study("configs/sample/prompt_study.yaml", limit=5)


def test_the_shipped_study_speaks_the_shipped_models_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # found from any folder
    concepts = ("red apple", "wolf")
    learned = load_config(DiffusionTaskConfig, find_config("configs/train/emoji.yaml")).data.concepts
    assert set(concepts) <= set(learned)
    found = read_study("configs/sample/prompt_study.yaml")
    assert [prompt for _, prompt, _ in found] == [
        caption(concept, style) for concept in concepts for style in STYLE_WORDS
    ]
    assert found[0] == ("a red apple, noto emoji", "a red apple, noto emoji", "")


def test_the_wheel_holds_the_shipped_study() -> None:
    """configs/ goes into the wheel as ldm/configs, folder by folder."""
    import tomllib

    root = configs_folder().parent
    wheel = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
        "targets"
    ]
    assert wheel["wheel"]["force-include"]["configs"] == "ldm/configs"
    assert "/configs" in wheel["sdist"]["include"]
    assert (configs_folder() / "sample" / "prompt_study.yaml").is_file()
