"""Text to token ids: the byte-pair encoding of CLIP as open_clip ships it, with placeholder tokens.

Only this one class knows where the vocabulary comes from.
"""

import importlib.util
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

START_ID, END_ID = 49406, 49407


@cache
def _byte_pair_encoding() -> Any:
    """open_clip's tokenizer, loaded from its one file: importing the package takes seconds (torchvision)."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the tokenizer's vocabulary comes with open-clip-torch: pip install open-clip-torch"
        )
    spec = importlib.util.spec_from_file_location(
        "_open_clip_tokenizer", Path(package.origin).parent / "tokenizer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._tokenizer


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, special tokens in OpenAI's spelling, and the merges in their order."""
    encoding = _byte_pair_encoding()
    special = {START_ID: "<|startoftext|>", END_ID: "<|endoftext|>"}
    return {special.get(i, token): i for token, i in encoding.encoder.items()}, list(encoding.bpe_ranks)


def _whole(name: str) -> str:
    """A pattern for `name` that leaves words alone which it is only a part of."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def says(name: str, text: str) -> bool:
    """Whether a prompt names a placeholder."""
    return re.search(_whole(name.strip()), text, flags=re.IGNORECASE) is not None


class Tokenizer:
    """Prompts to ids (N, context_length): start token, words, end token, padding.

    Args:
        context_length: tokens of a prompt, start and end included.
        padding: "end" repeats the end token (Stable Diffusion 1), "zero" uses id 0 (Stable Diffusion 2).
    """

    def __init__(self, context_length: int = 77, padding: str = "end"):
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 (start and end), got {context_length}")
        if padding not in ("end", "zero"):
            raise ValueError(f"padding must be 'end' or 'zero', got {padding!r}")
        self.context_length = context_length
        self.pad_id = END_ID if padding == "end" else 0
        self.placeholders: dict[str, list[int]] = {}

    def add_placeholder(self, token: str, vectors: int = 1) -> list[int]:
        """Make `token` stand for `vectors` new ids behind the vocabulary. Raises ValueError if it exists."""
        token = token.strip().lower()
        if not token or vectors < 1:
            raise ValueError(
                f"a placeholder needs a name and at least one vector, got {token!r} and {vectors}"
            )
        if token in self.placeholders or len(self.encode(token)) == 1:
            other = f"<{token.strip('<>')}-1>"
            raise ValueError(
                f"placeholder {token!r} is a token already; choose another name, such as {other!r}"
            )
        first = END_ID + 1 + sum(map(len, self.placeholders.values()))
        self.placeholders[token] = list(range(first, first + vectors))
        return self.placeholders[token]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start, end and limit."""
        encode = _byte_pair_encoding().encode
        if not self.placeholders:
            return encode(text)
        # The longest name wins where one begins another; one like a word counts as a whole word only
        names = sorted(self.placeholders, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(_whole, names))})", text, flags=re.IGNORECASE)
        return [i for piece in pieces for i in self.placeholders.get(piece.lower()) or encode(piece)]

    def __call__(self, texts: list[str]) -> Int[Tensor, "N T"]:
        """Ids of each text; what does not fit is cut (`cut` says what)."""
        rows = []
        for text in texts:
            ids = [START_ID, *self.encode(text)[: self.context_length - 2], END_ID]
            rows.append(ids + [self.pad_id] * (self.context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.context_length)

    def cut(self, text: str) -> str:
        """The end of `text` that `__call__` cuts off, in words; empty where all fits."""
        return self.words(self.encode(text)[self.context_length - 2 :])

    def words(self, ids: list[int]) -> str:
        """What ids of the vocabulary and of placeholders say; a placeholder once for all of its vectors."""
        names = {i: name for name, ids in self.placeholders.items() for i in ids}
        words = []
        for name, run in groupby(ids, key=names.get):  # a placeholder once, words together
            words.append(_byte_pair_encoding().decode(list(run)).strip() if name is None else name)
        return " ".join(words)
