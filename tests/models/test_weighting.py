"""Weighted text: chunks, the four interpretations in closed form, clip skip, placeholders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import END_ID, START_ID, Tokenizer
from ldm.models.weighting import (
    BREAK,
    INTERPRETATIONS,
    Piece,
    chunks,
    clip_skip_layers,
    count_chunks,
    cut,
    encode,
    encode_each,
    skipping,
)
from ldm.weights import compvis
from ldm.weights.io import load_strict
from sample.prompts import at_step, parse

TOKENIZER = Tokenizer()
COMMA, WORD = TOKENIZER.encode(",")[0], TOKENIZER.encode("apple")[0]


def tower(**values) -> TextEncoder:
    torch.manual_seed(0)
    model = TextEncoder(TextConfig(**{"width": 16, "layers": 3, "heads": 2, "mlp_width": 32, **values}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> TextEncoder:
    return tower()


def plain(model: TextEncoder, *texts: str) -> Tensor:
    return model(TOKENIZER(list(texts)))


def words(count: int, *commas: int) -> str:
    """`count` words of one token each, those at `commas` replaced by a comma."""
    return " ".join("," if i in commas else "apple" for i in range(count))


def sizes(*texts: str, backtrack: int = 20) -> list[int]:
    pieces = [piece for text in texts for piece in (Piece(text), BREAK)][:-1]
    return [len(chunk) for chunk in chunks(pieces, TOKENIZER, backtrack)]


# Chunks


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])],
)
def test_chunks_of_75(count: int, expected: list[int]) -> None:
    assert sizes(words(count)) == expected


@pytest.mark.parametrize(
    ("comma", "expected"),
    [
        (55, [56, 24]),  # 19 tokens behind it move along, 20 back from the end
        (54, [75, 5]),  # too far
        (74, [75, 5]),  # at the end of the chunk
        (75, [75, 5]),  # first in the next one
        (60, [61, 19]),
    ],
)
def test_a_chunk_ends_at_a_comma_nearby(comma: int, expected: list[int]) -> None:
    assert sizes(words(80, comma)) == expected
    assert sizes(words(80, comma), backtrack=0) == [75, 5]


def test_the_last_comma_counts_and_nothing_is_lost() -> None:
    text = words(200, 56, 60, 70, 100, 140)
    found = chunks([Piece(text, 1.3)], TOKENIZER)
    assert [len(chunk) for chunk in found] == [71, 70, 59]
    assert [i for chunk in found for i, _ in chunk] == TOKENIZER.encode(text)
    assert {weight for chunk in found for _, weight in chunk} == {1.3}
    assert all(chunk[-1][0] == COMMA for chunk in found[:2])


def test_breaks() -> None:
    assert sizes("a", "b c") == [1, 2]
    assert sizes("a", "") == [1]
    assert sizes("", "a") == [0, 1]
    assert sizes("", "", "a") == [0, 0, 1]
    assert sizes(words(80), words(3)) == [75, 5, 3]
    # a comma before a break is none of the new chunk's
    assert sizes(words(60, 59), words(80)) == [60, 75, 5]


def test_vectors_of_a_placeholder_stay_together() -> None:
    tokenizer = Tokenizer()
    ids = tokenizer.add_placeholder("<cat>", 4)
    found = chunks([Piece(words(73) + " "), Piece("<cat> apple", 1.5)], tokenizer)
    assert [len(chunk) for chunk in found] == [73, 5]
    assert found[1] == [(i, 1.5) for i in [*ids, WORD]]
    assert [len(c) for c in chunks([Piece(words(71) + " <cat>")], tokenizer)] == [75]
    tokenizer.add_placeholder("<dog>", 76)
    with pytest.raises(ValueError, match="placeholder of 76 vectors does not fit into a chunk of 75 tokens"):
        chunks([Piece("<dog>")], tokenizer)


# Encoding


@pytest.mark.parametrize("interpretation", INTERPRETATIONS)
def test_without_weights_it_is_the_plain_encoding(model: TextEncoder, interpretation: str) -> None:
    texts = ["", "a red apple, fluent 3d emoji", words(75)]
    context = encode([[Piece(text)] for text in texts], TOKENIZER, model, interpretation)
    assert torch.equal(context, plain(model, *texts))


MODEL = tower()


@pytest.fixture(autouse=True, scope="module")
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Else it writes into the checkout; as it does, when tests are collected, for a @given outside a function
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


def test_any_plain_prompt_is_the_plain_encoding() -> None:
    """From the typed text on, bit for bit."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_characters="\\()[]:|", exclude_categories=("Cs",)), max_size=60))
    def check(text: str) -> None:
        if "AND" in text or "BREAK" in text or len(TOKENIZER.encode(text)) > 75:
            return
        ((weight, pieces),) = at_step(parse(text), 0, 1)
        assert weight == 1
        assert torch.equal(encode([pieces], TOKENIZER, MODEL), plain(MODEL, text))

    check()


