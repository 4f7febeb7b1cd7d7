"""Exponential moving average of weights (Polyak averaging), with the warm-up of the latent diffusion code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """`shadow <- decay shadow + (1 - decay) weight`, in float32, once an update.

    The n-th update (n = 1, 2, ...) uses `min(decay, (1 + n) / (10 + n))`, so its start is soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.parameters = dict(parameters)
        self.shadow = {
            name: parameter.detach().float().clone() for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights; after it, its own again."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._assign(self.shadow)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
