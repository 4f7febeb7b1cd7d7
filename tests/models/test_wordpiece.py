"""Token ids of BERT's uncased models: words, pieces, limits; equal to transformers' on awkward text."""

import random
from pathlib import Path

import pytest
import torch

from ldm.models.wordpiece import SPECIAL, WordPieceTokenizer, words

PIECES = """
a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9
! " # $ % & ' ( ) * + , - . / : ; < = > ? @ [ \\ ] ^ _ ` { | } ~ ¡ ¿ « » … — – “ ” ‘ ’ √
red apple apples app ##le ##les ##le ##s un ##aff ##able ##ing ##ed emoji fluent three dog cat the cafe uber
naive lodz istanbul angstrom strasse odos amp lt gt eacute nbsp html body of an astronaut riding horse photo
##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r ##t ##u ##v ##w ##x ##y ##z
##0 ##1 ##2 ##3 ##4 ##5 红 苹 果 東 京 画 ア カ ##カ ハ ##ン α β γ ##α ##β σ ς ##σ ##ς ο δ ##δ ##ο а б в ##а ##б
ס א ש ##ש ##ל ##ו ##ם ᄒ ##ᅡ ##ᆫ ##ᄀ ##ᅮ ##ᆨ ض ق ##ط ##ة 🍎 ##🍎 ½ ² ##² ı ß ##ß ł ø
"""
VOCAB = [SPECIAL[0], "[unused0]", "[unused1]", *SPECIAL[1:], *dict.fromkeys(PIECES.split())]

AWKWARD = [
    "",
    " ",
    "\n\t\r ",
    "a red apple, fluent 3d emoji",
    "A RED Apple!!",
    "unaffable UNAFFABLE, unaffing",
    "a" * 100,
    "a" * 101,
    "red" * 33 + "a" + " apple",
    "é" * 100,
    "é" * 101,
    "e\u0301" * 100,
    "word " * 300,
    "apple " * 75,
    "apple " * 76,
    "apple" * 60,
    "!",
    "!!!" * 40,
    "it's the dog's, they'll've",
    "3.14159 1,000,000 2⁸ ½ ٣ Ⅷ 5²",
    "fish &amp; chips &lt;b&gt;bold&lt;/b&gt; &amp;amp; &#39;quoted&#39; &nbsp;&eacute;",
    "<html><body>&copy; 2022</body></html>",
    "naïve café über Ångström, Łódź, İstanbul, ﬁ ligature, straße STRAẞE",
    "e\u0301 combining and \u00e9 composed, a\u0327\u0301, \u0301 alone",
    "schÃ¶n mojibake â€œquotesâ€",
    "ΟΔΟΣ ὁδός οδος αβγ ΑΒΓ Σ",
    "红苹果，水彩画",
    "red苹果apple 豈 \uf900\ufa6e \U0002f800 \U00020000a\U0002b820b\U0002b920c",
    "東京タワーの夜景 ﾊﾝｶｸ ガ カ\u3099",
    "한국어 텍스트 한국",
    "صورة قطة على سجادة",
    "\u202eright to left override\u202c",
    "שלום עולם with english",
    "ภาษาไทยไม่มีช่องว่าง",
    "हिन्दी में पाठ",
    "🍎",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪",
    "🍎" * 60,
    "🍎🍎apple 🍎apple",
    "new emoji 🫨 🫩 and \u0378 \U000fffff \U0001f9ff",
    "a\0b a\ufffdb a\x7fb a\x85b a\x0bb a\x0cb a\x1cb",
    "\0",
    "\ufeffbyte order mark, soft\u00adhyphen",
    "zero\u200bwidth\u200djoiner, no\u00a0break, ideographic\u3000space, line\u2028and\u2029paragraph, \u1680",
    "\ud7ff\ue000\U0010ffff\uf8ff",
    "[CLS] [SEP] [MASK] [UNK] [PAD] in the text",
    "[SEP]apple[MASK]apple [sep] [ SEP ] [[SEP]] [unused0] [SEP",
    "<|startoftext|> <|endoftext|> in the text",
    "<birb-style> by <s1><s2>",
    "(house:1.3) [on] a (hill:0.5), sun, (((sky)))",
    "C:\\path\\to\\file.png https://example.org/?a=1&b=2",
    "\\n \\u0041 %s {0} ${HOME} `rm` ##able ## # ##",
    "'; DROP TABLE prompts; --",
    "…—–“”‘’«»¿¡·•§¶†",
    "∀x∈ℝ: ⌈x⌉ ≥ x √2 ≠ π, x^2+y|z~`=$5 €5 £5 °C Å Ω K",
    "\x1b[31mred\x1b[0m \x07",
    "Ǆ ǅ ǆ ŉ ĳ Ĳ ſ ẛ ΐ ΰ ﬆ Ꭰ ꭰ Ა ა Ⓐ Ａ １",
]
POOLS = [
    "abcdefghijklmnopqrstuvwxyz      ",
    "ABCxyz0123456789 .,;:!?-_'\"/\\()[]{}<>|&#@$%^*+=~`",
    "äöüßéèêñçøåæœšžłđ ıİ\u0301\u0327",
    "&amp;&lt;&gt;&quot;&#233;&#x1F34E; ",
    "红绿蓝黄天地人山水火木金土 ",
    "あいうえおカキクケコ ",
    "אבגדה وزحطي ",
    "🍎🍏🍐🐶🚗🏽\u200d\ufe0f❤ ",
    "\0\t\n\r\x0b\u00a0\u2003\u3000\u200b ab",
    "абвгд αβγδ ΣΟ ",
]