@pytest.mark.parametrize("padding", ["end", "zero"])
def test_chunks_follow_each_other(padding: str) -> None:
    tokenizer, model = Tokenizer(padding=padding), tower(padding=padding)
    context = encode([[Piece("a red apple"), BREAK, Piece("on a table")]], tokenizer, model)
    expected = model(tokenizer(["a red apple", "on a table"]))
    assert context.shape == (1, 154, 16)
    assert torch.equal(context[0], expected.reshape(154, 16))


def test_shorter_prompts_end_in_empty_ones(model: TextEncoder) -> None:
    context = encode([[Piece(words(80))], [Piece("pear")]], TOKENIZER, model)
    expected = plain(model, words(75), words(5), "pear", "")
    assert_close(context.reshape(4, 77, 16), expected, rtol=0, atol=1e-6)
    more = encode([[Piece("pear")]], TOKENIZER, model, at_least=3)
    assert_close(more.reshape(3, 77, 16), plain(model, "pear", "", ""), rtol=0, atol=1e-6)
    assert encode([], TOKENIZER, model).shape == (0, 77, 16)


def weighted(*texts: str, weight: float = 1.4) -> list[Piece]:
    """Pieces in turn of weight 1 and of another."""
    return [Piece(text, (1.0, weight)[i % 2]) for i, text in enumerate(texts)]


def factors(weight: float = 1.4) -> Tensor:
    """of "a red apple on": start, a, and two tokens with the weight."""
    w = torch.ones(77, 1)
    w[2:4] = weight
    return w


def test_no_norm(model: TextEncoder) -> None:
    context = encode([weighted("a", "red apple", "on")], TOKENIZER, model, "no_norm")
    assert_close(context[0], plain(model, "a red apple on")[0] * factors(), rtol=1e-6, atol=0)


def test_original_keeps_the_mean_of_each_chunk(model: TextEncoder) -> None:
    prompts = [weighted("a", "red apple", "on"), weighted("a", "blue pear", "on", weight=0.3)]
    context = encode(prompts, TOKENIZER, model)
    for row, text, weight in zip(context, ["a red apple on", "a blue pear on"], [1.4, 0.3], strict=True):
        z = plain(model, text)[0]
        expected = z * factors(weight)
        assert_close(row, expected * (z.mean() / expected.mean()), rtol=1e-5, atol=1e-6)
        assert_close(row.mean(), z.mean(), rtol=1e-5, atol=1e-7)
    # each prompt by itself: a neighbour changes nothing
    alone = encode(prompts[1:], TOKENIZER, model)
    assert_close(alone[0], context[1], rtol=0, atol=1e-6)
    # the second chunk has no weights, so it stays as it is
    two = encode([[*prompts[0], BREAK, Piece("pear")]], TOKENIZER, model)[0]
    assert_close(two[:77], context[0], rtol=0, atol=1e-6)
    assert_close(two[77:], plain(model, "pear")[0], rtol=0, atol=1e-6)


def test_ignore(model: TextEncoder) -> None:
    context = encode([weighted("a", "red apple", "on")], TOKENIZER, model, "ignore")
    assert_close(context, plain(model, "a red apple on"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.4, -1.0])
def test_comfy_interpolates_from_the_empty_prompt(model: TextEncoder, weight: float) -> None:
    context = encode([weighted("a", "red apple", "on", weight=weight)], TOKENIZER, model, "comfy")
    z, empty = plain(model, "a red apple on")[0], plain(model, "")[0]
    assert_close(context[0], empty + factors(weight) * (z - empty), rtol=1e-5, atol=1e-6)
    assert_close(context[0, [0, 1, 4]], z[[0, 1, 4]], rtol=0, atol=1e-6)
    if weight == 0:
        assert_close(context[0, 2:4], empty[2:4], rtol=0, atol=1e-6)


def test_interpretations_differ(model: TextEncoder) -> None:
    prompt = [weighted("a", "red apple", "on")]
    found = [encode(prompt, TOKENIZER, model, name) for name in INTERPRETATIONS]
    assert len(found) == 4
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[i + 1 :])


def test_a_typed_prompt(model: TextEncoder) -> None:
    """From text to context: the weights reach the tokens they were typed at, placeholders included."""
    tokenizer, bigger = Tokenizer(), tower(vocab_size=49410)
    tokenizer.add_placeholder("<cat>", 2)
    ((_, pieces),) = at_step(parse("a (<cat>:1.5) [apple]"), 0, 1)
    context = encode([pieces], tokenizer, bigger, "no_norm")[0]
    z = bigger(tokenizer(["a <cat> apple"]))[0]
    w = torch.ones(77, 1)
    w[2:4], w[4] = 1.5, 1 / 1.1
    assert_close(context, z * w, rtol=1e-6, atol=0)


