"""The text encoder's behaviour: causal, independent of the batch, both activations, padding that carries nothing."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.models.clip import TextConfig, TextEncoder, quick_gelu
from ldm.models.tokenizer import END_ID, START_ID

SMALL = {"context_length": 24, "width": 16, "layers": 3, "heads": 2, "mlp_width": 32}


def encoder(**values) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(**{**SMALL, **values})).eval().requires_grad_(False)


def prompts(*lengths: int, padding: int = END_ID, total: int = 24) -> Tensor:
    """Start, `length` words, end, padding."""
    rows = [[START_ID, *range(500, 500 + length), END_ID] for length in lengths]
    return torch.tensor([row + [padding] * (total - len(row)) for row in rows], dtype=torch.int64)


def test_activations() -> None:
    x = torch.linspace(-4, 4, 9)
    assert_close(quick_gelu(x), torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]))
    ids = prompts(5)
    assert not torch.allclose(encoder()(ids), encoder(activation="gelu")(ids), atol=1e-4)


def test_a_token_sees_only_those_before_it() -> None:
    model, ids = encoder(), prompts(10)
    changed = ids.clone()
    changed[0, 6] = 77
    before, after = model(ids), model(changed)
    assert_close(before[:, :6], after[:, :6], rtol=0, atol=0)
    assert all(not torch.allclose(before[:, i], after[:, i], atol=1e-5) for i in range(6, 24))


def test_a_prompt_does_not_depend_on_its_batch() -> None:
    model, ids = encoder(), prompts(2, 7, 15)
    together = model(ids)
    for i in range(3):
        assert_close(together[i : i + 1], model(ids[i : i + 1]), rtol=0, atol=1e-5)


def test_shorter_ids_give_the_same_states() -> None:
    model, ids = encoder(), prompts(5)
    assert_close(model(ids[:, :9]), model(ids)[:, :9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("skip", [0, 1])
def test_repeat_end_keeps_the_prompt_and_repeats_its_end(skip: int) -> None:
    plain, padded = encoder(skip_layers=skip), encoder(skip_layers=skip, repeat_end=True)
    lengths = (0, 3, 9, 22)
    ids = prompts(*lengths)
    expected, actual = plain(ids), padded(ids)
    assert actual.shape == expected.shape == (4, 24, 16)
    for row, length in enumerate(lengths):
        end = length + 2  # the end token is kept
        assert_close(actual[row, :end], expected[row, :end], rtol=0, atol=1e-5)
        assert_close(actual[row, end:], actual[row, end - 1 : end].expand(24 - end, -1), rtol=0, atol=0)


def test_repeat_end_does_not_depend_on_the_batch_or_the_padding_id() -> None:
    model = encoder(repeat_end=True)
    together = model(prompts(1, 4, 20))
    for row, length in enumerate((1, 4, 20)):
        assert_close(together[row : row + 1], model(prompts(length)), rtol=0, atol=1e-5)
        assert_close(together[row : row + 1], model(prompts(length, padding=0)), rtol=0, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match="takes 24 tokens, got 25"):
        encoder()(prompts(5, total=25))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "relu"}, "quick_gelu, gelu, got 'relu'"),
        ({"padding": "left"}, "'end' or 'zero', got 'left'"),
        ({"heads": 3}, "width 16 must be a multiple of heads 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"skip_layers": 3}, "skip_layers must be in 0..2, got 3"),
    ],
)
def test_errors_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**{**SMALL, **values})
