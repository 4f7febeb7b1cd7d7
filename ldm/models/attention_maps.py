"""Which token of the prompt each part of a picture attends to (Tang et al. 2022, DAAM, arXiv:2210.04885).

    with record(unet, pictures=4) as maps:
        ...sample...
    maps.mean()  # (4, T, h, w)

Cross-attention maps are averaged over the heads and, resized to the latents by bicubic interpolation, over
layers and steps (they sum). Hooks read what goes into each cross-attention and
compute its map beside it: the network is not edited and gives the same bits as without. `sample/attention.py`
makes pictures of the maps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.attention import Attention, SpatialTransformer
from ldm.models.unet import UNet
from ldm.models.variants import attention_places


def attention_map(
    attention: Attention, x: Float[Tensor, "B N D"], context: Float[Tensor, "B T E"]
) -> Float[Tensor, "B N T"]:
    """softmax(q k^T / sqrt(d)), the mean over the heads: each row sums to 1. At least float32."""
    q, k = (
        rearrange(y, "b n (heads d) -> b heads n d", heads=attention.heads)
        for y in (attention.to_q(x), attention.to_k(context))
    )
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, T)
    return scores.softmax(dim=-1).mean(dim=1)


class AttentionMaps:
    """The running sum of the maps; see `record`. Its memory does not grow with layers or steps."""

    def __init__(self, pictures: int | None, context: Tensor | None):
        self.pictures = pictures
        self.context = context
        self.total: Tensor | None = None  # (B, T, h, w)
        self.count = 0  # maps in the sum, of each picture
        self._height, self._latents = 0, (0, 0)  # height of the layer that runs, size of the latents

    def mean(self) -> Float[Tensor, "B T h w"]:
        """The mean over layers and steps; sums to 1 over the tokens. Bicubic interpolation may go a little
        below 0. Raises ValueError where nothing was recorded."""
        if self.total is None:
            raise ValueError("no attention was recorded: the network did not run with this prompt")
        return self.total / self.count

    def _enter(self, factor: int, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        height, width = inputs[0].shape[2:]
        self._height, self._latents = height, (height * factor, width * factor)

    @torch.no_grad()
    def _attend(self, attention: Attention, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x = inputs[0]
        context = inputs[1] if len(inputs) > 1 else named["context"]
        # One picture after the other, since all heads of a map stand in memory at once
        maps = [
            # A batch with several contexts for each x may still have the rows of x once here
            attention_map(attention, x[i % len(x)][None], context[i][None])  # (1, N, T)
            for i in self._rows(context)
        ]
        if not maps:
            return
        new = rearrange(torch.cat(maps), "b (h w) t -> b t h w", h=self._height)
        if self.total is None:
            self.total = new.new_zeros(*new.shape[:2], *self._latents)
        if self.total.shape[:2] != new.shape[:2]:
            raise ValueError(
                f"attention of {tuple(self.total.shape[:2])} pictures and tokens was recorded, then of "
                f"{tuple(new.shape[:2])}: give record() the context of the prompts to look at"
            )
        size = self.total.shape[2:]
        if new.shape[2:] != size:
            new = F.interpolate(new, size=size, mode="bicubic", align_corners=False)
        self.total += new
        self.count += 1

    def _rows(self, context: Float[Tensor, "B T E"]) -> range:
        """Rows of the batch to record: those of the given context, or the last `pictures`."""
        if self.context is None:
            count = len(context) if self.pictures is None else self.pictures
            if count > len(context):
                raise ValueError(f"attention of {count} pictures asked for, the batch has {len(context)}")
            return range(len(context) - count, len(context))
        count = len(self.context)
        for first in range(len(context) - count, -1, -count):
            if torch.equal(context[first : first + count], self.context):
                return range(first, first + count)
        return range(0)


@contextmanager
def record(
    unet: UNet,
    pictures: int | None = None,
    *,
    context: Float[Tensor, "B T D"] | None = None,
    factors: tuple[int, ...] | None = None,
) -> Iterator[AttentionMaps]:
    """Record the cross-attention of what `unet` computes inside the block, for one batch of pictures.

    Args:
        pictures: how many of the last rows of a batch count; with guidance that is [uncond, cond], those of
            the prompt. None takes all rows.
        context: instead of `pictures`, the conditioning (B, T, D) whose rows count, wherever they stand;
            needed where the unconditional rows come in a batch of their own, or prompts are composed.
        factors: only layers at these downsampling factors of the latents; None takes all.

    Raises ValueError where there is no such layer, and while recording where batches of other sizes or
    numbers of tokens follow each other, which `context` sorts out.
    """
    if unet.config.context_dim is None:
        raise ValueError("this UNet reads no context, so there is no attention to a prompt to record")
    places = list(attention_places(unet).values())
    layers = [place for place in places if factors is None or place.factor in factors]
    if not layers:
        known = ", ".join(str(factor) for factor in sorted({place.factor for place in places}))
        raise ValueError(f"attention stands at downsampling factors {known}, none of {factors}")
    maps = AttentionMaps(pictures, context)
    handles = []
    try:
        for place in layers:
            layer: nn.Module = unet.get_submodule(place.path)
            assert isinstance(layer, SpatialTransformer), "a context is read by spatial transformers"
            handles.append(layer.register_forward_pre_hook(partial(maps._enter, place.factor)))
            for block in layer.blocks:
                assert isinstance(block.attn2, Attention)
                handles.append(block.attn2.register_forward_pre_hook(maps._attend, with_kwargs=True))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
