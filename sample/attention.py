"""What each word of a prompt attended to, as pictures: a heat map over the picture for every word.

    with record(pipe.unet, pictures=1) as maps:
        ...sample one prompt...
    save_png(token_pictures(maps.mean()[0], words(tokenizer, [tokenizer.encode(prompt)]), picture), path)

The maps come from `ldm/models/attention_maps.py`; this file knows which of their tokens make up which word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.models.tokenizer import Tokenizer, vocabulary
from sample.images import grid

SIDE = 192  # pixels of the longer side of a tile, at least
CAPTION = 24  # height of the strip with the word
# From little to much attention: dark blue, purple, orange, pale yellow; RGB at equal distances
RAMP = ((13, 8, 70), (126, 30, 140), (240, 100, 60), (252, 240, 140))


class Word(NamedTuple):
    """A word, or a sign, and where its tokens stand in the context."""

    text: str
    positions: list[int]


def words(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]]) -> list[Word]:
    """The words of a prompt in their order, without start and end tokens and padding.

    chunks: the token ids between start and end, chunk by chunk: `[tokenizer.encode(text)]`, or of a long
    prompt those of `ldm.models.weighting.chunks`, whose contexts stand one after the other. What does not fit
    into a chunk is left out, as in its context. A word that goes on in the next chunk is one word.
    """
    ends = {i for token, i in vocabulary()[0].items() if token.endswith("</w>")}
    vectors = {ids[0]: len(ids) for ids in tokenizer.placeholders.values()}
    found: list[Word] = []
    begun: list[tuple[int, int]] = []  # (token id, position) of the word that is not at its end

    def finish() -> None:
        if begun:
            text = tokenizer.words([token for token, _ in begun])
            found.append(Word(text, [position for _, position in begun]))
            begun.clear()

    for number, chunk in enumerate(chunks):
        first = number * tokenizer.context_length + 1  # behind the start token
        ids = list(enumerate(chunk[: tokenizer.context_length - 2], start=first))
        while ids:
            token = ids[0][1]
            if token in vectors:  # a placeholder is a word by itself
                finish()
            count = vectors.get(token, 1)
            begun += [(token, position) for position, token in ids[:count]]
            ids = ids[count:]
            if token in vectors or token in ends:
                finish()
    finish()
    return found


def token_pictures(
    maps: Float[Tensor, "T h w"], words: Sequence[Word], picture: Image.Image, columns: int | None = None
) -> Image.Image:
    """A sheet with a tile for each word: its heat map over the picture in grey, the word below.

    maps: of one picture, from `AttentionMaps.mean`; a word's is the mean over its tokens, drawn from its own
    least to its own most. picture: of the maps' proportions; smaller ones than 192 pixels are enlarged.
    Raises ValueError where there is no word, or where its tokens are beyond the maps.
    """
    if not words:
        raise ValueError("the prompt has no word to draw the attention of")
    last = max(position for word in words for position in word.positions)
    if last >= len(maps):
        raise ValueError(f"the words reach to token {last}, the maps have {len(maps)} tokens")
    scale = max(1.0, SIDE / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    grey = picture.convert("L").resize(size, Image.Resampling.BICUBIC)
    tiles = [captioned(over(heat(maps[word.positions].mean(dim=0), size), grey), word.text) for word in words]
    return grid(tiles, columns)


def heat(attention: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """The map at `size` (W, H), from 0 at its least to 1 at its most; 0 where it is the same everywhere."""
    large = F.interpolate(attention[None, None].float().cpu(), size=size[::-1], mode="bicubic")[0, 0]
    least, most = large.min(), large.max()
    return (large - least) / (most - least) if most > least else torch.zeros_like(large)


def colours(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape 3"]:
    """RGB in 0..255 of values in 0..1: linear between the colours of RAMP."""
    ramp = torch.tensor(RAMP, dtype=torch.float32)
    place = values.float().clamp(0, 1) * (len(RAMP) - 1)
    below = place.floor().long().clamp(max=len(RAMP) - 2)
    part = (place - below)[..., None]
    return torch.lerp(ramp[below], ramp[below + 1], part)


def over(values: Float[Tensor, "H W"], grey: Image.Image) -> Image.Image:
    """Heat over a grey picture: three fifths of its colour, so that the picture still shows."""
    ground = torch.from_numpy(np.array(grey)).float()[..., None]  # (H, W, 1)
    mixed = 0.6 * colours(values) + 0.4 * ground
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())


def captioned(tile: Image.Image, text: str) -> Image.Image:
    """`tile` with `text` on white below it, cut where it is too long."""
    font = ImageFont.load_default(size=CAPTION * 0.6)
    label = Image.new("RGB", (tile.width, tile.height + CAPTION), "white")
    label.paste(tile)
    draw = ImageDraw.Draw(label)
    shown = text
    while shown and draw.textlength(shown, font) > tile.width:
        shown = shown[:-1]
    middle = (tile.width / 2, tile.height + CAPTION / 2)
    draw.text(middle, shown, fill="black", font=font, anchor="mm")
    return label
