"""The prompt language: the web UI's rules by example, every text parses, plain text stays as it is."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from ldm.diffusion.guidance import composed, guide
from ldm.diffusion.guidance_rules import Linear
from ldm.models.weighting import BREAK, Piece
from sample.prompts import (
    SYNTAXES,
    Alternate,
    Part,
    Prompt,
    Schedule,
    at_step,
    comfy_emphasis,
    emphasis,
    mixed,
    parse,
)


@pytest.fixture(autouse=True, scope="module")
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Else it writes into the checkout; as it does, when tests are collected, for a @given outside a function
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


def said(text: str, step: int = 0, steps: int = 10) -> list[tuple[str, float]]:
    """(text, weight) of each piece of a prompt without AND."""
    ((weight, pieces),) = at_step(parse(text), step, steps)
    assert weight == 1
    return [tuple(piece) for piece in pieces]


def texts(text: str, steps: int = 10) -> list[str]:
    """What a prompt without AND says at each step, as one text."""
    return ["".join(piece.text for piece in at_step(parse(text), i, steps)[0][1]) for i in range(steps)]


# Emphasis


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1.0)]),
        ("a red apple", [("a red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("a [red] apple", [("a ", 1.0), ("red", 1 / 1.1), (" apple", 1.0)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red: 2 )", [("red", 2.0)]),
        ("(red:-0.4)", [("red", -0.4)]),
        ("(red:0)", [("red", 0.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("[[red]]", [("red", 1 / 1.1 / 1.1)]),
        ("(a (b:1.5) c:0.8)", [("a ", 0.8), ("b", 1.5 * 0.8), (" c", 0.8)]),
        ("([red])", [("red", 1.0)]),
        ("(red)(apple)", [("redapple", 1.1)]),  # equal weights are one piece
        ("(a)b(c)", [("a", 1.1), ("b", 1.0), ("c", 1.1)]),
        # only round brackets take a number, right before they close
        ("[red:1.3]", None),  # a schedule
        ("(red:1.3 )", [("red", 1.3)]),
        ("(red:1.3 apples)", [("red:1.3 apples", 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("(red:)", [("red:", 1.1)]),
        ("(:2)", [("", 1.0)]),
        # what has no partner: opened to the end, closed is text
        ("a (red apple", [("a ", 1.0), ("red apple", 1.1)]),
        ("a [red apple", [("a ", 1.0), ("red apple", 1 / 1.1)]),
        ("((a)b", [("a", 1.1 * 1.1), ("b", 1.1)]),
        ("a) red] apple", [("a) red] apple", 1.0)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),  # round and square may overlap
        # escapes
        (r"\(red\)", [("(red)", 1.0)]),
        (r"\[red\]", [("[red]", 1.0)]),
        (r"(a\))", [("a)", 1.1)]),
        (r"a\\b", [("a\\b", 1.0)]),
        (r"(a\:1.3)", [("a:1.3", 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        (r"\d \ ", [("d  ", 1.0)]),  # before anything else it goes
        ("a\\", [("a", 1.0)]),
        ("a: b | c", [("a: b | c", 1.0)]),
        ("(🍎:1.3) 苹果\n", [("🍎", 1.3), (" 苹果\n", 1.0)]),
    ],
)
def test_emphasis(text: str, expected: list | None) -> None:
    if expected is None:
        assert isinstance(parse(text).parts[0].nodes[0], Schedule)
        return
    found = said(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_the_web_uis_example() -> None:
    """FACTS.md 12: brackets in brackets, the outermost never closed."""
    found = dict(said("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))."))
    assert found["house"] == pytest.approx(1.573)
    assert found["hill"] == pytest.approx(0.55)
    assert found["sky"] == pytest.approx(1.4641)
    assert found["on"] == 1.0 and found["."] == found[", sun, "] == 1.1
    assert "".join(found) == "a house on a hill, sun, sky."


def test_emphasis_off_leaves_brackets_as_text() -> None:
    prompt = parse(r"a (red:1.3) [apple:pear:0.5] BREAK \(x\)", syntax="webui-none")
    assert at_step(prompt, 0, 2) == ((1.0, (Piece(r"a (red:1.3) apple BREAK \(x\)", 1.0),)),)


def test_break() -> None:
    assert said("a red apple BREAK on a table") == [("a red apple", 1), tuple(BREAK), ("on a table", 1)]
    assert said("BREAK a BREAK BREAK") == [tuple(BREAK), ("a", 1), tuple(BREAK), tuple(BREAK)]
    assert said("(a BREAK b:1.3)") == [("a", 1.3), tuple(BREAK), ("b", 1.3)]
    assert said("BREAKFAST break") == [("BREAKFAST break", 1)]


# AND


def test_and_joins_prompts_with_weights() -> None:
    van_gogh = at_step(parse("Van Gogh:3 AND Monet:2"), 0, 10)
    assert van_gogh == ((3.0, (Piece("Van Gogh"),)), (2.0, (Piece("Monet"),)))
    three = at_step(parse("a (red) apple AND a pear :-.5 AND\na plum: +2. "), 0, 10)
    assert [weight for weight, _ in three] == [1, -0.5, 2]
    assert three[0][1] == (Piece("a "), Piece("red", 1.1), Piece(" apple"))
    assert [pieces[0].text for _, pieces in three[1:]] == ["a pear", "a plum"]
    assert at_step(parse("a AND "), 0, 10) == ((1.0, (Piece("a"),)), (1.0, (Piece(""),)))
    assert len(parse("ANDROID SAND a and b").parts) == 1


def test_and_ends_brackets() -> None:
    """It joins prompts, so a bracket reaches no further than its own."""
    prompt = at_step(parse("(a AND b) AND [c:d AND e:0.5]"), 0, 10)
    assert [pieces for _, pieces in prompt] == [
        (Piece("a", 1.1),),
        (Piece("b)"),),
        (Piece("c:d", 1 / 1.1),),
        (Piece("e:0.5]"),),
    ]


def test_a_number_at_the_end_is_a_weight_also_of_one_prompt() -> None:
    assert at_step(parse("a red apple:1.2"), 0, 10) == ((1.2, (Piece("a red apple"),)),)
    assert said(r"the clock at 10\:30") == [("the clock at 10:30", 1)]
    assert said("10:30 on the clock") == [("10:30 on the clock", 1)]


def test_a_negative_prompt_has_no_and() -> None:
    prompt = parse("a AND (b:1.3) c:2", composed=False)
    assert at_step(prompt, 0, 10) == ((1.0, (Piece("a AND "), Piece("b", 1.3), Piece(" c:2"))),)
    scheduled = parse("[a AND b:c:5]", composed=False)
    assert [at_step(scheduled, i, 10)[0][1][0].text for i in (0, 9)] == ["a AND b", "c"]


# Schedules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a:b:0.5]", "aaaaabbbbb"),
        ("[a:b:3]", "aaabbbbbbb"),
        ("[a:b:0]", "bbbbbbbbbb"),
        ("[a:b:0.0]", "bbbbbbbbbb"),
        ("[a:b:-3]", "bbbbbbbbbb"),
        ("[a:b:1]", "abbbbbbbbb"),  # one step
        ("[a:b:1.0]", "aaaaaaaaaa"),  # all of the steps
        ("[a:b:99]", "aaaaaaaaaa"),
        ("[a:b:" + "9" * 400 + "]", "aaaaaaaaaa"),
        ("[a:b:.25]", "aabbbbbbbb"),
        ("[a:b: 0.25 ]", "aabbbbbbbb"),
        ("[a|b]", "ababababab"),
        ("[a|b|c]", "abcabcabca"),
        ("[a:[b|c]:4]", "aaaabcbcbc"),
        ("[[a|b]:c:4]", "ababcccccc"),
        ("[a:[b:c:0.8]:0.4]", "aaaabbbbcc"),
        ("[a|[b:c:5]]", "abababacac"[:5] + "cacac"),
    ],
)
def test_schedules(text: str, expected: str) -> None:
    assert texts(text) == list(expected)


def test_schedules_from_and_to_nothing() -> None:
    assert texts("a[ red:2] apple", 4) == ["a apple", "a apple", "a red apple", "a red apple"]
    assert texts("a[ red::2] apple", 4) == ["a red apple", "a red apple", "a apple", "a apple"]
    assert texts("a[ red|] apple", 3) == ["a red apple", "a apple", "a red apple"]
    assert texts("[::2]x", 2) == ["x", "x"]


def test_emphasis_and_schedules_in_each_other() -> None:
    assert said("([red:green:5] apple:1.3)", 0) == [("red apple", 1.3)]
    assert said("([red:green:5] apple:1.3)", 5) == [("green apple", 1.3)]
    assert said("[(red:1.3):[green]:5]", 0) == [("red", 1.3)]
    assert said("[(red:1.3):[green]:5]", 5) == [("green", 1 / 1.1)]
    assert [said("(apple:[1.5:0.5:5])", i) for i in (0, 5)] == [[("apple", 1.5)], [("apple", 0.5)]]
    both = at_step(parse("[a:b:5] AND c:[1:2:5]"), 9, 10)
    assert both == ((1.0, (Piece("b"),)), (1.0, (Piece("c:2"),)))  # weights of AND do not change


def test_the_tree() -> None:
    assert parse("an [old:new:0.25] [oak|ash]:1.5 AND b") == Prompt(
        (
            Part(
                ("an ", Schedule(("old",), ("new",), "0.25"), " ", Alternate((("oak",), ("ash",)))),
                1.5,
            ),
            Part((" b",)),
        )
    )


@pytest.mark.parametrize(
    "text",
    [
        "[a:b:c]",  # no number
        "[a:b:c:5]",  # one colon too many
        "[a:b|c:5]",  # neither one nor the other
        "[a:b c",  # never closed
        "[(a:b]:5)",  # crossed
        "[[a:b]:c:5]",  # what stands inside is nothing
        "[(a:b:c):d:5]",
        "[a:b:(5)]",
        "[a:b:5",
        "(a|b)",
    ],
)
def test_what_is_no_schedule_is_text(text: str) -> None:
    assert all(isinstance(node, str) for node in parse(text, composed=False).parts[0].nodes)
    assert len(set(texts(text + " "))) == 1


def test_stray_brackets_before_a_schedule() -> None:
    assert texts("((x][:y:z [w:1]", 2) == ["x]:y:z ", "x]:y:z w"]
    assert texts("(a] [b:c:1] [d", 2) == ["a] b d", "a] c d"]


def test_steps_that_say_the_same_are_equal() -> None:
    prompt = parse("a [b:c:0.5] (d:1.2) AND [e|f]")
    assert len({at_step(prompt, i, 10) for i in range(10)}) == 4  # b or c with e or f
    assert len({at_step(parse("plain (text)"), i, 10) for i in range(10)}) == 1


@pytest.mark.parametrize(("step", "steps"), [(-1, 10), (10, 10), (0, 0)])
def test_step_out_of_range(step: int, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"step of a prompt must be in 0..{steps - 1}, got {step}"):
        at_step(parse("a"), step, steps)


# Mixtures


def weights(text: str, mix: bool = True) -> list[float]:
    prompt = mixed(parse(text)) if mix else parse(text)
    return [part.weight for part in prompt.parts]


def test_a_mixture_has_shares() -> None:
    assert weights("Van Gogh:3 AND Monet:2") == [0.6, 0.4]
    assert weights("Van Gogh:3 AND Monet:2", mix=False) == [3, 2]
    assert weights("a AND b AND c AND d") == [0.25] * 4
    assert weights("a:2 AND b:-1") == [2, -1]
    assert weights("a:3 AND b:0 AND c") == [0.75, 0, 0.25]
    assert weights("a red apple") == weights("a red apple:1.2") == [1]


def test_a_mixture_says_the_same() -> None:
    prompt = parse("[a:b:5] (c):3 AND d:1")
    assert [[pieces for _, pieces in at_step(each, 9, 10)] for each in (prompt, mixed(prompt))] == [
        [(Piece("b "), Piece("c", 1.1)), (Piece("d"),)]
    ] * 2
    assert mixed(mixed(prompt)) == mixed(prompt)


def test_guidance_of_a_mixture() -> None:
    """The web UI's D_u + sum w_i s (D_i - D_u); mixed, that is guidance s towards the weighted average."""

    def denoise(x: torch.Tensor, sigma: object, context: torch.Tensor) -> torch.Tensor:
        return x * context

    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    d_u, d_1, d_2 = 0.5, 2.0, -1.0
    contexts = [{"context": torch.full((1, 1, 1, 1), value, dtype=x.dtype)} for value in (d_u, d_1, d_2)]
    for mix, expected in (
        (False, d_u + 7 * (3 * (d_1 - d_u) + 2 * (d_2 - d_u))),
        (True, d_u + 7 * (0.6 * d_1 + 0.4 * d_2 - d_u)),
    ):
        weighted = list(zip(weights("Van Gogh:3 AND Monet:2", mix), contexts[1:], strict=True))
        guided = guide(composed(denoise, weighted, contexts[0]), Linear(7.0))
        torch.testing.assert_close(guided(x, 1.0), x * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:1 AND b:-1", "1, -1"),
        ("a:0", "0"),
        ("a:-2 AND b", "-2, 1"),
        ("a:" + "9" * 400 + " AND b", "inf, 1"),
        ("a:" + "9" * 400 + " AND b:-" + "9" * 400, "inf, -inf"),
        ("a:1" + "0" * 308 + " AND b:1" + "0" * 308, r"1e\+308, 1e\+308"),
    ],
)
def test_shares_of_nothing(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"weights of a mixture need a finite sum above 0, got {told}"):
        mixed(parse(text))


