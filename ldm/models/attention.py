"""Attention: cross-attention, GEGLU, transformer block, spatial transformer, ADM self-attention block.

Sources: Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E.2.1; Shazeer 2020
(arXiv:2002.05202) for GEGLU; Dhariwal & Nichol 2021 (arXiv:2105.05233) for the ADM self-attention block.

A context may have R times as many rows as `x`, several prompts for the same pictures: what comes before the
first cross-attention is then computed once, and the output has R times the rows (`blocks.repeat_rows`).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.blocks import add, repeat_rows, zero_init

PIECE = 1024  # tokens that go through a feed-forward at once on the CPU
SHORT = 256  # queries up to which the CPU trains attention in bfloat16 more slowly than in float32


def attend(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    causal: bool = False,
) -> Float[Tensor, "B heads N d"]:
    """Scaled dot-product attention; in training on the CPU in bfloat16 short ones are computed in float32.

    There the gradient is slower in bfloat16 than in float32 (`benchmarks.training` times the whole step),
    and rounds more.
    """
    if q.is_cpu and torch.is_grad_enabled() and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT:
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
        return h.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head attention of `x` to `context` (to itself where that is None); q, k and v have no bias."""

    def __init__(self, dim: int, context_dim: int | None, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "B N D"], context: Float[Tensor, "RB M E"] | None = None
    ) -> Float[Tensor, "B_out N D"]:
        context = x if context is None else context
        q = repeat_rows(self.to_q(x), len(context))
        q, k, v = (
            rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads)
            for y in (q, self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))


class FeedForward(nn.Module):
    """GEGLU: `proj_out(value * gelu(gate))` with four times the width inside and the exact GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        if not x.is_cpu or torch.is_grad_enabled():
            return self._gated(x)
        # In pieces what is inside, eight times as wide as x, stays in the processor's cache
        pieces = [self._gated(piece) for piece in x.flatten(0, 1).split(PIECE)]
        return torch.cat(pieces).view_as(x)

    def _gated(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)  # (..., 4D) each
        return self.proj_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each pre-normalised and residual.

    cross_only: the first attention looks at the context too, and no position at another.
    """

    def __init__(self, dim: int, context_dim: int | None, heads: int, *, cross_only: bool = False):
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, context_dim if cross_only else None, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self, x: Float[Tensor, "B N D"], context: Float[Tensor, "RB M E"] | None = None
    ) -> Float[Tensor, "B_out N D"]:
        h = self.attn1(self.norm1(x), context if self.cross_only else None)
        x = add(h, repeat_rows(x, len(h)))
        h = self.attn2(self.norm2(x), context)  # as many rows as the context
        x = add(h, repeat_rows(x, len(h)))
        return add(self.ff(self.norm3(x)), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around the whole.

    `linear_projection` (Stable Diffusion 2) projects after flattening by Linear instead of before it by a 1x1
    convolution: the same function, other weight shapes.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int | None,
        heads: int,
        *,
        depth: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
        cross_only: bool = False,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.cross_only = cross_only
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = zero_init(
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "RB M E"] | None = None
    ) -> Float[Tensor, "B_out C H W"]:
        height = x.shape[2]
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c").contiguous()  # once, and not in each layer norm
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.blocks:
            h = block(h, context)
        if self.linear_projection:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        if not self.linear_projection:
            h = self.proj_out(h)
        return repeat_rows(x, len(h)) + h


QKV_LAYOUTS = {
    "heads_first": "b (heads three d) n -> three b heads n d",
    "qkv_first": "b (three heads d) n -> three b heads n d",
}


class SelfAttentionBlock(nn.Module):
    """ADM self-attention: norm, one fused q/k/v projection, attention, zero-initialised projection, residual.

    `qkv_order` says how the 3C outputs of the fused projection are laid out: "heads_first" (head by head,
    each q, k, v; the original's legacy order, used by every unconditional LDM) or "qkv_first" (all q, all k,
    all v, each head by head).
    """

    def __init__(self, channels: int, heads: int, *, groups: int = 32, qkv_order: str = "heads_first"):
        super().__init__()
        self.heads = heads
        self.layout = QKV_LAYOUTS[qkv_order]
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "B C H W"], context: None = None) -> Float[Tensor, "B C H W"]:
        height = x.shape[2]
        h = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))  # (B, 3C, H*W)
        q, k, v = rearrange(h, self.layout, three=3, heads=self.heads)
        h = rearrange(attend(q, k, v), "b heads n d -> b (heads d) n")
        return x + rearrange(self.proj_out(h), "b c (h w) -> b c h w", h=height)
