"""Random networks for tests, in which every weight counts."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def randomised(model: M, scale: float = 1.0) -> M:
    """Also the layers that start at zero get values; `scale` above 1 makes what they do more pronounced."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)
