"""A UNet whose blocks are compiled by torch.compile, one graph for all blocks of equal shape.

    fast = compile_blocks(unet)

A UNet repeats two classes, the residual block and the spatial transformer, which hold all of its work but
three convolutions and the resampling. Compiling those instead of the whole network compiles each shape once,
however often it stands in the network. The first call at a size compiles; after it neither step, prompt nor
guidance scale does so again. Stands behind `variants.py` and everything that replaces layers: compile last.
"""

import os
import shutil
from typing import TypeVar

import torch
import torch.compiler.config

from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import ResBlock
from ldm.models.unet import UNetEncoder
from ldm.models.variants import sharing

Encoder = TypeVar("Encoder", bound=UNetEncoder)

COMPILERS = ("g++", "clang++", "cl")
SHAPES = 64  # of one class in one network; Stable Diffusion's has 15 residual blocks


def compile_blocks(unet: Encoder, backend: str = "inductor") -> Encoder:
    """A copy of the structure of `unet`, or of a ControlNet, with the same tensors and compiled blocks.

    Hooks of a block itself run as ever; those of the layers inside (`attention_maps.record`) are not seen, so
    look inside `unet` instead. backend: of torch.compile. Raises ValueError where the CPU has to compute and
    there is no C++ compiler to translate for it.
    """
    if backend == "inductor" and unet.conv_in.weight.is_cpu and not has_compiler():
        raise ValueError(
            "compiling needs a C++ compiler: install g++ or clang++, or name one in the variable CXX"
        )
    limits = torch.compiler.config  # of the whole process: a shape is a recompilation to torch
    limits.recompile_limit = max(limits.recompile_limit, SHAPES)
    variant = sharing(unet)
    for block in variant.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            # Its forward, not the module: that would take the hooks into the graph, and forget later ones
            block.forward = torch.compile(  # type: ignore[method-assign, assignment]
                block.forward, fullgraph=True, dynamic=False, backend=backend
            )
    return variant


def has_compiler() -> bool:
    names = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    return any(shutil.which(name) for name in names)
