"""New words of a model's text tower in training: textual inversion (Gal et al. 2022, arXiv:2208.01618).

The vectors stand apart from the tower's table (`ldm/models/textual_inversion.py`), so that nothing else can
change. Used alone by `tasks/textual_inversion.py`, with a LoRA by `tasks/lora.py` (pivotal tuning).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.clip import TextEncoder
from ldm.models.textual_inversion import TextualInversion, initial_vectors, textual_inversion
from ldm.models.tokenizer import Tokenizer
from ldm.seeding import generator
from ldm.weights.embeddings import FORMS, Embedding, write_embeddings
from sample.pipeline import Pipeline


@dataclass(frozen=True)
class TokensConfig:
    """words: the new words. starts: for each the word whose vector it starts from ("toy"), or "" for random
    values; one is for all, none is at random. vectors: how many a word has. counts: of words that have
    another number. one_more_every: start with one vector a word and use one more every so many steps; 0
    uses all from the start.
    """

    words: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    vectors: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    one_more_every: int = 0

    def __post_init__(self) -> None:
        if self.vectors < 1 or self.one_more_every < 0:
            raise ValueError(
                f"tokens.vectors {self.vectors} must be at least 1 and tokens.one_more_every "
                f"{self.one_more_every} at least 0"
            )
        if len(self.starts) not in (0, 1, len(self.words)):
            raise ValueError(
                f"tokens.starts has {len(self.starts)} words for {len(self.words)} of tokens.words; give one "
                "a word, one for all or none"
            )
        if unknown := [word for word in self.counts if word not in self.words]:
            raise ValueError(
                f"tokens.counts: {unknown[0]!r} is none of tokens.words ({', '.join(self.words) or 'none'})"
            )

    @property
    def identifier(self) -> str:
        """All words, in their order: what a subject is called that has no other name."""
        return " ".join(self.words)


class NewWords:
    """The new words of a model in training; `module` holds what is trained.

    Raises ValueError for a model without CLIP's text tower, words that exist, and initial words of several
    tokens.
    """

    def __init__(self, config: TokensConfig, base: Pipeline, seed: int):
        if not isinstance(base.text_encoder, TextEncoder):
            raise ValueError("new words need a model with a text tower of CLIP's form; this one has none")
        self.config = config
        self.module: TextualInversion = textual_inversion(base.text_encoder, base.tokenizer)
        starts = config.starts if len(config.starts) > 1 else (*config.starts, "")[:1] * len(config.words)
        for word, start in zip(config.words, starts, strict=True):
            count = config.counts.get(word, config.vectors)
            self.module.add(word, first_vectors(base.text_encoder, base.tokenizer, word, start, count, seed))
        self.initial = [rows.detach().clone() for rows in self.module.rows]

    def require_named(self, captions: Sequence[str]) -> None:
        """Raises ValueError for a word that no caption names: nothing would teach it."""
        heard = {i for caption in captions for i in self.module.tokenizer.encode(caption)}
        for word in self.module.tokens:
            if not heard & set(self.module.tokenizer.placeholders[word]):
                raise ValueError(
                    f"no caption names the new word {word!r}; name it in subject.identifier, identifiers or "
                    f"templates (a caption here: {next(iter(captions), '')!r})"
                )

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Use as many vectors as `step` does; one that is used from now on starts from its first value."""
        every = self.config.one_more_every
        for word, rows, initial in zip(self.module.tokens, self.module.rows, self.initial, strict=True):
            used = min(len(rows), 1 + step // every) if every else len(rows)
            self.module.use(word, used)
            if every and step == every * (used - 1):
                rows[used - 1] = initial[used - 1]  # weight decay has moved it

    @property
    def embeddings(self) -> list[Embedding]:
        """The words as they stand, those vectors that are in use."""
        words = self.module
        return [
            Embedding(word, words.vectors(word)[:used])
            for word, used in zip(words.tokens, words.used, strict=True)
        ]

    def export(self, folder: Path, forms: Sequence[str], step: int) -> None:
        """Write files for `ldm-sample --embedding`: one for all words, or one a word as the form has it."""
        for form in forms:
            if form == "diffusers":
                write_embeddings(folder / "embedding.safetensors", self.embeddings, form)
                continue
            for each in self.embeddings:
                name = "".join(sign for sign in each.token if sign.isalnum() or sign in "-_") or "embedding"
                suffix = FORMS[form][0]
                path = folder / (f"{name}{suffix}" if suffix == ".pt" else f"{name}_webui{suffix}")
                write_embeddings(path, [each], form, step)


def first_vectors(
    tower: TextEncoder, tokenizer: Tokenizer, word: str, start: str, count: int, seed: int
) -> Float[Tensor, "V D"]:
    """What a new word's training starts from: a known word's vector `count` times, or random ones as large as
    those of the vocabulary are."""
    if start:
        return initial_vectors(tower, tokenizer, start, count)
    if count < 1:
        raise ValueError(f"a new word needs at least one vector, got {count}")
    table = tower.token_embedding.weight.detach().float()
    noise = torch.randn(count, table.shape[1], generator=generator(seed, "new word", word))
    return table.mean(dim=0) + table.std(dim=0) * noise.to(table)


def check_forms(forms: Sequence[str]) -> None:
    if not forms or (unknown := [form for form in forms if form not in FORMS]):
        wrong = repr(unknown[0]) if forms else "none"
        raise ValueError(f"embedding forms must be some of {', '.join(FORMS)}, got {wrong}")
