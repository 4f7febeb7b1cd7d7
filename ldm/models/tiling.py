"""Big pictures through the autoencoder in tiles, so that its peak memory is that of one tile.

Decoding needs most of the memory of sampling: at the finest level every pixel has 128 features. Tiles of
latents overlap, and in the overlap one fades into the next on linear ramps. The result is not exactly that
of the whole: norms and the middle attention of the autoencoder see a tile where they saw the picture.
Stands beside `autoencoder.py`, whose `decode_latents` and `encode_latents` it replaces for big pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class Tiles:
    """Equal tiles of at most `tile` cells along an axis of `length`, evenly spaced, `overlap` or more shared.

    Raises ValueError for a tile below 1 or an overlap outside 0..tile / 2.
    """

    length: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 latent cell, got {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(
                f"overlap of tiles must be between 0 and half a tile ({self.tile // 2}), got {self.overlap}"
            )

    @property
    def side(self) -> int:
        return min(self.tile, self.length)

    @property
    def starts(self) -> list[int]:
        """Where each tile begins; the last one ends with the axis."""
        rest = self.length - self.side
        gaps = -(-rest // (self.tile - self.overlap))  # rounded up
        return [round(i * rest / gaps) for i in range(gaps + 1)] if gaps else [0]

    def weights(self, unit: int = 1) -> list[Float[Tensor, " side"]]:
        """How much each tile counts in each of its cells, or in the `unit` pixels of each.

        With rise_i a ramp from 0 to 1 over what tile i shares with the one before (rise_0 = 1, and 0 behind
        the last), tile i counts rise_i - rise_(i + 1): the sum over the tiles is 1 everywhere, and a tile
        counts nothing outside itself.
        """
        at = (torch.arange(self.length * unit) + 0.5) / unit  # middles of the pixels, in cells
        starts = self.starts
        rises = [torch.ones(len(at))]
        for before, start in pairwise(starts):
            shared = before + self.side - start
            rises.append(((at - start) / shared).clamp(0, 1) if shared else (at > start).float())
        rises.append(torch.zeros(len(at)))
        return [
            (rises[i] - rises[i + 1])[start * unit : (start + self.side) * unit]
            for i, start in enumerate(starts)
        ]


def decode_tiled(
    autoencoder: Autoencoder, latents: Float[Tensor, "B C h w"], tile: int = 64, overlap: int = 16
) -> Float[Tensor, "B 3 H W"]:
    """As `decode_latents`, in tiles of `tile` x `tile` latent cells that share `overlap` or more of them.

    Latents that fit in one tile are decoded whole, bit for bit. Raises ValueError as `Tiles`.
    """
    rows, columns = (Tiles(length, tile, overlap) for length in latents.shape[-2:])
    if len(rows.starts) == len(columns.starts) == 1:
        return autoencoder.decode_latents(latents)

    def decode(top: int, left: int) -> Tensor:
        return autoencoder.decode_latents(_cut(latents, rows, columns, top, left))

    return blended(decode, rows, columns, autoencoder.factor)


def encode_tiled(
    autoencoder: Autoencoder,
    images: Float[Tensor, "#B 3 H W"],
    noise: Float[Tensor, "B C h w"] | None = None,
    tile: int = 64,
    overlap: int = 16,
) -> Float[Tensor, "B C h w"]:
    """As `encode_latents`, in tiles of that many latent cells; `noise` is that of the whole picture.

    One image may be drawn from with several noises, and is then encoded once.
    An image that fits in one tile is encoded whole, bit for bit. Raises ValueError as `Tiles`, and where a
    side is no multiple of the autoencoder's factor.
    """
    factor, (height, width) = autoencoder.factor, images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"image size {width}x{height} is not a multiple of the autoencoder's factor {factor}"
        )
    rows, columns = (Tiles(length // factor, tile, overlap) for length in (height, width))
    if len(rows.starts) == len(columns.starts) == 1:
        return _drawn(autoencoder, images, noise)

    def encode(top: int, left: int) -> Tensor:
        own = None if noise is None else _cut(noise, rows, columns, top, left)
        return _drawn(autoencoder, _cut(images, rows, columns, top, left, factor), own)

    return blended(encode, rows, columns, 1)


def _drawn(autoencoder: Autoencoder, images: Tensor, noise: Tensor | None) -> Tensor:
    posterior = autoencoder.encode(images)
    z = posterior.mode() if noise is None else posterior.mode() + posterior.std * noise
    return autoencoder.scale_latents(z)  # (B, C, h, w)


def blended(
    make: Callable[[int, int], Float[Tensor, "B C _ _"]], rows: Tiles, columns: Tiles, unit: int
) -> Float[Tensor, "B C _ _"]:
    """The weighted sum of all tiles, each made only when it is added.

    make: (top, left) in cells -> the tile, of `unit` x `unit` pixels a cell.
    """
    whole = torch.empty(0)
    for top, down in zip(rows.starts, rows.weights(unit), strict=True):
        for left, across in zip(columns.starts, columns.weights(unit), strict=True):
            made = make(top, left)
            if not whole.numel():
                whole = made.new_zeros(*made.shape[:2], rows.length * unit, columns.length * unit)
            weight = (down[:, None] * across).to(made)  # (side unit, side unit)
            _cut(whole, rows, columns, top, left, unit).add_(weight * made)
    return whole


def _cut(x: Tensor, rows: Tiles, columns: Tiles, top: int, left: int, unit: int = 1) -> Tensor:
    """The view of one tile, given in cells, in what has `unit` x `unit` pixels a cell."""
    bottom, right = top + rows.side, left + columns.side
    return x[..., top * unit : bottom * unit, left * unit : right * unit]
