"""Weighted text of any length to a context, as the web UIs do it: chunks of 75 tokens, states weighted.

A prompt comes as pieces of text with a weight each (`sample/prompts.py` makes them of a typed prompt). Its
tokens fill chunks that the text tower encodes one by one, and the chunks' hidden states follow one another:
(B, 77 k, D). What a weight does to the states of its tokens is one of `INTERPRETATIONS`. Stands between the
prompt and `TextEncoder`; for CLIP only, whose tokens and chunks these are.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ldm.models.clip import TextEncoder
from ldm.models.tokenizer import END_ID, START_ID, Tokenizer

Chunk = list[tuple[int, float]]  # (token id, weight) of what stands between the start and the end token


class Piece(NamedTuple):
    """Text and the weight of its tokens."""

    text: str
    weight: float = 1.0


BREAK = Piece("BREAK", -1.0)  # ends the chunk; text of this name never has this weight


def original(
    z: Float[Tensor, "N T D"], weights: Float[Tensor, "N T"], empty: Float[Tensor, "1 T D"]
) -> Float[Tensor, "N T D"]:
    """w z, scaled back to the mean that z had over all tokens and channels of its chunk."""
    weighted = no_norm(z, weights, empty)
    before, after = (each.mean(dim=(1, 2), keepdim=True) for each in (z, weighted))
    return weighted * torch.where(after == 0, torch.ones_like(after), before / after)


def no_norm(
    z: Float[Tensor, "N T D"], weights: Float[Tensor, "N T"], empty: Float[Tensor, "1 T D"]
) -> Float[Tensor, "N T D"]:
    """w z."""
    return z * weights[..., None]


def ignore(
    z: Float[Tensor, "N T D"], weights: Float[Tensor, "N T"], empty: Float[Tensor, "1 T D"]
) -> Float[Tensor, "N T D"]:
    """z: the brackets are gone from the text, and that is all."""
    return z


def interpolate(
    z: Float[Tensor, "N T D"], weights: Float[Tensor, "N T"], empty: Float[Tensor, "1 T D"]
) -> Float[Tensor, "N T D"]:
    """z_empty + w (z - z_empty), against the empty prompt's states at the same places; as ComfyUI does."""
    return torch.where(weights[..., None] == 1, z, empty + weights[..., None] * (z - empty))


Interpretation = Callable[[Tensor, Tensor, Tensor], Tensor]
INTERPRETATIONS: dict[str, Interpretation] = {
    "original": original,  # the web UI's names
    "no_norm": no_norm,
    "ignore": ignore,
    "comfy": interpolate,
}


def chunks(pieces: Sequence[Piece], tokenizer: Tokenizer, backtrack: int = 20) -> list[Chunk]:
    """The tokens of a prompt in chunks of at most context_length - 2, at least one chunk.

    A chunk ends at a BREAK, or where it is full: then at its last comma, if that is one of its last
    `backtrack` tokens, so that what belongs together stays together (0 never looks back). The vectors of a
    placeholder are never parted; ValueError where they do not fit into one chunk.
    """
    size = tokenizer.context_length - 2
    comma = tokenizer.encode(",")
    vectors = {ids[0]: len(ids) for ids in tokenizer.placeholders.values()}
    done: list[Chunk] = []
    chunk: Chunk = []
    last_comma = -1
    for piece in pieces:
        if piece == BREAK:
            done.append(chunk)
            chunk, last_comma = [], -1
            continue
        ids = tokenizer.encode(piece.text)
        position = 0
        while position < len(ids):
            unit = ids[position : position + vectors.get(ids[position], 1)]
            if len(unit) > size:
                raise ValueError(
                    f"a placeholder of {len(unit)} vectors does not fit into a chunk of {size} tokens"
                )
            if unit == comma:
                last_comma = len(chunk)
            elif len(chunk) == size and last_comma >= 0 and size - last_comma <= backtrack:
                done.append(chunk[: last_comma + 1])
                chunk, last_comma = chunk[last_comma + 1 :], -1
            if len(chunk) + len(unit) > size:
                done.append(chunk)
                chunk, last_comma = [], -1
            chunk += [(i, piece.weight) for i in unit]
            position += len(unit)
    if chunk or not done:
        done.append(chunk)
    return done