# Other syntaxes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1.0)]),
        ("a red apple", [("a red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:-0.4)", [("red", -0.4)]),
        ("(red:1e-1)", [("red", 0.1)]),
        # a number replaces what stands around it, brackets inside go on from it
        ("((a:1.3) b)", [("a", 1.3), (" b", 1.1)]),
        ("((a:1.3) b:2)", [("a", 1.3), (" b", 2.0)]),
        ("(a (b) c:0.5)", [("a ", 0.5), ("b", 0.5 * 1.1), (" c", 0.5)]),
        ("((a:1.3):0.5)", [("a", 1.3)]),
        ("(((a)):2)", [("a", 2.0 * 1.1 * 1.1)]),
        # the number is what follows the last colon
        ("(a:b:1.3)", [("a:b", 1.3)]),
        ("(a:1.3 b)", [("a:1.3 b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(:2)", [(":2", 1.1)]),  # nothing before the colon
        ("()", [("", 1.0)]),
        # pieces stay apart
        ("(red)(apple)", [("red", 1.1), ("apple", 1.1)]),
        # what has no partner
        ("a (red apple", [("a ", 1.0), ("(red apple", 1.0)]),
        ("a (red (big) apple", [("a ", 1.0), ("(red (big) apple", 1.0)]),
        ("((a)", [("(a", 1.1)]),  # the last bracket closes the first
        ("(((a):1.3)", [("(a", 1.3 * 1.1)]),
        ("a) b", [("a) b", 1.0)]),
        ("a) (b) c", [("a) (b) c", 1.0)]),
        ("a) ((b)) c", [("a) (", 1.0), ("b", 1.1), (") c", 1.0)]),
        # escapes
        (r"\(red\)", [("(red)", 1.0)]),
        (r"(a\))", [("a)", 1.1)]),
        (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
        (r"a\\b \[c\]", [(r"a\\b \[c\]", 1.0)]),  # nothing else is one
        # the web UI's signs are text
        ("[a] [b:c:0.5] [d|e]", [("[a] [b:c:0.5] [d|e]", 1.0)]),
        ("a:2 AND b:3 BREAK c", [("a:2 AND b:3 BREAK c", 1.0)]),
        ("a:1.3", [("a:1.3", 1.0)]),
        ("(BREAK:-1)", [("BREAK ", -1.0)]),
    ],
)
def test_comfy(text: str, expected: list[tuple[str, float]]) -> None:
    ((weight, found),) = at_step(parse(text, syntax="comfy"), 0, 10)
    assert weight == 1 and found == comfy_emphasis(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)
    assert BREAK not in found


def test_comfy_and_the_web_ui_differ_in_nested_numbers() -> None:
    text = "((a:1.3) b:2)"
    assert [weight for _, weight in emphasis(text)] == pytest.approx([2.6, 2])
    assert [weight for _, weight in comfy_emphasis(text)] == [1.3, 2]


def test_comfy_reads_every_text() -> None:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text())
    @example("(" * 1000 + "a" + ")" * 1000)
    @example("(" * 500 + ")" * 499)
    @example(")" * 500 + "(" * 501 + ")")
    def check(text: str) -> None:
        pieces = comfy_emphasis(text)
        assert all(piece.text for piece in pieces) or pieces == (Piece(""),)
        if "(" not in text.replace("\\(", ""):
            assert len(pieces) == 1 and pieces[0].weight == 1

    check()


def test_plain_is_the_text() -> None:
    text = r"a (red:1.3) [apple:pear:0.5] BREAK b AND \(c\):2"
    assert at_step(parse(text, syntax="plain"), 9, 10) == ((1.0, (Piece(text),)),)
    assert at_step(parse("", syntax="plain"), 0, 1) == ((1.0, (Piece(""),)),)


def test_syntaxes() -> None:
    text = "(a) [b:c:1] AND d"
    assert len({at_step(parse(text, syntax=name), 0, 2) for name in SYNTAXES}) == len(SYNTAXES) == 4
    for name in SYNTAXES:
        assert at_step(parse("a red apple", syntax=name), 0, 1) == ((1.0, (Piece("a red apple"),)),)
    with pytest.raises(ValueError, match="one of webui, webui-none, comfy, plain, got 'compel'"):
        parse("a", syntax="compel")


# Any text

PIECES = [*r"ab ()[]:|\,.0123", " AND ", " BREAK ", "\n", "[a:b:0.5]", "[a|b]", "(a:1.3)", ":2", "🍎"]


def test_every_text_parses() -> None:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES), min_size=5, max_size=40).map("".join) | st.text(), st.booleans())
    @example("(" * 3000 + "a" + ")" * 3000, True)
    @example("[" * 99 + "a:b" + "]" * 99, True)
    @example("[x:" * 90 + "a" + ":3]" * 90, True)
    @example("(" * 500, False)
    @example("(a:" + "9" * 400 + ")", True)
    @example(":" + "9" * 400, True)
    def check(text: str, composed: bool) -> None:
        prompt = parse(text, composed)
        for step in (0, 2):
            for _, pieces in at_step(prompt, step, 3):
                assert pieces
                for one, two in pairwise(pieces):
                    assert BREAK in (one, two) or one.weight != two.weight or not (one.text and two.text)

    check()


def test_plain_text_is_one_piece() -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_characters="\\()[]:|")))
    def check(text: str) -> None:
        if "AND" not in text and "BREAK" not in text:
            assert at_step(parse(text), 0, 1) == ((1.0, (Piece(text),)),)

    check()


def test_escaped_text_says_itself() -> None:
    """A backslash before each special character makes any text plain."""

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.text("ab ()[]:|\\.1"))
    def check(text: str) -> None:
        escaped = "".join("\\" + c if c in "\\()[]:|" else c for c in text)
        assert emphasis(escaped) == (Piece(text),)
        assert at_step(parse(escaped), 0, 1) == ((1.0, (Piece(text),)),)

    check()
