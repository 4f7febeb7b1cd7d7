"""New words: only their rows move, prompts find them, nothing else changes, and each mistake is told."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.textual_inversion import TextualInversion, initial_vectors, textual_inversion
from ldm.models.tokenizer import END_ID, START_ID, Tokenizer
from ldm.models.weighting import Piece, encode, skipping

WIDTH = 16
SMALL = {"width": WIDTH, "layers": 2, "heads": 2, "mlp_width": 32}


def tower(**values) -> tuple[TextEncoder, Tokenizer]:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(**{**SMALL, **values})).eval().requires_grad_(False), Tokenizer()


def new_words(**values: int) -> tuple[TextEncoder, Tokenizer, TextualInversion]:
    """A tower with new words: name and number of vectors, `a_b` for <a-b>."""
    encoder, tokenizer = tower()
    inversion = textual_inversion(encoder, tokenizer)
    for name, count in values.items():
        inversion.add(f"<{name.replace('_', '-')}>", torch.randn(count, WIDTH))
    return encoder, tokenizer, inversion


def states(encoder: TextEncoder, tokenizer: Tokenizer, *texts: str) -> Tensor:
    return encoder(tokenizer(list(texts)))


def reference(encoder: TextEncoder, tokenizer: Tokenizer, *texts: str) -> Tensor:
    """The same from a tower whose table really holds the new rows behind the old ones."""
    assert encoder.with_new_words is not None
    rows = torch.cat([*encoder.with_new_words.__self__.rows]).detach()
    grown = copy.deepcopy(encoder)
    grown.with_new_words = None
    table = torch.cat([grown.token_embedding.weight, rows])
    grown.token_embedding = torch.nn.Embedding.from_pretrained(table)
    return grown(tokenizer(list(texts)))


# What a new word says


def test_it_is_the_table_with_the_rows_behind_it() -> None:
    encoder, tokenizer, _ = new_words(cat=1, dog_toy=3)
    texts = ["a photo of <cat>", "<dog-toy> beside a <cat>, <dog-toy>", "a red apple", ""]
    assert torch.equal(states(encoder, tokenizer, *texts), reference(encoder, tokenizer, *texts))


def test_prompts_without_a_new_word_keep_their_states() -> None:
    encoder, tokenizer = tower()
    before = states(encoder, tokenizer, "a red apple", "")
    textual_inversion(encoder, tokenizer).add("<cat>", torch.randn(2, WIDTH))
    assert torch.equal(states(encoder, tokenizer, "a red apple", ""), before)


def test_a_copy_of_a_vocabulary_row_is_that_word() -> None:
    encoder, tokenizer = tower()
    inversion = textual_inversion(encoder, tokenizer)
    inversion.add("<cat>", initial_vectors(encoder, tokenizer, "apple"))
    inversion.add("<two>", initial_vectors(encoder, tokenizer, "apple", 2))
    said = states(encoder, tokenizer, "a <cat> here", "a <two> here")
    assert torch.equal(said, states(encoder, tokenizer, "a apple here", "a apple apple here"))
    again = initial_vectors(encoder, tokenizer, "<cat>")
    assert torch.equal(again, inversion.vectors("<cat>"))


@pytest.mark.parametrize(
    ("token", "said", "not_said"),
    [
        ("<s1>", "a<s1>b", "a <s12> b"),
        ("birb_style", "a birb_style, (Birb_Style)", "a birb_styles xbirb_style birb_style2"),
        ("dark.knight(2)", "in dark.knight(2)x style", "in darkxknight(2) style"),
        ("häß wort", "ein HÄß Wort", "ein häß worte"),
        ("~*~", "a ~*~", "a ~~*"),
    ],
)
def test_any_signs_and_whole_words(token: str, said: str, not_said: str) -> None:
    encoder, tokenizer = tower()
    textual_inversion(encoder, tokenizer).add(token, torch.randn(1, WIDTH))
    assert END_ID + 1 in tokenizer.encode(said)
    assert tokenizer.encode(not_said) == Tokenizer().encode(not_said)


def test_weights_reach_all_vectors_and_chunks_keep_them_together() -> None:
    encoder, tokenizer, _ = new_words(cat=4)
    text = " ".join(["apple"] * 73) + " "
    [context] = encode([[Piece(text), Piece("<cat>", 1.5)]], tokenizer, encoder, "no_norm")
    assert len(context) == 2 * 77
    plain = states(encoder, tokenizer, "<cat>")[0]
    assert_close(context[78:82], 1.5 * plain[1:5], rtol=0, atol=1e-6)
    assert_close(context[82:], plain[5:], rtol=0, atol=1e-6)


def test_clip_skip_knows_the_word() -> None:
    encoder, tokenizer, _ = new_words(cat=2)
    skipped = skipping(encoder, 1)
    alone, other = states(skipped, tokenizer, "<cat>"), states(skipped, tokenizer, "cat")
    assert not torch.allclose(alone[:, 1], other[:, 1], atol=1e-3)


def test_the_end_is_the_end_token_not_the_greatest_id() -> None:
    """The trap of pooled outputs: the end found by `ids.argmax()` would be the new word, behind all ids."""
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(**SMALL, repeat_end=True)).eval().requires_grad_(False)
    tokenizer = Tokenizer()
    textual_inversion(encoder, tokenizer).add("<cat>", torch.randn(2, WIDTH))
    ids = tokenizer(["a <cat> and a red apple"])
    end = ids[0].tolist().index(END_ID)
    assert int(ids.argmax()) < end, "the trap is there"
    plain = copy.copy(encoder)
    plain.config = TextConfig(**SMALL)
    pooled = encoder(ids)[:, -1]  # what a UNet with pooled_context reads
    assert_close(pooled, plain(ids)[:, end], rtol=0, atol=1e-6)
    assert not torch.allclose(pooled, encoder(tokenizer(["a <cat> and a red pear"]))[:, -1], atol=1e-4)


# What training may touch


def test_only_the_new_rows_move_weight_decay_included() -> None:
    encoder, tokenizer, inversion = new_words(cat=2, dog=1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    rows = {token: inversion.vectors(token) for token in inversion.tokens}
    assert [p.shape for p in inversion.parameters()] == [(2, WIDTH), (1, WIDTH)]
    assert [*inversion.state_dict()] == ["rows.0", "rows.1"]
    inversion.rows[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(inversion.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        states(encoder, tokenizer, "a <cat> and a <dog>").square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [*before] == [*tower()[0].state_dict()], "the tower's file is what it was"
    assert not torch.isclose(inversion.vectors("<cat>"), rows["<cat>"]).any()
    assert torch.equal(inversion.vectors("<dog>"), rows["<dog>"])
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_vectors_one_by_one() -> None:
    encoder, tokenizer, inversion = new_words(cat=3, dog=1)
    inversion.use("<cat>", 1)
    assert tokenizer.encode("<cat><dog>") == [END_ID + 1, END_ID + 4]
    states(encoder, tokenizer, "a <cat>").sum().backward()
    grad = inversion.rows[0].grad
    assert grad is not None
    assert grad[0].any()
    assert not grad[1:].any()
    inversion.use("<cat>", 3)
    assert tokenizer.encode("<cat><dog>") == [END_ID + i for i in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="'<cat>' has 3 vectors; 4 of them cannot be used"):
        inversion.use("<cat>", 4)


def test_removing_a_word_leaves_the_others() -> None:
    encoder, tokenizer, inversion = new_words(cat=2, dog=1)
    texts = ("a <dog>", "an apple")
    before, rows = states(encoder, tokenizer, *texts), inversion.vectors("<dog>")
    inversion.remove("<CAT>")
    assert torch.equal(states(encoder, tokenizer, *texts), before)
    assert tokenizer.encode("<cat>") == Tokenizer().encode("<cat>")
    assert torch.equal(inversion.vectors("<dog>"), rows)
    inversion.remove("<dog>")
    assert torch.equal(states(encoder, tokenizer, *texts), states(*tower(), *texts))
    inversion.add("<cat>", rows)
    assert tokenizer.encode("<cat>") == [END_ID + 1]
    with pytest.raises(ValueError, match="no new word '<dog>', only <cat>"):
        inversion.remove("<dog>")


def test_one_for_a_tower_in_its_number_format() -> None:
    encoder, tokenizer, inversion = new_words(cat=1)
    assert textual_inversion(encoder, tokenizer) is inversion
    encoder.bfloat16()
    assert states(encoder, tokenizer, "a <cat>").dtype == torch.bfloat16
    assert inversion.rows[0].dtype == torch.float32


def test_ids_of_a_prompt() -> None:
    _, tokenizer, _ = new_words(cat=2)
    ids = tokenizer(["a photo of <cat>"])[0].tolist()
    assert ids[:7] == [START_ID, 320, 1125, 539, END_ID + 1, END_ID + 2, END_ID]


# Mistakes


@pytest.mark.parametrize(
    ("token", "vectors", "message"),
    [
        ("cat", torch.zeros(1, WIDTH), "'cat' is a token already"),
        ("<CAT>", torch.zeros(1, WIDTH), "'<cat>' is a token already; .* '<cat-1>'"),
        (" ", torch.zeros(1, WIDTH), "needs a name"),
        ("<x>", torch.zeros(1, 8), r"'<x>' has width 8; the model's text tower has 16"),
        ("<x>", torch.zeros(1, 1024), r"has width 1024 \(Stable Diffusion 2\); .* has 16"),
        ("<x>", torch.zeros(0, WIDTH), r"must be of shape \(vectors, width\), got \(0, 16\)"),
        ("<x>", torch.full((1, WIDTH), torch.nan), "'<x>' holds NaN"),
    ],
)
def test_what_cannot_be_added(token: str, vectors: Tensor, message: str) -> None:
    _, tokenizer, inversion = new_words(cat=1)
    with pytest.raises(ValueError, match=message) as raised:
        inversion.add(token, vectors)
    assert "\n" not in str(raised.value)
    assert inversion.tokens == ["<cat>"] == [*tokenizer.placeholders]
    assert len(inversion.rows) == 1


@pytest.mark.parametrize(
    ("word", "count", "message"),
    [
        ("red apple", 1, r"'red apple' is 2 tokens \('red', 'apple'\); choose a word of one"),
        ("", 1, "initial word '' is empty"),
        ("apple", 0, "at least one vector, got 0"),
        ("<cat>", 1, "'<cat>' is 2 tokens"),
    ],
)
def test_initial_words(word: str, count: int, message: str) -> None:
    encoder, tokenizer, _ = new_words(cat=2)
    with pytest.raises(ValueError, match=message):
        initial_vectors(encoder, tokenizer, word, count)