def skipping(text_encoder: TextEncoder, layers: int) -> TextEncoder:
    """The tower that stops `layers` layers before where it was trained to, with the same weights.

    That is diffusers' `clip_skip`; the web UI's "Clip skip" counts from 1, which skips nothing, so that its 2
    is 1 here. Raises ValueError where no layer is left.
    """
    other = copy.copy(text_encoder)  # shares its modules
    other.config = replace(text_encoder.config, skip_layers=text_encoder.config.skip_layers + layers)
    return other


def encode(
    prompts: Sequence[Sequence[Piece]],
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    interpretation: str = "original",
    *,
    skip: int = 0,
    backtrack: int = 20,
    at_least: int = 1,
) -> Float[Tensor, "B T D"]:
    """The context of each prompt, T = k context_length for the k chunks of the longest of them.

    Shorter ones end in chunks of the empty prompt: encode prompts of other lengths apart (guidance takes
    those as they are) where a picture must not depend on its neighbours. Of one chunk without weights it is
    `text_encoder(tokenizer(texts))`. Weights count for their chunk alone, also in "original", where the web
    UI takes the mean over all prompts of a batch.

    Args:
        interpretation: of the weights, a key of INTERPRETATIONS.
        skip: layers of the tower to leave out, see `skipping`.
        backtrack: how far to look back for a comma, see `chunks`.
        at_least: chunks to give, where the longest prompt has fewer.

    Raises ValueError for an unknown interpretation, a weight that is not finite, and as the two above.
    """
    if interpretation not in INTERPRETATIONS:
        raise ValueError(
            f"interpretation of weights must be one of {', '.join(INTERPRETATIONS)}, got {interpretation!r}"
        )
    for piece in (piece for pieces in prompts for piece in pieces):
        if not math.isfinite(piece.weight):
            raise ValueError(f"weight of {piece.text!r} must be a finite number, got {piece.weight}")
    split = [chunks(pieces, tokenizer, backtrack) for pieces in prompts]
    count = max([at_least, *map(len, split)])
    rows = [chunk for prompt in split for chunk in [*prompt, *[[]] * (count - len(prompt))]]

    def padded(chunk: Chunk) -> tuple[int, ...]:
        ids = [START_ID, *(i for i, _ in chunk), END_ID]
        return *ids, *[tokenizer.pad_id] * (tokenizer.context_length - len(ids))

    weighted = any(weight != 1 for row in rows for _, weight in row)
    texts = [padded(row) for row in rows]
    # Each text once, in order; the empty one last, where weights may be taken against it
    distinct = list(dict.fromkeys([*texts, padded([])] if weighted else texts))
    ids = torch.tensor(distinct, dtype=torch.int64, device=text_encoder.token_embedding.weight.device)
    ids = ids.reshape(-1, tokenizer.context_length)
    states = skipping(text_encoder, skip)(ids)  # (N, T, D)
    z = states[[distinct.index(text) for text in texts]]
    if weighted:
        outside = [1.0]  # the start and end tokens and the padding
        weights = torch.tensor(
            [(outside + [w for _, w in row] + outside * len(ids[0]))[: len(ids[0])] for row in rows]
        ).to(z.device)  # (B k, T), float32
        changed = (weights != 1).any(dim=1)
        empty = states[distinct.index(padded([]))][None].float()
        new = INTERPRETATIONS[interpretation](z[changed].float(), weights[changed], empty)
        z = z.index_put((changed,), new.to(z.dtype))
    return rearrange(z, "(b k) t d -> b (k t) d", k=count)
