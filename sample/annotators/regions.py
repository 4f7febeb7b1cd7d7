"""Hints of areas: silhouettes, flat regions of few colours, coarse colours. Exact for drawn pictures."""

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image

from sample.annotators.edges import opencv, white_on_black
from sample.annotators.soft_edges import border, transparency
from sample.images import to_rgb

MOST = 256  # colours of a palette, as of Pillow's


def silhouette(picture: Image.Image, threshold: int = 0, tolerance: int = 16) -> Image.Image:
    """White where something is, black elsewhere.

    Of a picture with alpha: where it is above `threshold`. Of one without, or opaque everywhere: all but the
    background, which is what hangs together with the border and differs by at most `tolerance`, in each of
    red, green and blue, from the border's most common colour. So a white eye in a face on white is part of
    it, and so is the hole of a ring: only alpha knows that one.
    """
    if not 0 <= threshold < 255 or not 0 <= tolerance <= 255:
        raise ValueError(
            f"silhouette: expected threshold in 0..254 and tolerance in 0..255, got {threshold}, {tolerance}"
        )
    alpha = transparency(picture)
    if alpha is not None:
        return white_on_black((alpha > threshold).astype(np.uint8) * 255)
    behind = background(np.asarray(to_rgb(picture)), tolerance)
    return white_on_black((~behind).astype(np.uint8) * 255)


def background(pixels: UInt8[np.ndarray, "H W 3"], tolerance: int) -> Bool[np.ndarray, "H W"]:
    colours, counts = np.unique(border(pixels), axis=0, return_counts=True)
    common = colours[counts.argmax()].astype(int)
    alike = abs(pixels.astype(int) - common).max(axis=2) <= tolerance
    _, areas = opencv().connectedComponents(alike.astype(np.uint8), connectivity=4)
    outermost = np.concatenate([areas[0], areas[-1], areas[:, 0], areas[:, -1]])
    return np.isin(areas, outermost[outermost > 0])  # 0 is what is not alike


def segments(picture: Image.Image, colours: int = 8, palette: str = "", smooth: int = 0) -> Image.Image:
    """Flat regions: each pixel takes the nearest colour of a palette.

    colours: size of the picture's own palette: the most common colour, and then always that which takes most
    from what is left, its pixels times the squared distance to the nearest one chosen before; so a drawn
    picture keeps its own colours exactly. palette: instead of it, such as ff0000+ffffff.
    smooth: odd side of the square in which the most common colour wins afterwards (0: none).
    """
    if not 1 <= colours <= MOST or not (smooth == 0 or (smooth % 2 and 3 <= smooth <= 63)):
        raise ValueError(
            f"segments: expected colours in 1..{MOST} and smooth 0 or odd in 3..63, got colours={colours}, "
            f"smooth={smooth}"
        )
    pixels = np.asarray(picture)
    chosen = named(palette) if palette else own_palette(picture, colours)  # (K, 3)
    packed, inverse = np.unique(pack(pixels), return_inverse=True)
    index = nearest(unpack(packed), chosen)[inverse.reshape(pixels.shape[:2])]  # (H, W)
    if smooth:
        index = most_common(index, smooth, len(chosen))
    return Image.fromarray(chosen[index])


def named(palette: str) -> UInt8[np.ndarray, "K 3"]:
    """The colours of `ff0000+00ff00`. Raises ValueError."""
    try:
        colours = [bytes.fromhex(name.removeprefix("#")) for name in palette.split("+")]
        if len(colours) > MOST or any(len(colour) != 3 for colour in colours):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"segments: palette must be at most {MOST} colours like ff0000+00ff00+ffffff, got {palette!r:.60}"
        ) from None
    return np.array([list(colour) for colour in colours], dtype=np.uint8)


def own_palette(picture: Image.Image, count: int) -> UInt8[np.ndarray, "K 3"]:
    """At most `count` colours of the picture itself, see `segments`; near ones (equal in the upper four bits)
    count for the most common among them."""
    packed, counts = np.unique(pack(np.asarray(picture)), return_counts=True)
    if len(packed) <= count:
        return unpack(packed)
    order = np.argsort(-counts, kind="stable")  # the most common first
    _, first, box = np.unique(packed[order] & 0xF0F0F0, return_index=True, return_inverse=True)
    pixels = np.bincount(box.ravel(), weights=counts[order])  # of each box
    candidates = unpack(packed[order][first]).astype(np.int64)
    chosen = [int(pixels.argmax())]
    left = ((candidates - candidates[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count and (left * pixels).any():
        chosen.append(int((left * pixels).argmax()))
        left = np.minimum(left, ((candidates - candidates[chosen[-1]]) ** 2).sum(axis=1))
    return candidates[chosen].astype(np.uint8)


def nearest(
    colours: UInt8[np.ndarray, "N 3"], palette: UInt8[np.ndarray, "K 3"]
) -> Integer[np.ndarray, " N"]:
    """Of each colour the index of the nearest in the palette (Euclid, RGB), the first of equally near."""
    best = np.full(len(colours), np.iinfo(np.int64).max)
    index = np.zeros(len(colours), dtype=np.int64)
    for i, entry in enumerate(palette.astype(np.int64)):  # one by one: a photograph has 100,000 colours
        distance = ((colours - entry) ** 2).sum(axis=1)
        index[distance < best] = i
        best = np.minimum(best, distance)
    return index


def most_common(index: Integer[np.ndarray, "H W"], side: int, count: int) -> Integer[np.ndarray, "H W"]:
    """Of each pixel the most common index in the square around it, the least of equally common ones."""
    cv2 = opencv()
    best, result = np.full(index.shape, -1.0, dtype=np.float32), np.zeros_like(index)
    for i in range(count):
        share = cv2.boxFilter((index == i).astype(np.float32), -1, (side, side), normalize=False)
        result[share > best] = i
        best = np.maximum(best, share)
    return result


def pack(pixels: UInt8[np.ndarray, "H W 3"]) -> Integer[np.ndarray, "H W"]:
    """A number for each colour."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return red << 16 | green << 8 | blue


def unpack(packed: Integer[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 3"]:
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def colours(picture: Image.Image, cells: int = 8) -> Image.Image:
    """Mean colours of a grid of squares: the hint of T2I-Adapter's "color" (arXiv:2302.08453).

    cells: how many along the shorter side. The paper's pictures of 512 pixels have 8, of 64 pixels each.
    """
    if cells < 1:
        raise ValueError(f"colours: cells must be at least 1, got {cells}")
    cells = min(cells, *picture.size)
    width, height = (max(1, round(side * cells / min(picture.size))) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX).resize(
        picture.size, Image.Resampling.NEAREST
    )
