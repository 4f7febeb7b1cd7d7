"""New words for prompts (textual inversion): from files and tensors into a model.

`Pipeline.add_embedding` is for programs. The commands take `--embedding FILE[=TOKEN]`, and from the folder
`--adapters DIR` each file whose name without the suffix a prompt says, as the web UIs do (`use`).
"""

import argparse
import contextlib
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.models.clip import TextEncoder
from ldm.models.textual_inversion import TextualInversion, textual_inversion
from ldm.models.tokenizer import says
from ldm.weights.embeddings import Embedding, NoEmbedding, read_embeddings
from sample.adapters import EMBEDDINGS, adapter_names, find_adapter, shipped_adapter
from sample.parts import Parts


def inversion_of(parts: Parts) -> TextualInversion:
    """The new words of a model. Raises ValueError where its prompts are not read by a CLIP text tower."""
    if not isinstance(parts.text_encoder, TextEncoder):
        raise ValueError("this model has no CLIP text tower; embeddings are words of such a one")
    return textual_inversion(parts.text_encoder, parts.tokenizer)


def add_embedding(parts: Parts, source: str | Path | Tensor, token: str | None = None) -> list[str]:
    """Give a model the words of a file, or one word by its vectors (V, D) or (D,); returns the words.

    token: what the word is called in prompts; by default what the file says. Raises FileNotFoundError, and
    ValueError as `read_embeddings` and `TextualInversion.add`; the model is then as it was.
    """
    if isinstance(source, Tensor):
        if token is None:
            raise ValueError("an embedding that is given as a tensor needs a token")
        return _add(parts, [Embedding(token, torch.atleast_2d(source))], "")
    found = read_embeddings(Path(source).expanduser(), token)
    return _add(parts, found.embeddings, f"{source}: ")


def remove_embedding(parts: Parts, token: str) -> None:
    """Forget a word that was added. Raises ValueError where there is none of that name."""
    inversion_of(parts).remove(token)


def use(
    models: Sequence[Parts | None], args: argparse.Namespace, texts: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Give models the words that a command asks for, and only these; returns what to record: a hash of each.

    models: the one that draws, and others that read the same prompts. texts: all prompts, negative ones too.
    A word of `--embedding` that none of them says is told on stderr, and so is a file of the folder that
    cannot be used for its name. Raises as `add_embedding` and `find_adapter`.
    """
    notes: list[str] = []
    hashes: dict[str, str] = {}
    for parts in models:
        if parts is not None:
            notes += _give(parts, args, texts)
            hashes |= _hashes(parts)
    for note in dict.fromkeys(notes):
        print(f"ldm-sample: warning: {note}", file=sys.stderr)
    return {"embedding_hashes": hashes} if hashes else {}


def _give(parts: Parts, args: argparse.Namespace, texts: Sequence[str]) -> list[str]:
    """`use` for one model; returns what the user should know."""
    notes, folder = [], getattr(args, "adapters", None)
    reads = isinstance(parts.text_encoder, TextEncoder)
    for token in [*inversion_of(parts).tokens] if reads else ():  # of the command before, in a sweep
        remove_embedding(parts, token)
    for text in args.embedding or ():
        for word in add_embedding(parts, *_located(text, folder)):
            if not any(says(word, prompt) for prompt in texts):
                notes.append(f"no prompt says {word!r} of --embedding {text}")
    if folder is not None and reads:
        notes += _add_named(parts, Path(folder), [re.sub(r"<lora:[^>]*>", "", text) for text in texts])
    return notes


def _hashes(parts: Parts) -> dict[str, str]:
    """Of each word's vectors, whatever form its file has."""
    if not isinstance(parts.text_encoder, TextEncoder):
        return {}
    inversion = inversion_of(parts)
    rows = {token: inversion.vectors(token).numpy().tobytes() for token in inversion.tokens}
    return {token: hashlib.sha256(row).hexdigest()[:12] for token, row in rows.items()}


def _add(parts: Parts, embeddings: Sequence[Embedding], where: str) -> list[str]:
    inversion, before = inversion_of(parts), len(inversion_of(parts).tokens)
    try:
        for each in embeddings:
            inversion.add(each.token, each.vectors)
    except ValueError as error:
        for token in inversion.tokens[before:]:
            inversion.remove(token)
        raise ValueError(f"{where}{error}") from None
    return inversion.tokens[before:]


def _add_named(parts: Parts, folder: Path, texts: Sequence[str]) -> list[str]:
    """Add the words of the folder's files that the texts name; returns what the user should know."""
    tokens, notes = inversion_of(parts).tokens, []
    for name in adapter_names(folder, EMBEDDINGS):
        if name.lower() in tokens or not any(says(name, text) for text in texts):
            continue
        path = _embedding_named(folder, name)
        if path is None:
            continue
        if len(parts.tokenizer.encode(name)) == 1:
            notes.append(f"{path} not used: {name!r} is a word of its own; give the file another name")
            continue
        found = read_embeddings(path).embeddings
        words = found if len(found) > 1 else [Embedding(name, found[0].vectors)]
        _add(parts, words, f"{path}: ")
    return notes


def _embedding_named(folder: Path, name: str) -> Path | None:
    """The first file of that name in the folder; a LoRA, or a picture of either, may be called so too."""
    for path in (folder / (name + suffix) for suffix in EMBEDDINGS):
        if path.is_file():
            with contextlib.suppress(NoEmbedding):
                read_embeddings(path)
                return path
    return None


def _located(text: str, folder: str | None) -> tuple[Path, str | None]:
    """The file that `FILE[=TOKEN]` means, also by its name in the folder, and the token."""
    name, equals, token = text.rpartition("=")
    if not equals or Path(text).expanduser().is_file():
        name, token = text, ""
    elif not name or not token.strip():
        raise ValueError(f"--embedding must be like FILE or FILE=TOKEN, got {text!r}")
    path = shipped_adapter("embedding", name) or Path(name).expanduser()
    if folder is not None and not path.exists():
        path = _embedding_named(Path(folder), name) or find_adapter(folder, name, EMBEDDINGS)
    return path, token or None
