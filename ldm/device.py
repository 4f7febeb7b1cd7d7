"""Which device and which number format to compute in."""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises ValueError for a device this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; try auto or cpu"
        ) from error
    return device


def pick_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"number format {name!r} is unknown; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def place(module: Module, device: torch.device) -> Module:
    """`module` on `device` with channels-last weights, the layout that the autoencoders train in."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
