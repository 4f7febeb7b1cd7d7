"""Text to token ids as BERT's uncased models read it, for the text tower of `bert.py`.

Words first (lower case, accents off, punctuation and CJK characters apart; Devlin et al. 2018,
arXiv:1810.04805), then WordPiece (Wu et al. 2016, arXiv:1609.08144, section 4.1): from the front of a word
always the longest piece that the vocabulary knows. The vocabulary is a file of the user's. `tokenizer.py`
is the counterpart for CLIP.

The original latent diffusion used the fast tokenizer of transformers. Where that differs from BERT's own
code, this follows the fast one: each character is lower-cased by itself (no final sigma), and characters
that Unicode has not assigned are kept. The two still differ at rare marks and punctuation that Unicode
added or reclassified after the fast one's tables were made.
"""

import re
import unicodedata
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

PAD, UNKNOWN, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_NAMES = re.compile(f"({'|'.join(map(re.escape, SPECIAL))})")
LONGEST_WORD = 100  # characters; a longer one is unknown
SOURCE = (
    "vocab.txt of bert-base-uncased (30522 lines), from https://huggingface.co/google-bert/bert-base-uncased"
)

# First and last characters. 2B920 should be 2B820, but so it stands in the tokenizer of the training
CJK = (
    ("\u4e00", "\u9fff"),
    ("\u3400", "\u4dbf"),
    ("\uf900", "\ufaff"),
    ("\U00020000", "\U0002a6df"),
    ("\U0002a700", "\U0002b73f"),
    ("\U0002b740", "\U0002b81f"),
    ("\U0002b920", "\U0002ceaf"),
    ("\U0002f800", "\U0002fa1f"),
)


class WordPieceTokenizer:
    """Prompts to ids (N, context_length): [CLS], pieces, [SEP], then [PAD].

    The names of special tokens in a prompt, such as "[MASK]", stand for those tokens.

    Args:
        vocab: vocab.txt, a folder that holds it, or its lines: the pieces in the order of their ids.
        context_length: tokens of a prompt, [CLS] and [SEP] included.

    Raises FileNotFoundError where there is no vocabulary, and ValueError for one that is not text, that
    repeats a piece or lacks a special token, or for a context_length below 2.
    """

    def __init__(self, vocab: Path | str | list[str], context_length: int = 77):
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 ({START} and {END}), got {context_length}")
        lines = vocab if isinstance(vocab, list) else _read(Path(vocab))
        source = "the list" if isinstance(vocab, list) else str(vocab)
        self.ids = {piece: i for i, piece in enumerate(lines)}
        missing = [name for name in SPECIAL if name not in self.ids]
        if missing:
            raise ValueError(f"vocabulary {source} lacks {', '.join(missing)}; needed is {SOURCE}")
        if len(self.ids) < len(lines):
            twice = next(piece for i, piece in enumerate(lines) if self.ids[piece] != i)
            raise ValueError(f"vocabulary {source} holds {twice!r} twice; needed is {SOURCE}")
        self.vocab_size = len(self.ids)
        self.context_length = context_length
        self.pad_id = self.ids[PAD]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without [CLS], [SEP] and limit."""
        return [self.ids.get(piece, self.ids[UNKNOWN]) for piece in self._pieces(text)]

    def __call__(self, texts: list[str]) -> Int[Tensor, "N T"]:
        """Ids of each text; what does not fit is cut (`cut` says what)."""
        rows = []
        for text in texts:
            ids = [self.ids[START], *self.encode(text)[: self.context_length - 2], self.ids[END]]
            rows.append(ids + [self.pad_id] * (self.context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.context_length)

    def cut(self, text: str) -> str:
        """The end of `text` that `__call__` cuts off, in words; empty where all fits."""
        lost = self._pieces(text)[self.context_length - 2 :]
        return " ".join(lost).replace(" ##", "").removeprefix("##")

    def _pieces(self, text: str) -> list[str]:
        """What each id of `text` stands for: a piece, a special token, or a word that is unknown."""
        result: list[str] = []
        for part in SPECIAL_NAMES.split(text):
            result += [part] if part in SPECIAL else [p for word in words(part) for p in self._split(word)]
        return result

    def _split(self, word: str) -> list[str]:
        """The pieces of a word, those behind the first with "##" before them; unknown words stay whole."""
        if len(word) > LONGEST_WORD:
            return [word]
        pieces: list[str] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [word]
            pieces.append(piece)
            start = end
        return pieces


def words(text: str) -> list[str]:
    """`text` in lower case without accents, split at spaces and around punctuation and CJK characters."""
    plain = "".join(" " if c.isspace() else c for c in text if not _is_control(c))
    result = []
    for c in unicodedata.normalize("NFD", plain):
        if unicodedata.category(c) == "Mn":  # an accent, apart from its letter now
            continue
        result.append(f" {c} " if _is_punctuation(c) or _is_cjk(c) else c.lower())
    return "".join(result).split()


def _is_control(c: str) -> bool:
    return c in "\0\ufffd" or (c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"))


def _is_punctuation(c: str) -> bool:
    """Unicode's, and all of ASCII that is no letter, digit or space: "$" and "+" too."""
    return unicodedata.category(c).startswith("P") or ("!" <= c <= "~" and not c.isalnum())


def _is_cjk(c: str) -> bool:
    return any(first <= c <= last for first, last in CJK)


def _read(path: Path) -> list[str]:
    path = path / "vocab.txt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"vocabulary {path} does not exist; needed is {SOURCE}")
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {path} is not UTF-8 text; needed is {SOURCE}") from error
