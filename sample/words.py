"""What the prompts of a batch tell the network at each step: from text to contexts.

`stream.py` asks for it. A prompt may change on the way (`[a:b:0.5]`), have several parts (`AND`) and fill
several chunks of tokens; the rows of a batch that agree in parts, weights and lengths at every step go
through the network together, the others apart, so that no picture depends on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.guidance import Conditioning
from ldm.models.clip import TextEncoder
from ldm.models.weighting import Piece, count_chunks, cut, encode_each
from sample.parts import Parts
from sample.prompts import at_step, mixed, parse
from sample.settings import Wording

Said = tuple[tuple[float, tuple[Piece, ...]], ...]  # (weight, text) of each part of a prompt at a step


@dataclass(frozen=True)
class Words:
    """Prompts read: what each says at each step, and the context of every text that is said.

    A model that reads nothing has no contexts.
    """

    said: list[list[Said]]  # row, step
    contexts: dict[tuple[Piece, ...], Float[Tensor, "1 T D"]]

    def told(self, rows: Sequence[int], step: int) -> list[tuple[float, Conditioning]]:
        """(weight, conditioning) of the parts of a group of rows, which agree in number and weights."""
        if not self.contexts:
            return [(1.0, {})]
        parts = zip(*(self.said[row][step] for row in rows), strict=True)
        return [
            (part[0][0], {"context": torch.cat([self.contexts[text] for _, text in part])}) for part in parts
        ]

    def weights(self, row: int, step: int) -> list[float]:
        """Of the parts of a row's prompt."""
        return [weight for weight, _ in self.said[row][step]] if self.contexts else [1.0]

    def groups(self) -> list[list[int]]:
        """Rows that can go together, each in the order of their first."""
        groups: dict[object, list[int]] = {}
        for row, steps in enumerate(self.said):
            form = [[(weight, self._length(text)) for weight, text in said] for said in steps]
            groups.setdefault(str(form), []).append(row)
        return list(groups.values())

    def key(self, rows: Sequence[int], step: int) -> tuple[Said, ...]:
        """Equal for steps at which these rows say the same."""
        return tuple(self.said[row][step] for row in rows)

    def _length(self, text: tuple[Piece, ...]) -> int:
        return self.contexts[text].shape[1] if self.contexts else 0


def read(parts: Parts, prompts: Sequence[str], wording: Wording, steps: int, composed: bool = True) -> Words:
    """Read prompts for `steps` steps. composed: False for the negative prompt, which has no AND.

    Raises ValueError for a prompt to a model that reads nothing, and as `encode_each`.
    """
    syntax = wording.syntax if weighs(parts) else "plain"
    said = []
    for prompt in prompts:
        tree = parse(prompt, composed, syntax)
        tree = mixed(tree) if wording.shares else tree
        said.append([at_step(tree, step, steps) for step in range(steps)])
    texts = list(dict.fromkeys(text for row in said for step in row for _, text in step))
    return Words(said, contexts(parts, texts, wording))


def contexts(
    parts: Parts, texts: Sequence[tuple[Piece, ...]], wording: Wording
) -> dict[tuple[Piece, ...], Tensor]:
    """The context (1, T, D) of each text; none where the model reads no text and is told none."""
    if not texts:  # no step is taken
        return {}
    if isinstance(parts.text_encoder, TextEncoder):
        states = encode_each(
            texts,
            parts.tokenizer,
            parts.text_encoder,
            wording.weighting,
            skip=wording.skip,
            backtrack=0 if limit(parts, wording) else wording.backtrack,
            limit=limit(parts, wording),
        )
        return dict(zip(texts, states, strict=True))
    plain = ["".join(piece.text for piece in text) for text in texts]
    if parts.text_encoder is None and not any(plain):
        return {}
    return dict(zip(texts, parts.encode_prompts(plain).split(1), strict=True))


def weighs(parts: Parts) -> bool:
    """Whether the model reads weighted text: CLIP alone has the chunks and weights of the web UIs."""
    return isinstance(parts.text_encoder, TextEncoder)


def limit(parts: Parts, wording: Wording) -> int | None:
    """How many chunks of a prompt are read, None for all."""
    cuts = wording.long == "cut" or (wording.long == "auto" and parts.unet.config.pooled_context)
    return 1 if cuts else None


def length_told(parts: Parts, prompt: str, wording: Wording) -> str:
    """What becomes of a prompt that is longer than the model reads at once, "" for one that is not."""
    if parts.tokenizer is None:
        return ""
    at_most, said, chunks = limit(parts, wording), "", 1
    if weighs(parts):
        for _, text in at_step(parse(prompt, True, wording.syntax), 0, 1):
            said = said or cut(text, parts.tokenizer, at_most, 0 if at_most else wording.backtrack)
            chunks = max(chunks, count_chunks(text, parts.tokenizer, wording.backtrack))
    else:
        said = parts.tokenizer.cut(prompt)
    exceeds = f"prompt {prompt[:40]!r} exceeds the model's {parts.tokenizer.context_length} tokens"
    if said:
        return f"{exceeds}; not read: {said!r}"
    return f"{exceeds}; read in {chunks} chunks" if chunks > 1 and at_most is None else ""
