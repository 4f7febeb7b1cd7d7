"""Token merging: self-attention over fewer tokens (Bolya & Hoffman 2023, ToMe for SD, arXiv:2303.17604).

Of each 2x2 square of positions the upper left one is a destination, the other three are sources. The sources
most like some destination (cosine) are averaged into it, self-attention runs over what is left, and each
merged position gets its destination's output. The paper draws the destinations at random; here they are
fixed, so that a picture depends on nothing but its seed and prompt. An approximation, for speed where
pictures are large: the cost of attention falls with (1 - ratio)^2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ldm.models.attention import SpatialTransformer
from ldm.models.unet import UNet
from ldm.models.variants import self_attention_places, sharing

LARGEST = 0.75  # three of four positions are sources


def merging(unet: UNet, ratio: float | int, resolutions: int = 1) -> UNet:
    """`unet` with tokens merged around its self-attention, weights shared.

    Args:
        ratio: of the tokens to merge, 0 (the same bits as `unet`) to 0.75; their default is 0.5.
        resolutions: how many of the resolutions with attention, from the finest, where it costs the most.

    Raises ValueError for a ratio outside 0..0.75, resolutions below 1, or a UNet without transformers.
    """
    if not 0 <= ratio <= LARGEST:
        raise ValueError(f"ratio of merged tokens must be between 0 and {LARGEST}, got {ratio}")
    if resolutions < 1:
        raise ValueError(f"token merging needs at least 1 resolution, got {resolutions}")
    if unet.config.attention != "transformer":
        raise ValueError(
            f"token merging needs transformers, this UNet has {unet.config.attention!r} attention"
        )
    variant = sharing(unet)
    places = self_attention_places(unet).values()
    finest = sorted({place.factor for place in places})[:resolutions]
    for place in places:
        if place.factor in finest and ratio > 0:
            transformer = variant.get_submodule(place.path)
            assert isinstance(transformer, SpatialTransformer)
            variant.set_submodule(place.path, MergingTransformer(transformer, ratio))
    return variant


class MergingTransformer(SpatialTransformer):
    """`transformer` with tokens merged around its self-attentions, which it tells the picture's height."""

    def __init__(self, transformer: SpatialTransformer, ratio: float | int):
        nn.Module.__init__(self)
        self.__dict__.update(transformer.__dict__)  # its layers under their own names
        for block in self.blocks:
            attention = block.attn1
            assert isinstance(attention, nn.Module)
            block.attn1 = MergedAttention(attention, ratio)

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "RB M E"] | None = None
    ) -> Float[Tensor, "B_out C H W"]:
        for block in self.blocks:
            assert isinstance(block.attn1, MergedAttention)
            block.attn1.height = x.shape[2]
        return super().forward(x, context)


class MergedAttention(nn.Module):
    """`attention` of tokens to themselves after merging `ratio` of them; `height` is set before each call."""

    def __init__(self, attention: nn.Module, ratio: float | int):
        super().__init__()
        self.attention = attention
        self.ratio = ratio
        self.height = 0

    def forward(self, x: Float[Tensor, "B N D"], context: None = None) -> Float[Tensor, "B N D"]:
        merge = Merge.of(x, self.height, self.ratio)
        return merge.undo(self.attention(merge(x)))


@dataclass(frozen=True)
class Merge:
    """Which tokens are averaged into which: indices into the N positions, in each sample's own order."""

    kept: Int[Tensor, "B K"]  # sources that stay
    merged: Int[Tensor, "B R"]  # sources that go
    target: Int[Tensor, "B R"]  # where each goes: a number among the destinations
    destinations: Int[Tensor, "B M"]

    @classmethod
    def of(cls, x: Float[Tensor, "B N D"], height: int, ratio: float | int) -> "Merge":
        """The best int(ratio N) merges, by cosine of source and destination; at most all sources."""
        size = x.shape[:2]
        grid = is_destination(height, x.shape[1] // height, x.device)
        source, destination = (~grid).nonzero()[:, 0], grid.nonzero()[:, 0]  # (S,), (M,)
        unit = F.normalize(x, dim=-1)
        likeness, target = (unit[:, source] @ unit[:, destination].transpose(1, 2)).max(dim=-1)  # (B, S)
        order = likeness.argsort(dim=1, descending=True, stable=True)
        count = min(int(ratio * size[1]), len(source))
        merged, kept = order[:, :count], order[:, count:]
        return cls(source[kept], source[merged], target.gather(1, merged), destination.expand(size[0], -1))

    def __call__(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B L D"]:
        """The L = N - R tokens that are left: kept sources, then destinations with what they took in."""
        left = take(x, self.destinations)
        index = self.target[..., None].expand(-1, -1, x.shape[2])
        left = left.scatter_reduce(1, index, take(x, self.merged), reduce="mean", include_self=True)
        return torch.cat([take(x, self.kept), left], dim=1)

    def undo(self, y: Float[Tensor, "B L D"]) -> Float[Tensor, "B N D"]:
        """All N positions again; a merged one has its destination's value."""
        kept, left = y.split([self.kept.shape[1], self.destinations.shape[1]], dim=1)
        places = torch.cat([self.kept, self.destinations, self.merged], dim=1)  # (B, N)
        values = torch.cat([kept, left, take(left, self.target)], dim=1)
        return torch.empty_like(values).scatter(1, places[..., None].expand_as(values), values)


def is_destination(height: int, width: int, device: torch.device) -> Bool[Tensor, " N"]:
    """True at the upper left position of each 2x2 square, row by row; squares at an odd edge are cut."""
    grid = torch.zeros(height, width, dtype=torch.bool, device=device)
    grid[::2, ::2] = True
    return rearrange(grid, "h w -> (h w)")


def take(x: Float[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
