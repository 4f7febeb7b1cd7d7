"""Token ids: equal to open_clip's on awkward text; padding, cutting and placeholders."""

import random

import pytest
import torch

from ldm.models.tokenizer import END_ID, START_ID, Tokenizer

HAND_WRITTEN = [
    "",
    " ",
    "\n\t\r ",
    "a red apple, fluent 3d emoji",
    "A RED Apple!!",
    "a" * 500,
    "word " * 300,
    "!",
    "!!!" * 40,
    "it's the dog's, they'll've",
    "3.14159 1,000,000 2⁸ ½ ٣ Ⅷ",
    "fish &amp; chips &lt;b&gt;bold&lt;/b&gt; &amp;amp; &#39;quoted&#39; &nbsp;&eacute;",
    "<html><body>&copy; 2022</body></html>",
    "naïve café über Ångström, Łódź, İstanbul, ﬁ ligature",
    "e\u0301 combining and \u00e9 composed",
    "schÃ¶n mojibake â€œquotesâ€",
    "红苹果，水彩画",
    "東京タワーの夜景 ﾊﾝｶｸ",
    "한국어 텍스트",
    "صورة قطة على سجادة",
    "\u202eright to left override\u202c",
    "שלום עולם with english",
    "ภาษาไทยไม่มีช่องว่าง",
    "🍎",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪",
    "🍎" * 60,
    "a\0b",
    "\0",
    "\ufeffbyte order mark",
    "zero\u200bwidth\u200djoiner",
    "\ud7ff\ue000\U0010ffff",
    "<|startoftext|> <|endoftext|> in the text",
    "<birb-style> by <s1><s2>",
    "(house:1.3) [on] a (hill:0.5), sun, (((sky)))",
    "C:\\path\\to\\file.png https://example.org/?a=1&b=2",
    "\\n \\u0041 %s {0} ${HOME} `rm`",
    "'; DROP TABLE prompts; --",
    "…—–“”‘’«»¿¡",
    "∀x∈ℝ: ⌈x⌉ ≥ x √2 ≠ π",
    "\x1b[31mred\x1b[0m \x07",
]
POOLS = [
    "abcdefghijklmnopqrstuvwxyz      ",
    "ABCxyz0123456789 .,;:!?-_'\"/\\()[]{}<>|&#@$%^*+=~`",
    "äöüßéèêñçøåæœšžłđ ıİ",
    "&amp;&lt;&gt;&quot;&#233;&#x1F34E; ",
    "红绿蓝黄天地人山水火木金土 ",
    "あいうえおカキクケコ ",
    "אבגדה وزحطي ",
    "🍎🍏🍐🐶🚗🏽\u200d\ufe0f❤ ",
    "\0\t\n\r\x0b\u00a0\u2003\u3000\u200b ab",
    "абвгд αβγδ ",
]


def awkward_texts(count: int = 200) -> list[str]:
    rng = random.Random(20221123)
    texts = list(HAND_WRITTEN)
    while len(texts) < count:
        pools = rng.sample(POOLS, rng.randint(1, 3))
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.choice((3, 20, 80, 400)))))
    return texts


def length(text: str, context_length: int = 77) -> int:
    """Ids of a text, start and end included."""
    return min(len(Tokenizer().encode(text)) + 2, context_length)


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


def test_200_awkward_texts(open_clip) -> None:
    texts = awkward_texts()
    assert len(set(texts)) == 200
    expected = open_clip.tokenize(texts)
    zero = Tokenizer(padding="zero")(texts)
    assert zero.dtype == torch.int64 and torch.equal(zero, expected)

    end = expected.clone()
    for row, text in zip(end, texts, strict=True):
        row[length(text) :] = END_ID
    assert torch.equal(Tokenizer()(texts), end)
    assert int(end.max()) == END_ID and bool((end[:, 0] == START_ID).all())


@pytest.mark.parametrize("context_length", [2, 5, 32])
def test_other_context_lengths(open_clip, context_length: int) -> None:
    texts = ["", "a red apple", "one two three four five six seven eight"]
    expected = open_clip.tokenize(texts, context_length)
    assert torch.equal(Tokenizer(context_length, padding="zero")(texts), expected)


def test_known_ids() -> None:
    """The prompt of the Stable Diffusion paper's code, as every CLIP tokenizer has it."""
    ids = Tokenizer()(["a photograph of an astronaut riding a horse"])
    assert ids.shape == (1, 77)
    assert ids[0, :10].tolist() == [START_ID, 320, 8853, 539, 550, 18376, 6765, 320, 4558, END_ID]
    assert Tokenizer()([]).shape == (0, 77)


def test_cut_says_what_was_lost() -> None:
    tokenizer = Tokenizer()
    words = [f"word{i}" for i in range(10)] + ["apple"] * 60 + ["pear", "plum"]
    kept = " ".join(["apple"] * 75)
    assert tokenizer.cut(kept) == ""
    assert tokenizer.cut(f"{kept} pear, plum") == "pear , plum"
    assert tokenizer.cut("") == ""
    text = " ".join(words)
    lost = tokenizer.cut(text)
    assert lost and text.endswith(lost)
    assert torch.equal(tokenizer([text]), tokenizer([text.removesuffix(lost)]))


def test_placeholders() -> None:
    tokenizer = Tokenizer()
    before = tokenizer(["a photo of a <birb> and <birb-style>"])
    assert tokenizer.add_placeholder("<birb>") == [END_ID + 1]
    assert tokenizer.add_placeholder("<Birb-Style>", vectors=3) == [END_ID + 2, END_ID + 3, END_ID + 4]
    ids = tokenizer.encode("a photo of a <BIRB>and <birb-style>,")
    plain = Tokenizer().encode
    assert ids == [*plain("a photo of a"), 49408, *plain("and"), 49409, 49410, 49411, *plain(",")]
    assert int(before.max()) == END_ID
    assert torch.equal(Tokenizer()(["no placeholder"]), tokenizer(["no placeholder"]))


def test_a_longer_placeholder_wins() -> None:
    tokenizer = Tokenizer()
    tokenizer.add_placeholder("<cat>")
    tokenizer.add_placeholder("<cat>-toy")
    assert tokenizer.encode("<cat>-toy <cat>") == [49409, 49408]


def test_cut_names_placeholders_in_order() -> None:
    tokenizer = Tokenizer(context_length=5)
    tokenizer.add_placeholder("<birb>", vectors=2)
    assert tokenizer.cut("a red apple <birb> and pear") == "<birb> and pear"
    assert tokenizer.cut("red apple <birb>") == "<birb>", "half of its vectors are lost"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tokenizer(context_length=1), "at least 2 .* got 1"),
        (lambda: Tokenizer(padding="left"), "'end' or 'zero', got 'left'"),
        (lambda: Tokenizer().add_placeholder("cat"), "'cat' is a token already"),
        (lambda: Tokenizer().add_placeholder("  "), "needs a name"),
        (lambda: Tokenizer().add_placeholder("<x>", vectors=0), "at least one vector, got '<x>' and 0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_placeholder_is_added_once() -> None:
    tokenizer = Tokenizer()
    tokenizer.add_placeholder("<birb>")
    with pytest.raises(ValueError, match="'<birb>' is a token already; .* '<birb-1>'"):
        tokenizer.add_placeholder("<BIRB>")