def test_half_precision_stays(model: TextEncoder) -> None:
    half = tower().to(torch.bfloat16)
    context = encode([weighted("a", "red apple", "on")], TOKENIZER, half)
    assert context.dtype == torch.bfloat16
    exact = encode([weighted("a", "red apple", "on")], TOKENIZER, model)
    assert_close(context.float(), exact, rtol=0.1, atol=0.1)


# Limits


@pytest.mark.parametrize("count", [3, 75, 76, 200])
def test_a_limit_keeps_what_the_tokenizer_keeps(count: int) -> None:
    text, recording = words(count, 60), Recording()
    encode([[Piece(text)]], TOKENIZER, recording, limit=1, backtrack=0)
    assert torch.equal(recording.seen[0], TOKENIZER([text]))
    assert cut([Piece(text)], TOKENIZER, 1, backtrack=0) == TOKENIZER.cut(text)


def test_a_limit_keeps_the_first_chunks(model: TextEncoder) -> None:
    pieces = [Piece(words(80), 1.2), BREAK, Piece("on a table"), BREAK, Piece("at night")]
    every = encode([pieces], TOKENIZER, model)
    assert every.shape[1] == 4 * 77 == 77 * count_chunks(pieces, TOKENIZER)
    for limit in (1, 2, 3, 4, 5):
        found = encode([pieces], TOKENIZER, model, limit=limit)
        assert_close(found, every[:, : limit * 77], rtol=0, atol=1e-6)
    shorter = encode([pieces, [Piece("pear")]], TOKENIZER, model, limit=1)
    assert shorter.shape == (2, 77, 16)
    assert encode([pieces], TOKENIZER, model, limit=1, at_least=2).shape == (1, 154, 16)


def test_what_a_limit_cuts_in_words() -> None:
    tokenizer = Tokenizer()
    tokenizer.add_placeholder("<cat>", 3)
    pieces = [Piece(words(75) + " pear"), Piece(" , plum", 1.3), BREAK, Piece("a <cat> on a table")]
    assert cut(pieces, tokenizer, 1) == "pear , plum a <cat> on a table"
    assert cut(pieces, tokenizer, 2) == "a <cat> on a table"
    assert cut(pieces, tokenizer, 3) == cut(pieces, tokenizer, None) == ""
    assert cut([Piece("a"), BREAK, Piece("b")], tokenizer, 1) == "b"
    # back to the comma, so that more is lost than what does not fit
    text = words(74, 73) + " pear plum"
    assert cut([Piece(text)], tokenizer, 1) == "pear plum"
    assert cut([Piece(text)], tokenizer, 1, backtrack=0) == "plum"


def test_count_of_chunks() -> None:
    assert count_chunks([Piece("")], TOKENIZER) == count_chunks([Piece(words(75))], TOKENIZER) == 1
    assert count_chunks([Piece(words(76))], TOKENIZER) == 2
    assert count_chunks([Piece("a"), BREAK, Piece("b"), BREAK, Piece("c")], TOKENIZER) == 3
    assert count_chunks([Piece(words(148, 70))], TOKENIZER) == 3
    assert count_chunks([Piece(words(148, 70))], TOKENIZER, backtrack=0) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_out_of_range(model: TextEncoder, limit: int) -> None:
    calls = [
        lambda: encode([[Piece("a")]], TOKENIZER, model, limit=limit),
        lambda: encode_each([[Piece("a")]], TOKENIZER, model, limit=limit),
        lambda: cut([Piece("a")], TOKENIZER, limit),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"limit of chunks must be at least 1, got {limit}"):
            call()


# A context for each


@pytest.mark.parametrize("repeat_end", [False, True])
@pytest.mark.parametrize("interpretation", INTERPRETATIONS)
def test_each_prompt_as_if_alone(interpretation: str, repeat_end: bool) -> None:
    model = tower(repeat_end=repeat_end)
    prompts = [
        [Piece("pear")],
        [Piece(words(80)), BREAK, Piece("plum", 0.4)],
        weighted("a", "red apple", "on"),
        [Piece("")],
        [Piece("pear")],
    ]
    found = encode_each(prompts, TOKENIZER, model, interpretation)
    assert [len(context[0]) for context in found] == [77, 231, 77, 77, 77]
    for pieces, context in zip(prompts, found, strict=True):
        alone = encode([pieces], TOKENIZER, model, interpretation)
        assert_close(context, alone, rtol=1e-6, atol=2e-6)
    assert found[0] is found[4]
    kept = encode_each(prompts, TOKENIZER, model, interpretation, limit=1, backtrack=0, skip=1)
    for pieces, context in zip(prompts, kept, strict=True):
        alone = encode([pieces], TOKENIZER, model, interpretation, limit=1, backtrack=0, skip=1)
        assert_close(context, alone, rtol=1e-6, atol=2e-6)


