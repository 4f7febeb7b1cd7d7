"""What a LoRA is without a network: factors of low rank for each layer, and what they amount to.

    dW = (alpha / rank) (up @ down)          (Hu et al. 2021, arXiv:2106.09685, section 4.1)

A convolution's `down` is a convolution of its own kernel size to `rank` channels, its `up` a 1x1 convolution;
as matrices over the flattened kernel they multiply all the same. `lora.py` puts factors into a network,
`lora_combine.py` makes new ones of given ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one layer: down (rank, in, ...) with the layer's kernel, up (out, rank, ...) with one of size 1.

    alpha: the layer's weight changes by `alpha / rank` times their product.
    """

    down: Tensor
    up: Tensor
    alpha: float | int

    def __post_init__(self) -> None:
        if self.down.ndim != self.up.ndim or self.up.ndim < 2 or math.prod(self.up.shape[2:]) != 1:
            raise ValueError(f"these are no factors of a layer: {_shapes(self.down, self.up)}")
        rank, rows = self.down.shape[0], self.up.shape[1]
        if rank != rows:
            raise ValueError(f"down has rank {rank}, up {rows}: {_shapes(self.down, self.up)}")
        if rank < 1:
            raise ValueError("rank 0 changes nothing; the rank of a LoRA must be at least 1")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> torch.Size:
        """Of the layer's weight."""
        return torch.Size([self.up.shape[0], *self.down.shape[1:]])


LoRAWeights = Mapping[str, Factors]  # by the name of a layer, as in our networks


def product(down: Float[Tensor, "r ..."], up: Float[Tensor, "O r ..."]) -> Float[Tensor, "O ..."]:
    """`up @ down` in the shape of the layer's weight, in float32 at least."""
    wide = torch.promote_types(down.dtype, torch.float32)
    return (up.to(wide).flatten(1) @ down.to(wide).flatten(1)).view(len(up), *down.shape[1:])


def delta(factors: Factors) -> Float[Tensor, "O ..."]:
    """By how much a layer's weight changes, in float32 at least."""
    return factors.scale * product(factors.down, factors.up)


def widths(shapes: Sequence[Sequence[int]]) -> str:
    """Some shapes as text, each once."""
    return ", ".join(dict.fromkeys("x".join(map(str, shape)) for shape in shapes))


def _shapes(down: Tensor, up: Tensor) -> str:
    return f"down {tuple(down.shape)}, up {tuple(up.shape)}"
