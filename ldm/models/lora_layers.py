"""Layers with low-rank branches: what `lora.py` makes of linear layers and convolutions, in place.

An `Adapter` is one branch of one layer. A layer with adapters is of a subclass of its own class; `adaptable`
tells which layers can have any.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.blocks import add
from ldm.models.lora_math import Factors, product


class Adapter(nn.Module):
    """The low-rank branch of one layer: `strength up(down(dropout(x)))`; not part of any state dict.

    strength: scale times alpha / rank, a tensor that shared and compiled forms of the network see change.
    """

    strength: Tensor

    def __init__(self, layer: nn.Module, factors: Factors, dropout: float = 0.0):
        super().__init__()
        self.down = nn.Parameter(factors.down)
        self.up = nn.Parameter(factors.up)
        self.alpha = float(factors.alpha)
        self.dropout = dropout
        self.places: Any = None
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            self.places = (layer.stride, layer.padding, layer.dilation)
        one = torch.ones((), dtype=torch.float32, device=factors.down.device)
        self.register_buffer("strength", one * factors.scale, persistent=False)

    @property
    def factors(self) -> Factors:
        return Factors(self.down.detach(), self.up.detach(), self.alpha)

    @property
    def delta(self) -> Float[Tensor, "O ..."]:
        """By how much the layer's weight changes at the present scale, in float32."""
        return float(self.strength) * product(self.down.detach(), self.up.detach())

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        h = x.to(self.down.dtype)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        if self.places is None:
            return F.linear(F.linear(h, self.down) * self.strength, self.up)
        convolve = F.conv2d if self.down.ndim == 4 else F.conv1d
        return convolve(convolve(h, self.down, None, *self.places) * self.strength, self.up)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        """Nothing: the network's file is the network's."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Nothing, and nothing is missing."""


class Adapted(nn.Module):
    """What a layer with adapters does besides its own."""

    adapters: nn.ModuleList

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        return self.adapt(super().forward(x), x)

    def adapt(self, y: Float[Tensor, "B ..."], x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The layer's own output for `x`, with what the adapters add."""
        for adapter in self.adapters:
            y = add(adapter(x).to(y.dtype), y)
        return y


class LoRALinear(Adapted, nn.Linear):
    pass


class LoRAConv1d(Adapted, nn.Conv1d):
    pass


class LoRAConv2d(Adapted, nn.Conv2d):
    pass


LAYERS: dict[type[nn.Module], type[Adapted]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
}
PLAIN = {adapted: plain for plain, adapted in LAYERS.items()}


def adaptable(module: nn.Module) -> dict[str, nn.Linear | nn.Conv1d | nn.Conv2d]:
    """Every layer that can have adapters, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in (*LAYERS, *PLAIN) and getattr(layer, "groups", 1) == 1
    }  # type: ignore[misc]