def test_each_distinct_chunk_is_encoded_once() -> None:
    recording = Recording()
    prompts = [[Piece("a")], [Piece("a", 1.3)], [Piece("b"), BREAK, Piece("a")], [Piece("a")], [Piece("")]]
    encode_each(prompts, TOKENIZER, recording)
    (ids,) = recording.seen
    assert sorted(ids.tolist()) == sorted(TOKENIZER(["a", "b", ""]).tolist())
    assert encode_each([], TOKENIZER, recording) == []


# Clip skip


@pytest.mark.parametrize("value", [1, 2, 3])
def test_clip_skip_against_transformers(value: int) -> None:
    """The web UI's 2 is diffusers' 1: the final norm of `hidden_states[-(clip_skip + 1)]`."""
    library = pytest.importorskip("transformers")
    config = library.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    theirs = library.CLIPTextModel(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = tower()
    load_strict(ours, compvis.to_ours(theirs.state_dict(), ours.config), "transformers")
    ids = TOKENIZER(["a red apple"])
    states = theirs(ids, output_hidden_states=True)
    clip_skip = value - 1
    expected = ours.final_norm(states.hidden_states[-(clip_skip + 1)])
    if clip_skip == 0:
        assert_close(expected, states.last_hidden_state, rtol=0, atol=1e-6)
    for skip in (clip_skip_layers(value), clip_skip_layers(clip_skip, "diffusers")):
        context = encode([[Piece("a red apple")]], TOKENIZER, ours, skip=skip)
        assert_close(context, expected, rtol=1e-5, atol=1e-5)


def test_clip_skip_of_nothing() -> None:
    assert clip_skip_layers(1) == clip_skip_layers(0, "diffusers") == 0
    with pytest.raises(ValueError, match=r"clip skip must be at least 1 \(which skips nothing\), got 0"):
        clip_skip_layers(0)
    with pytest.raises(ValueError, match=r"clip skip must be at least 0 \(which skips nothing\), got -1"):
        clip_skip_layers(-1, "diffusers")
    with pytest.raises(ValueError, match="one of webui, diffusers, got 'novelai'"):
        clip_skip_layers(2, "novelai")


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip(trained: int, skip: int) -> None:
    """The states before the last `skip` layers of those that are used, after the final norm."""
    model = tower(skip_layers=trained)
    ids = TOKENIZER(["a red apple"])
    expected = model.final_norm(model.hidden(ids, trained + skip))
    context = encode([[Piece("a red apple")]], TOKENIZER, model, skip=skip)
    assert torch.equal(context, expected)
    assert model.config.skip_layers == trained  # the model itself is as before
    if skip:
        assert not torch.allclose(context, model(ids))


@pytest.mark.parametrize("skip", [3, -1])
def test_clip_skip_out_of_range(model: TextEncoder, skip: int) -> None:
    with pytest.raises(ValueError, match=rf"text skip_layers must be in 0..2, got {skip}"):
        skipping(model, skip)


def test_models_that_repeat_the_end(model: TextEncoder) -> None:
    repeating = tower(repeat_end=True)
    context = encode([[Piece("a red"), Piece(" apple", 1.4)]], TOKENIZER, repeating, "no_norm")
    z = repeating(TOKENIZER(["a red apple"]))[0]
    w = torch.ones(77, 1)
    w[3] = 1.4
    assert_close(context[0], z * w, rtol=1e-6, atol=0)


# Errors


def test_errors(model: TextEncoder) -> None:
    with pytest.raises(ValueError, match="one of original, no_norm, ignore, comfy, got 'compel'"):
        encode([[Piece("a")]], TOKENIZER, model, "compel")
    for weight in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"weight of 'apple' must be a finite number, got {weight}"):
            encode([[Piece("a"), Piece("apple", weight)]], TOKENIZER, model)


class Recording(TextEncoder):
    """A tower that notes what it is given."""

    def __init__(self) -> None:
        super().__init__(TextConfig(width=16, layers=1, heads=2, mlp_width=32))
        self.seen: list[Tensor] = []

    def forward(self, ids):
        self.seen.append(ids)
        return super().forward(ids)


def test_rows_are_framed() -> None:
    """Start and end tokens around each chunk: what the tower is given."""
    recording = Recording()
    encode([[Piece(words(76))]], TOKENIZER, recording)
    (ids,) = recording.seen
    assert ids[:, 0].tolist() == [START_ID] * 2
    assert ids[0, 1:76].tolist() == [WORD] * 75 and ids[0, 76] == END_ID
    assert ids[1, 1:].tolist() == [WORD] + [END_ID] * 75
