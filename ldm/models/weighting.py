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


def count_chunks(pieces: Sequence[Piece], tokenizer: Tokenizer, backtrack: int = 20) -> int:
    """How many chunks a prompt fills; its context has context_length tokens for each."""
    return len(chunks(pieces, tokenizer, backtrack))


def cut(pieces: Sequence[Piece], tokenizer: Tokenizer, limit: int | None, backtrack: int = 20) -> str:
    """What a prompt loses where only its first `limit` chunks are kept, in words; empty where all fits.

    Chunks begun by a BREAK count as any other. Raises ValueError as `encode` does.
    """
    lost = _split(pieces, tokenizer, backtrack, limit)[1]
    return tokenizer.words([i for chunk in lost for i, _ in chunk])


def _split(
    pieces: Sequence[Piece], tokenizer: Tokenizer, backtrack: int, limit: int | None
) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks that are kept and those that are cut."""
    for text, weight in pieces:
        if not math.isfinite(weight):
            raise ValueError(f"weight of {text!r} must be a finite number, got {weight}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit of chunks must be at least 1, got {limit}")
    found = chunks(pieces, tokenizer, backtrack)
    return found[:limit], [] if limit is None else found[limit:]


COUNTINGS = {"webui": 1, "diffusers": 0}  # what skips nothing


def clip_skip_layers(value: int, counting: str = "webui") -> int:
    """The layers that a "clip skip" leaves out, for `skipping`.

    The web UI (and Civitai's model pages) count the layers from the end at which the tower stops: 1 skips
    nothing, 2 the last one. diffusers' `clip_skip` counts those that are skipped: 0 nothing, 1 the last one.
    Both count from where the model was trained to stop, that is from the penultimate layer for Stable
    Diffusion 2. Raises ValueError for a value too small or another counting.
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting of clip skip must be one of {', '.join(COUNTINGS)}, got {counting!r}")
    if value < COUNTINGS[counting]:
        raise ValueError(
            f"clip skip must be at least {COUNTINGS[counting]} (which skips nothing), got {value}"
        )
    return value - COUNTINGS[counting]


def skipping(text_encoder: TextEncoder, layers: int) -> TextEncoder:
    """The tower that stops `layers` layers before where it was trained to, with the same weights.

    Counted as diffusers does, see `clip_skip_layers`. Raises ValueError where no layer is left.
    """
    if layers == 0:
        return text_encoder
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
    limit: int | None = None,
) -> Float[Tensor, "B T D"]:
    """The context of each prompt, T = k context_length for the k chunks of the longest of them.

    Shorter ones end in chunks of the empty prompt: where a picture must not depend on its neighbours, take
    `encode_each`, whose lengths guidance takes as they are. Of one chunk without weights it is
    `text_encoder(tokenizer(texts))`. Weights count for their chunk alone, also in "original", where the web
    UI takes the mean over all prompts of a batch.

    Args:
        interpretation: of the weights, a key of INTERPRETATIONS.
        skip: layers of the tower to leave out, see `skipping`.
        backtrack: how far to look back for a comma, see `chunks`.
        at_least: chunks to give, where the longest prompt has fewer.
        limit: chunks of a prompt to keep, None for all; `cut` says what that loses. With limit 1 and
            backtrack 0 the tower gets what `Tokenizer.__call__` keeps (placeholders stay whole).

    Raises ValueError for an unknown interpretation, a weight that is not finite, a limit below 1, and as
    `chunks` and `skipping`.
    """
    split = [_split(pieces, tokenizer, backtrack, limit)[0] for pieces in prompts]
    count = max([at_least, *map(len, split)])
    rows = [chunk for prompt in split for chunk in [*prompt, *[[]] * (count - len(prompt))]]
    z = _states(rows, tokenizer, skipping(text_encoder, skip), interpretation)  # (B k, T, D)
    return rearrange(z, "(b k) t d -> b (k t) d", k=count)


def encode_each(
    prompts: Sequence[Sequence[Piece]],
    tokenizer: Tokenizer,
    text_encoder: TextEncoder,
    interpretation: str = "original",
    *,
    skip: int = 0,
    backtrack: int = 20,
    limit: int | None = None,
) -> list[Float[Tensor, "1 T D"]]:
    """A context for each prompt, as long as its own chunks: `encode` of it alone, but for rounding.

    The tower is called once, with each distinct chunk once; equal prompts get the same tensor. Arguments and
    errors as of `encode`.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    split = [_split(pieces, tokenizer, backtrack, limit)[0] for pieces in distinct]
    rows = [chunk for prompt in split for chunk in prompt]
    z = _states(rows, tokenizer, skipping(text_encoder, skip), interpretation)  # (N, T, D)
    parts = z.split([len(prompt) for prompt in split])
    contexts = [rearrange(part, "k t d -> 1 (k t) d") for part in parts]
    return [contexts[distinct.index(tuple(pieces))] for pieces in prompts]


def _states(
    rows: list[Chunk], tokenizer: Tokenizer, text_encoder: TextEncoder, interpretation: str
) -> Float[Tensor, "N T D"]:
    """The weighted hidden states of each chunk, framed by start and end token and padded."""
    if interpretation not in INTERPRETATIONS:
        raise ValueError(
            f"interpretation of weights must be one of {', '.join(INTERPRETATIONS)}, got {interpretation!r}"
        )

    def padded(chunk: Chunk) -> tuple[int, ...]:
        ids = [START_ID, *(i for i, _ in chunk), END_ID]
        return *ids, *[tokenizer.pad_id] * (tokenizer.context_length - len(ids))

    weighted = any(weight != 1 for row in rows for _, weight in row)
    texts = [padded(row) for row in rows]
    # Each text once, in order; the empty one last, where weights may be taken against it
    distinct = list(dict.fromkeys([*texts, padded([])] if weighted else texts))
    place = {text: i for i, text in enumerate(distinct)}
    ids = torch.tensor(distinct, dtype=torch.int64, device=text_encoder.token_embedding.weight.device)
    ids = ids.reshape(-1, tokenizer.context_length)
    states = text_encoder(ids)  # (distinct, T, D)
    z = states[[place[text] for text in texts]]
    if weighted:
        outside = [1.0]  # the start and end tokens and the padding
        weights = torch.tensor(
            [(outside + [w for _, w in row] + outside * len(ids[0]))[: len(ids[0])] for row in rows]
        ).to(z.device)  # (N, T), float32
        changed = (weights != 1).any(dim=1)
        empty = states[place[padded([])]][None].float()
        new = INTERPRETATIONS[interpretation](z[changed].float(), weights[changed], empty)
        z = z.index_put((changed,), new.to(z.dtype))
    return z