def awkward_texts(count: int = 200) -> list[str]:
    rng = random.Random(20221123)
    texts = list(AWKWARD)
    while len(texts) < count:
        pools = rng.sample(POOLS, rng.randint(1, 3))
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.choice((3, 20, 80, 400)))))
    return texts


def tokenizer(context_length: int = 77) -> WordPieceTokenizer:
    return WordPieceTokenizer(VOCAB, context_length)


def pieces(text: str) -> list[str]:
    return [VOCAB[i] for i in tokenizer().encode(text)]


# By hand


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("A Red APPLE", ["a", "red", "apple"]),
        ("don't!?", ["don", "'", "t", "!", "?"]),
        ("naïve ÅNGSTRÖM", ["naive", "angstrom"]),
        ("İ ΟΔΟΣ", ["i", "οδοσ"]),  # no final sigma
        ("red苹果pie", ["red", "苹", "果", "pie"]),
        ("カタカナ", ["カタカナ"]),  # kana are no CJK characters here
        ("a\tb\nc\u3000d", ["a", "b", "c", "d"]),
        ("a\0b\u200bc\ufffdd\x1be", ["abcde"]),
        ("$5+x^2", ["$", "5", "+", "x", "^", "2"]),
        ("&amp;", ["&", "amp", ";"]),  # entities are left alone
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_the_longest_piece_first() -> None:
    assert pieces("unaffable apples apps") == ["un", "##aff", "##able", "apples", "app", "##s"]
    assert pieces("appless") == ["apples", "##s"], "not app ##les ##s"
    assert pieces("red9") == ["[UNK]"], "there is no ##9; a word is known wholly or not at all"
    assert pieces("xred") == ["x", "##r", "##ed"], "red stands only at the front"


def test_words_of_more_than_100_characters_are_unknown() -> None:
    assert pieces("a" * 100) == ["a"] + ["##a"] * 99
    assert pieces("a" * 101) == ["[UNK]"]
    assert pieces("e\u0301" * 100) == ["e"] + ["##e"] * 99, "counted without their accents"


def test_names_of_special_tokens_stand_for_them() -> None:
    assert pieces("a[MASK]red [SEP]") == ["a", "[MASK]", "red", "[SEP]"]
    assert pieces("[the]") == pieces("[ the ]") == ["[", "the", "]"]
    assert pieces("[mask]")[0] == "[", "in capitals only"


