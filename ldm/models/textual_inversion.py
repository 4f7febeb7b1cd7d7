"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): new words of a text tower, a few vectors each.

A new word's vectors stand behind the token table, in parameters of their own: nothing that is done to them,
weight decay included, can touch another row, and the tower's own weights neither change nor grow. The
tokenizer gives the word its ids. Files of such words are read and written by `ldm/weights/embeddings.py`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.models.clip import TextEncoder
from ldm.models.tokenizer import END_ID, Tokenizer

WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}


class TextualInversion(nn.Module):
    """The new words of one tower and its tokenizer; get it with `textual_inversion`.

    Its parameters are the vectors, float32, one tensor (V, D) a word in the order of `tokens`. They are no
    part of the tower's own `parameters()` and `state_dict()`.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: Tokenizer):
        super().__init__()
        assert encoder.with_new_words is None, "a tower has one TextualInversion"
        assert not tokenizer.placeholders, "placeholders without vectors"
        self.width = encoder.config.width
        self.device = encoder.token_embedding.weight.device
        self.tokenizer = tokenizer
        self.tokens: list[str] = []
        self.used: list[int] = []  # how many of its vectors a word stands for
        self.rows = nn.ParameterList()
        encoder.with_new_words = self.forward

    def add(self, token: str, vectors: Float[Tensor, "V D"]) -> nn.Parameter:
        """Make `token`, whatever signs it has, stand for a copy of these vectors wherever prompts name it.

        A token that begins or ends like a word is found as a whole word only; upper and lower case are the
        same. Returns the parameter. Raises ValueError for vectors of another width than the tower's, for
        values that are not finite, for no name, and for a token that is in the vocabulary or added already.
        """
        check_width(token, vectors, self.width)
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError(f"the embedding of {token!r} holds NaN or infinite values")
        self.tokenizer.add_placeholder(token, len(vectors))
        self.tokens.append([*self.tokenizer.placeholders][-1])  # as the tokenizer spells it
        self.used.append(len(vectors))
        self.rows.append(nn.Parameter(vectors.detach().to(self.device, torch.float32, copy=True)))
        self._number()
        return self.rows[-1]

    def remove(self, token: str) -> None:
        """Forget a word; the ids of those behind it change. Raises ValueError where there is none."""
        place = self._place(token)
        del self.tokenizer.placeholders[self.tokens[place]], self.tokens[place], self.used[place]
        self.rows = nn.ParameterList([row for i, row in enumerate(self.rows) if i != place])
        self._number()

    def use(self, token: str, count: int) -> None:
        """Let a word stand for its first `count` vectors only, for training that adds one by one."""
        place = self._place(token)
        if not 1 <= count <= len(self.rows[place]):
            raise ValueError(f"{token!r} has {len(self.rows[place])} vectors; {count} of them cannot be used")
        self.used[place] = count
        self._number()

    def vectors(self, token: str) -> Float[Tensor, "V D"]:
        """A copy of all vectors of a word, on the CPU."""
        return self.rows[self._place(token)].detach().cpu().clone()

    def forward(self, numbers: Int[Tensor, "B T"], known: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """`known`, with the new words' vectors where `numbers`, which count them from 0, are not negative."""
        if not self.tokens:
            return known
        new = torch.cat([*self.rows]).to(known)  # (all vectors, D)
        return torch.where(numbers[..., None] >= 0, new[numbers.clamp(min=0)], known)

    def _place(self, token: str) -> int:
        name = token.strip().lower()
        if name not in self.tokens:
            raise ValueError(f"there is no new word {token!r}, only {', '.join(self.tokens) or 'none'}")
        return self.tokens.index(name)

    def _number(self) -> None:
        first = END_ID + 1
        for token, used, rows in zip(self.tokens, self.used, self.rows, strict=True):
            self.tokenizer.placeholders[token] = list(range(first, first + used))
            first += len(rows)


def textual_inversion(encoder: TextEncoder, tokenizer: Tokenizer) -> TextualInversion:
    """The new words of a tower, none at first; the same object each time."""
    owner = getattr(encoder.with_new_words, "__self__", None)
    if owner is None:
        return TextualInversion(encoder, tokenizer)
    assert isinstance(owner, TextualInversion)
    assert owner.tokenizer is tokenizer, "a tower's new words are of one tokenizer"
    return owner


def check_width(token: str, vectors: Tensor, width: int) -> None:
    """Raise ValueError unless these are vectors (V, D) for a tower of this width."""
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            f"the embedding of {token!r} must be of shape (vectors, width), got {(*vectors.shape,)}"
        )
    if vectors.shape[1] != width:
        raise ValueError(
            f"the embedding of {token!r} has width {_told(vectors.shape[1])}; the model's text tower has "
            f"{_told(width)}"
        )


def _told(width: int) -> str:
    return f"{width} ({WIDTHS[width]})" if width in WIDTHS else str(width)


def initial_vectors(
    encoder: TextEncoder, tokenizer: Tokenizer, word: str, count: int = 1
) -> Float[Tensor, "count D"]:
    """The row of a word of the vocabulary, `count` times: what training starts from.

    Raises ValueError for a word of no or several tokens, and a count below 1.
    """
    ids = tokenizer.encode(word)
    if count < 1:
        raise ValueError(f"a new word needs at least one vector, got {count}")
    if not ids:
        raise ValueError(f"the initial word {word!r} is empty; choose one like 'toy'")
    if len(ids) > 1:
        parts = ", ".join(repr(tokenizer.words([i])) for i in ids)
        raise ValueError(f"the initial word {word!r} is {len(ids)} tokens ({parts}); choose a word of one")
    device = encoder.token_embedding.weight.device
    row = encoder.embed(torch.tensor([ids], device=device))[0].detach().float()  # (1, D)
    return row.repeat(count, 1)
