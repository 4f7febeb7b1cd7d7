"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): less memory in training for more time.

A block keeps its input alone, and computes what is inside it a second time when its gradient is due, dropout
included. The gradients are the same to the bit. Nothing changes where no gradient is asked for.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import SelfAttentionBlock, SpatialTransformer
from ldm.models.autoencoder import MidAttention
from ldm.models.blocks import ResBlock
from ldm.models.clip import TextBlock

BLOCKS = (ResBlock, SpatialTransformer, SelfAttentionBlock, MidAttention, TextBlock)


def recompute_blocks(module: nn.Module) -> None:
    """Every block of `module` computes its inside again in the backward pass; before any compiling."""
    for block in module.modules():
        if isinstance(block, BLOCKS):
            # A method, not a closure: a copy of the network has copies of its blocks run
            block.forward = MethodType(recomputed, block)  # type: ignore[method-assign, assignment]


def recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *inputs, **options)
    return checkpoint(forward, block, *inputs, use_reentrant=False, **options)
