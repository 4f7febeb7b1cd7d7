"""What is wrong with the captions of a training set, said at once; whether a set is the same one."""

import hashlib
import warnings
from collections.abc import Sequence

from ldm.models.tokenizer import Tokenizer

NAMED = 3  # pictures named in a warning


def check_captions(captions: Sequence[str], files: Sequence[str], tokenizer: Tokenizer, path: str) -> None:
    """Warn once of captions that are empty, and once of those longer than the text tower reads, with counts.

    captions: of the pictures `files` of the set in `path`. Raises ValueError where all are empty.
    """
    empty = [file for file, caption in zip(files, captions, strict=True) if not caption.strip()]
    if captions and len(empty) == len(captions):
        raise ValueError(
            f"{path}: no picture has a caption (data.caption_column of metadata.jsonl, or a .txt beside it); "
            "add some, or train without text: text=null unet.context_dim=null"
        )
    counted = f"{path}: {{}} of {len(captions)} captions are {{}}: {{}}"
    if empty:
        warnings.warn(counted.format(len(empty), "empty", named(empty)), stacklevel=3)
    limit = tokenizer.context_length - 2  # but for start and end
    long = [
        f"{file} (without {shortened(cut)!r})"
        for file, caption in zip(files, captions, strict=True)
        if len(caption.encode()) > limit and (cut := tokenizer.cut(caption))  # a token has a byte at least
    ]
    if long:
        why = f"longer than {tokenizer.context_length} tokens (start and end included) and cut"
        warnings.warn(counted.format(len(long), why, named(long)), stacklevel=3)


def data_key(files: Sequence[str], captions: Sequence[str] = ()) -> str:
    """Says of a training set whether it is the same, by names and captions in their order.

    Not by pixels: caches of what is made of those have keys of their own. A state has the key of what it was
    trained on, as one picture more or less gives every later batch other pictures.
    """
    digest = hashlib.blake2b(repr((list(files), list(captions))).encode(), digest_size=4)
    return f"{len(files)} pictures, {digest.hexdigest()}"


def named(told: Sequence[str]) -> str:
    return ", ".join(told[:NAMED]) + (", ..." if len(told) > NAMED else "")


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
