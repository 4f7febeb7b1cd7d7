"""Embeddings inside pictures, as AUTOMATIC1111's web UI shares them.

The table that its `.pt` files hold is kept as JSON, each tensor as {"TORCHTENSOR": nested lists}: in base64
in the text chunk `sd-ti-embedding` of a PNG, and again in the pixels, for services that strip the chunk.
There the zlib-packed text stands in two strips, left and right of the picture, parted from it by a black
column: the lower four bits of every byte left, the higher ones right, both in the lower four bits of the
strip's values, xored with a fixed sequence. Stands behind `embeddings.py`.
"""

import base64
import io
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm.weights.io import Refusal, parse_json, write_atomically

SUFFIXES = (".png", ".webp")
CHUNK = "sd-ti-embedding"
MAX_TEXT = 16_000_000  # bytes; 75 vectors of width 1024 take 1.7 million


class NoEmbedding(Refusal):
    """A whole file, of something else."""


def read_picture(path: Path) -> tuple[dict[str, Tensor], dict[str, str | int]]:
    """The tensors by name, float32, and what the web UI says of them. Raises as `read_embeddings`."""
    if not path.is_file():
        raise FileNotFoundError(f"embedding {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()  # a chunk may stand behind the pixels
                text = getattr(picture, "text", {}).get(CHUNK)
                found = from_pixels(picture) if text is None else base64.b64decode(text, validate=True)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = error if str(error) else type(error).__name__
        raise Refusal(path, f"is a picture whose embedding cannot be read ({reason})") from None
    if found is None:
        raise NoEmbedding(path, f"is a picture without an embedding (text chunk {CHUNK}, or pixels)")
    try:
        table = parse_json(found)
        tensors = {str(name): _tensor(value) for name, value in table["string_to_param"].items()}
    except KeyError as error:
        raise Refusal(path, f"is a picture whose embedding has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise Refusal(path, f"is a picture whose embedding is damaged ({error})") from None
    notes = {key: table[key] for key in ("name", "step", "sd_checkpoint_name") if key in table}
    return tensors, {key: value for key, value in notes.items() if isinstance(value, str | int)}


def write_picture(path: Path, vectors: Float[Tensor, "V D"], told: dict[str, Any]) -> None:
    """A small picture of the vectors, a row each, with them in its text chunk; `told` are notes beside."""
    values = vectors.detach().cpu().float()
    tensors = {"*": {"TORCHTENSOR": values.tolist()}}
    table = {"string_to_token": {"*": 265}, "string_to_param": tensors, **told}
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, base64.b64encode(json.dumps(table).encode()).decode())
    grey = (values / values.abs().amax().clamp(min=1e-12) * 127.5 + 127.5).round().to(torch.uint8)
    picture = Image.fromarray(grey.numpy()).resize((256, max(64, 16 * len(values))), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=info)
    write_atomically(path, content.getvalue())


def from_pixels(picture: Image.Image) -> bytes | None:
    """The JSON text in the pixels, None where there are no two black columns that part the strips off."""
    values = np.asarray(picture.convert("RGB"))  # (H, W, 3)
    lit = np.logical_and.reduce(values > 0, axis=2)
    columns, rows = (np.flatnonzero(lit.any(axis=axis)) for axis in (0, 1))
    if not len(columns):
        return None
    low = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(~low.any(axis=(0, 2)))
    if len(black) < 2 or black[0] != low.shape[1] - 1 - black[-1]:
        return None
    strips = low[:, : black[0]], low[:, black[-1] + 1 :]
    left, right = (strip.ravel() ^ sequence(strip.size) for strip in strips)
    try:
        return zlib.decompressobj().decompress((right << 4 | left).tobytes(), MAX_TEXT)
    except zlib.error:
        return None


def sequence(count: int) -> np.ndarray:
    """The lower four bits of x_n modulo 255, x_n = (1664525 x_{n-1} + 1013904223) mod 2^32, x_0 = 0."""
    factor, values = 1664525, np.array([1013904223], np.uint64)
    while len(values) < count:  # x_{k+n} = factor^k x_n + x_k
        values = np.concatenate([values, (np.uint64(factor) * values + values[-1]) % np.uint64(2**32)])
        factor = factor**2 % 2**32
    return (values[:count] % np.uint64(255)).astype(np.uint8) & 15


def _tensor(value: Any) -> Float[Tensor, "V D"]:
    tensor = torch.tensor(value["TORCHTENSOR"], dtype=torch.float32)
    if tensor.ndim != 2:
        raise ValueError(f"a tensor of shape {(*tensor.shape,)}")
    return tensor
