"""Prompts from files, wildcards and studies: what comes out by example, and one clear line for each mistake."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from sample.prompt_sources import MAX_DEPTH, combinations, expand, read_prompts


@pytest.fixture(autouse=True, scope="module")
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Else it writes into the checkout; as it does, when tests are collected, for a @given outside a function
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# A file of prompts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a red apple\na wolf", ["a red apple", "a wolf"]),
        ("\n  a red apple  \n\n# fruit\n  # more\na pear # 2\n", ["a red apple", "a pear # 2"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\rb", ["a", "b"]),
        (b"\xef\xbb\xbf# mark\na", ["a"]),
        ("苹果 🍎\nVan Gogh:3 AND Monet:2", ["苹果 🍎", "Van Gogh:3 AND Monet:2"]),
        ("a\fb\x0bc\u2028d\x85e", ["a\fb\x0bc\u2028d\x85e"]),  # these end no line
        ("\\# no comment", ["\\# no comment"]),
    ],
)
def test_read_prompts(tmp_path: Path, content: str | bytes, expected: list[str]) -> None:
    assert read_prompts(write(tmp_path / "prompts.txt", content)) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a\n\xe4pfel\n", "prompts.txt:2: not UTF-8 text; save the file as UTF-8"),
        ("a".encode("utf-16"), "prompts.txt:1: not UTF-8 text"),
        ("a\n\nb\0", "prompts.txt:3: holds a NUL character"),
        ("a".encode("utf-16-le"), "prompts.txt:1: holds a NUL character; save the file as UTF-8 text"),
        ("", "prompts.txt: holds no prompt; write one a line"),
        ("\n# nothing\n", "prompts.txt: holds no prompt"),
    ],
)
def test_no_prompts(tmp_path: Path, content: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_prompts(write(tmp_path / "prompts.txt", content))


def test_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.txt: is missing, not a text file"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="is a folder, not a text file"):
        read_prompts(tmp_path)


# Wildcards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "fruit.txt": "# of trees\nred apple\npear\n\nplum\n",
        "animal/dog.txt": "poodle\n3::husky\n",
        "meal.txt": "{hot|cold} __fruit__\nsoup\n",
        "self.txt": "a __self__\n",
        "ping.txt": "__pong__\n",
        "pong.txt": "x\n0::y\n__ping__ {z\n",
        "empty.txt": "# nothing\n",
        "latin.txt": b"\xe4pfel",
        "none.txt": "0::a\n0::b",
        "snake_case.txt": "s",
        "big dog.txt": "B",
    }
    for name, content in files.items():
        write(tmp_path / "wildcards" / name, content)
    return tmp_path / "wildcards"


def outcomes(prompt: str, folder: Path, count: int = 60) -> set[str]:
    return {expand(prompt, 0, i, folder) for i in range(count)}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple", ["a red apple"]),
        ("", [""]),
        ("a {b|c} d", ["a b d", "a c d"]),
        ("{a}", ["a"]),
        ("{}", [""]),
        ("{a|}b", ["ab", "b"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{2::a|1::b}", ["a", "b"]),
        ("{0::a| .5::b|c}", ["b", "c"]),
        ("{a|a|b}", ["a", "b"]),
        ("__fruit__!", ["red apple!", "pear!", "plum!"]),
        ("__animal/dog__", ["poodle", "husky"]),
        ("{__fruit__|nothing}", ["red apple", "pear", "plum", "nothing"]),
        ("__meal__", [*(f"{t} {f}" for t in ("hot", "cold") for f in ("red apple", "pear", "plum")), "soup"]),
        ("__snake_case__ __big dog__", ["s B"]),
        ("__snake_case___", ["s_"]),
        # what is text
        ("a|b [c|d] 1::e", ["a|b [c|d] 1::e"]),
        ("__ __init ____ _ __ fruit __", ["__ __init ____ _ __ fruit __"]),
        (r"\{a|b\} \__fruit__", ["{a|b} __fruit__"]),
        (r"{a\|b|c} \(d\) \\", [r"a\|b \(d\) \\", r"c \(d\) \\"]),
        (r"{\2::a|b}", [r"\2::a", "b"]),
        ("a\\", ["a\\"]),
    ],
)
def test_expand(folder: Path, prompt: str, expected: list[str]) -> None:
    assert outcomes(prompt, folder) == set(expected)
    assert combinations(prompt, folder) == expected


def test_a_picture_says_the_same_whatever_the_batch(folder: Path) -> None:
    prompt = "a {big|small} __fruit__ and {a __animal/dog__|a {black|white} cat}"
    pinned = [expand(prompt, 7, i, folder) for i in range(4)]
    assert pinned == [expand(prompt, 7, i, folder) for i in reversed(range(4))][::-1]
    assert len({expand(prompt, seed, 0, folder) for seed in range(20)}) > 8
    # text around a choice changes nothing
    longer = expand("Look, {really?|no!} " + prompt.replace("a {big", "{big"), 7, 0, folder)
    assert longer.split(" ", 2)[0] == "Look,"
    assert expand("x " + prompt + " y", 7, 3, folder) == f"x {pinned[3]} y"


def test_choices_are_independent_and_weighted(folder: Path) -> None:
    count = 600
    found = Counter(expand("{a|b}{a|b} {3::x|y} __animal/dog__", 1, i, folder) for i in range(count))
    pairs = Counter(text[:2] for text in found.elements())
    assert set(pairs) == {"aa", "ab", "ba", "bb"}
    assert all(abs(n - count / 4) < 5 * (count * 3 / 16) ** 0.5 for n in pairs.values())
    for word in ("x", "husky"):  # three of four: within five deviations
        hits = sum(n for text, n in found.items() if word in text)
        assert abs(hits - count * 3 / 4) < 5 * (count * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a {b|c", "the prompt: brace at character 3 is never closed; write \\\\{ for the character"),
        ("a {b|{c}", "brace at character 3 is never closed"),
        ("a b}", "the prompt: closing brace at character 4 was never opened; write \\\\} for the character"),
        ("{" * 41 + "}" * 41, f"the prompt: braces in braces more than {MAX_DEPTH} deep"),
        ("{0::a|0::b}", r"{...}: weights of a choice need a finite sum above 0, got 0"),
        ("{" + "9" * 400 + "::a}", "need a finite sum above 0, got inf"),
        ("{1" + "0" * 308 + "::a|1" + "0" * 308 + "::b}", "need a finite sum above 0, got inf"),
        ("__none__", "none.txt: weights of a choice need a finite sum above 0, got 0"),
        ("__friut__", r"wildcard __friut__: .*friut.txt does not exist; did you mean __fruit__\?"),
        ("__dog__", r"does not exist; did you mean __animal/dog__\?"),
        ("__zzzzz__", "zzzzz.txt does not exist; known ones: __animal/dog__, __big dog__, __empty__"),
        ("__" + "x" * 5000 + "__", "does not exist; known ones"),
        ("__../secret__", r"wildcard __\.\./secret__ must name a file in .*, such as __animal/dog__"),
        ("__/etc/passwd__", "__/etc/passwd__ must name a file in"),
        ("__animal//dog__", "must name a file in"),
        ("__C:/x__", "must name a file in"),
        ("__./fruit__", "must name a file in"),
        ("__a\0b__", "must name a file in"),
        ("__animal__", "animal.txt does not exist"),
        ("__empty__", "empty.txt: holds no line to choose"),
        ("__latin__", "latin.txt:1: not UTF-8 text"),
        ("__self__", f"choices in choices more than {MAX_DEPTH} deep, in __self__"),
    ],
)
def test_mistakes(folder: Path, prompt: str, told: str) -> None:
    for call in (lambda: expand(prompt, 0, 0, folder), lambda: combinations(prompt, folder)):
        with pytest.raises(ValueError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_mistake_in_a_file_names_its_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"pong.txt:3: brace at character 10 is never closed"):
        combinations("__ping__", folder)


def test_files_that_hold_each_other(folder: Path) -> None:
    write(folder / "pong.txt", "__ping__\n")
    with pytest.raises(ValueError, match=r"more than 40 deep, in (__ping__, __pong__|__pong__, __ping__)"):
        expand("{a|{__ping__}}" * 20, 0, 0, folder)


def test_no_folder(tmp_path: Path) -> None:
    assert expand("{a}", 0, 0, tmp_path / "nothing") == "a"
    with pytest.raises(ValueError, match="nothing: no folder of wildcards"):
        expand("__a__", 0, 0, tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="a.txt does not exist; known ones: none"):
        expand("__a__", 0, 0, tmp_path / "bare")


def test_too_many_combinations(folder: Path) -> None:
    prompt = "{a|b|c}" * 6  # 729
    assert len(combinations(prompt, folder)) == 729
    assert combinations(prompt, folder, limit=729)[:4] == ["aaaaaa", "aaaaab", "aaaaac", "aaaaba"]
    with pytest.raises(ValueError, match="makes more than 728 combinations"):
        combinations(prompt, folder, limit=728)
    with pytest.raises(ValueError, match="makes more than 1000 combinations"):
        combinations("{a|b}" * 1000, folder)
    assert combinations("{a|b}{c|d|" + "d|" * 500 + "}", folder, limit=6) == [
        "ac",
        "ad",
        "a",
        "bc",
        "bd",
        "b",
    ]
    with pytest.raises(ValueError, match="makes more than 2 combinations"):
        combinations("{a|b|c}", folder, limit=2)


def test_what_is_drawn_is_among_the_combinations(folder: Path) -> None:
    prompt = "{__meal__|{2::a|b}} {c|d}"
    assert outcomes(prompt, folder, 300) == set(combinations(prompt, folder))


SIGNS = [
    *"{}|_\\:ab.5/ ",
    "__",
    "{a|b}",
    "2::",
    "__fruit__",
    "__animal/dog__",
    "__../x__",
    "__meal__",
]


def test_any_text_expands_or_is_a_mistake(folder: Path) -> None:
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(SIGNS), max_size=12).map("".join) | st.text(), st.integers(0, 3))
    @example("{" * 40 + "a" + "}" * 40, 0)
    @example("{" * 39 + "__fruit__" + "}" * 39, 0)
    @example("{" * 5000, 0)
    @example("__" * 5000, 0)
    @example("__a" * 1000, 0)
    @example("{a|__self__}", 0)
    @example("__\ud800__", 0)
    def check(prompt: str, image: int) -> None:
        try:
            text = expand(prompt, 3, image, folder)
        except ValueError:
            return
        try:
            every = combinations(prompt, folder, limit=300)
        except ValueError:  # too many, or a mistake behind a choice that was not drawn
            every = [text]
        assert text in every
        if not set(prompt) & set("{}\\_"):
            assert text == prompt

    check()