def test_start_end_and_padding() -> None:
    ids = tokenizer(6)(["a red apple", "", "a red apple the dog"])
    assert ids.dtype == torch.int64
    assert [[VOCAB[i] for i in row] for row in ids.tolist()] == [
        ["[CLS]", "a", "red", "apple", "[SEP]", "[PAD]"],
        ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]", "[PAD]"],
        ["[CLS]", "a", "red", "apple", "the", "[SEP]"],
    ]
    assert int(ids[0, -1]) == tokenizer().pad_id == 0
    assert tokenizer()(["a"]).shape == (1, 77)
    assert tokenizer()([]).shape == (0, 77)


def test_cut_says_what_was_lost() -> None:
    short = tokenizer(6)
    assert short.cut("a red apple.") == short.cut("") == ""
    assert short.cut("a red apple. The  DOG, unaffable") == "the dog , unaffable"
    assert short.cut("a red unaffable") == "able", "the end of a word"
    assert short.cut("a a a a Zyx9 🐶[MASK]##a") == "zyx9 🐶 [MASK] # # a", "unknown words as they are"
    text = " ".join(["apple"] * 74 + ["pear", "dog", "the"])
    lost = tokenizer().cut(text)
    assert lost and text.endswith(lost)
    assert torch.equal(tokenizer()([text]), tokenizer()([text.removesuffix(lost)]))


# Parity


@pytest.fixture(scope="module")
def theirs():
    library = pytest.importorskip("transformers")
    return library.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(VOCAB)})


@pytest.mark.parametrize("context_length", [77, 5, 2])
def test_200_awkward_texts(theirs, context_length: int) -> None:
    texts = awkward_texts()
    assert len(set(texts)) == 200
    expected = theirs(
        texts, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
    )
    actual = tokenizer(context_length)(texts)
    wrong = [
        text for text, a, b in zip(texts, actual, expected["input_ids"], strict=True) if not torch.equal(a, b)
    ]
    assert not wrong, wrong
    if context_length == 77:
        used = set(actual.flatten().tolist())
        assert len(used) > 150, "the texts try most of the vocabulary"


def test_pieces_behind_the_limit_too(theirs) -> None:
    for text in awkward_texts():
        assert tokenizer().encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


# Vocabulary files and errors


def test_vocabulary_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    texts = AWKWARD[3:6]
    for ending in ("\n", ""):
        path.write_text("\n".join(VOCAB) + ending, encoding="utf-8")
        for place in (path, str(path), tmp_path):
            read = WordPieceTokenizer(place)
            assert read.vocab_size == len(VOCAB)
            assert torch.equal(read(texts), tokenizer()(texts))
    path.write_bytes("\r\n".join(VOCAB).encode())
    assert torch.equal(WordPieceTokenizer(path)(texts), tokenizer()(texts))


def test_errors(tmp_path: Path) -> None:
    needed = "needed is vocab.txt of bert-base-uncased .* https://"
    for place in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"txt does not exist; {needed}"):
            WordPieceTokenizer(place)
    binary = tmp_path / "vocab.txt"
    binary.write_bytes(b"\x80\x04\xff")
    with pytest.raises(ValueError, match=f"vocab.txt is not UTF-8 text; {needed}"):
        WordPieceTokenizer(binary)
    binary.write_text("a\nb\n[UNK]\n[PAD]\n")
    with pytest.raises(ValueError, match=rf"vocab.txt lacks \[CLS\], \[SEP\], \[MASK\]; {needed}"):
        WordPieceTokenizer(binary)
    with pytest.raises(ValueError, match="the list holds 'red' twice"):
        WordPieceTokenizer([*VOCAB, "red"])
    with pytest.raises(ValueError, match="at least 2 .* got 1"):
        tokenizer(1)
