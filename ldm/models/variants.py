"""Variants of a UNet that share its weights: the same tensors in another structure, so they cost no memory.

    weak = perturbed(unet, "mid")

has some of its self-attention maps replaced by the identity, which weakens the model's sense of structure:
what perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377; `diffusion/perturbed.py`) leads away
from. The base is never edited. `token_merging.py` makes another variant in the same way.
"""

import copy
from itertools import chain
from typing import NamedTuple, TypeVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.attention import Attention, SelfAttentionBlock, SpatialTransformer
from ldm.models.unet import DownBlock, UNet, UpBlock

M = TypeVar("M", bound=nn.Module)


def sharing(module: M) -> M:
    """A copy of the structure of `module` whose parameters and buffers are those of `module` itself.

    Its submodules can be replaced without touching `module`; training or loading weights changes both. Moving
    one to a device or another number format moves the parameters of both, but not the buffers: move first.
    Forward hooks are of `module` alone: who listens to it does not hear the copy.
    """
    tensors = chain(module.parameters(), module.buffers())
    variant = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for each in variant.modules():
        each._forward_pre_hooks.clear()
        each._forward_hooks.clear()
    return variant


class Place(NamedTuple):
    """Where an attention stands in a UNet."""

    path: str  # of the module, for `get_submodule`
    factor: int  # the latents' resolution divided by its own


def attention_places(unet: UNet) -> dict[str, Place]:
    """Every attention, in running order, by name: "down.0.1" (block, number in it), "mid", "up.3.2".

    down.0 and the last up block have the finest resolution.
    """
    finest_last = len(unet.up_blocks) - 1
    down = {
        f"down.{level}.{i}": Place(f"down_blocks.{level}.attentions.{i}", 2**level)
        for level, block in enumerate(unet.down_blocks)
        for i in range(_attentions(block))
    }
    up = {
        f"up.{number}.{i}": Place(f"up_blocks.{number}.attentions.{i}", 2 ** (finest_last - number))
        for number, block in enumerate(unet.up_blocks)
        for i in range(_attentions(block))
    }
    return down | {"mid": Place("mid_block.attention", unet.config.factor)} | up


def _attentions(block: nn.Module) -> int:
    assert isinstance(block, DownBlock | UpBlock)
    return len(block.attentions)


def self_attention_places(unet: UNet) -> dict[str, Place]:
    """Those of `attention_places` where positions attend to each other."""
    places = attention_places(unet)
    return {
        name: place
        for name, place in places.items()
        if not getattr(unet.get_submodule(place.path), "cross_only", False)
    }


def chosen(unet: UNet, layers: str) -> list[Place]:
    """The self-attentions that `layers` names: "mid", "down", "up", "all", a block "up.1", one attention
    "up.1.0", or several of these with commas between.

    Raises ValueError for a name that is of no attention here.
    """
    places = self_attention_places(unet)
    wanted = [name.strip() for name in layers.split(",")]
    known = list(dict.fromkeys(group for name in places for group in groups(name)))
    for name in wanted:
        if name not in known:
            raise ValueError(f"layers {layers!r}: no attention {name!r} here; there are {', '.join(known)}")
    return [place for name, place in places.items() if not set(wanted).isdisjoint(groups(name))]


def groups(name: str) -> list[str]:
    """What an attention can be called by: "up.1.0" is in "all", "up", "up.1" and is "up.1.0"."""
    parts = name.split(".")
    return ["all", *(".".join(parts[: n + 1]) for n in range(len(parts)))]


def perturbed(unet: UNet, layers: str = "mid") -> UNet:
    """`unet` with the identity as the map of the self-attentions in `layers` (see `chosen`), weights shared.

    Cross-attention to the prompt stays. Of variants on top of each other this comes first:
    `merging(perturbed(unet), 0.5)`. Raises ValueError for a name that is of no attention.
    """
    variant = sharing(unet)
    for place in chosen(unet, layers):
        attention = variant.get_submodule(place.path)
        if isinstance(attention, SpatialTransformer):
            for block in attention.blocks:
                assert isinstance(block.attn1, Attention), "perturbed takes the UNet, not a variant of it"
                block.attn1 = IdentityAttention(block.attn1)
        else:
            assert isinstance(attention, SelfAttentionBlock)
            variant.set_submodule(place.path, IdentityAttentionBlock(attention))
    return variant


class IdentityAttention(nn.Module):
    """Self-attention in which each position attends to itself alone: softmax(...) V becomes V."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Float[Tensor, "B N D"], context: None = None) -> Float[Tensor, "B N D"]:
        return self.attention.to_out(self.attention.to_v(x))


class IdentityAttentionBlock(nn.Module):
    """The same of ADM's self-attention block, with its norm, fused projection and residual."""

    def __init__(self, block: SelfAttentionBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Float[Tensor, "B C H W"], context: None = None) -> Float[Tensor, "B C H W"]:
        height = x.shape[2]
        h = self.block.qkv(rearrange(self.block.norm(x), "b c h w -> b c (h w)"))  # (B, 3C, H*W)
        _, _, v = rearrange(h, self.block.layout, three=3, heads=self.block.heads)
        h = self.block.proj_out(rearrange(v, "b heads n d -> b (heads d) n"))
        return x + rearrange(h, "b c (h w) -> b c h w", h=height)
