"""What the tables of foreign names share: the tensors a configuration implies, and renaming by a two-way
table.

A table maps each of our tensor names to a foreign one. `compvis.py` and `diffusers.py` build theirs by
walking a configuration, as the models' constructors do. A name that ends in `[0]`, `[1]` or `[2]` is that
third of a fused tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.models.bert import BertTextConfig, BertTextEncoder
from ldm.models.class_embedder import ClassEmbedder, ClassEmbedderConfig
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNet, UNetConfig

Config = UNetConfig | ControlNetConfig | AutoencoderConfig | TextConfig | BertTextConfig | ClassEmbedderConfig
Tensors = Mapping[str, Tensor]
Names = dict[str, str]  # ours -> theirs

BUILD: dict[type, Callable[[Any], nn.Module]] = {
    UNetConfig: UNet,
    ControlNetConfig: ControlNet,
    AutoencoderConfig: make_autoencoder,
    TextConfig: TextEncoder,
    BertTextConfig: BertTextEncoder,
    ClassEmbedderConfig: ClassEmbedder,
}


class WithoutInit(TorchFunctionMode):
    """Inside the block modules are built without initial values, which weights from a file would replace."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FILLERS or getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


FILLERS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


def build_empty(config: Config) -> nn.Module:
    """The module that `config` describes, without memory for its weights (on the meta device)."""
    with torch.device("meta"), WithoutInit():
        return BUILD[type(config)](config)


@cache
def shapes(config: Config) -> Mapping[str, Size]:
    """Name and shape of every tensor of the model that `config` describes; allocates nothing."""
    state = build_empty(config).state_dict()
    return MappingProxyType({name: tensor.shape for name, tensor in state.items()})


def inside(ours: str, theirs: str, modules: Mapping[str, str]) -> Names:
    """The table of a part, given relative to that part, as a table of the whole."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in modules.items()}


def tensor_names(config: Config, modules: Mapping[str, str], fused: str | None = None) -> Names:
    """The table of every tensor from one of modules (`conv_in`) and of odd single tensors (`to_q.weight`).

    `modules` may name what this configuration does not have; it must name all that it has. Tensors of ours
    with `fused` in their name stand in the table as three thirds.
    """
    ours = [
        name for whole in shapes(config) for name in (_thirds(whole) if fused and fused in whole else [whole])
    ]
    names = {}
    for name in ours:
        module, _, kind = name.rpartition(".")
        names[name] = modules[name] if name in modules else f"{modules[module]}.{kind}"
    assert len(set(names.values())) == len(names), "two of our tensors have one foreign name"
    return names


def into_ours(tensors: Tensors, names: Names) -> dict[str, Tensor]:
    """Foreign tensors under our names. Unknown ones keep theirs, so that strict loading reports them."""
    ours = {theirs: name for name, theirs in names.items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def fitted(tensors: Tensors, config: Config) -> dict[str, Tensor]:
    """Our tensors in our shapes, 1x1 convolutions and linear layers being the same thing.

    A shape that does not fit stays, so that strict loading reports it.
    """
    expected = shapes(config)
    fits = {name for name in tensors if _core(tensors[name].shape) == _core(expected.get(name, Size()))}
    return {
        name: tensor.reshape(expected[name]) if name in fits else tensor for name, tensor in tensors.items()
    }


def into_theirs(tensors: Tensors, names: Names) -> dict[str, Tensor]:
    """Our tensors under foreign names. Raises ValueError unless they are exactly those of the table."""
    wrong = sorted(set(names) ^ set(tensors))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are missing or unknown: {', '.join(wrong[:5])}")
    return {theirs: tensors[name] for name, theirs in names.items()}


def split(tensors: Tensors, fused: str, parts: Callable[[Tensor], Iterable[Tensor]]) -> dict[str, Tensor]:
    """Each tensor with `fused` in its name becomes its three `parts`, `name[0]` to `name[2]`."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        result |= dict(zip(_thirds(name), parts(tensor), strict=True)) if fused in name else {name: tensor}
    return result


def fuse(tensors: Tensors, whole: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`. Thirds that are not complete are left as they are."""
    result = dict(tensors)
    for name in [name.removesuffix("[0]") for name in tensors if name.endswith("[0]")]:
        if all(third in tensors for third in _thirds(name)):
            result[name] = whole([result.pop(third) for third in _thirds(name)])
    return result


def _thirds(name: str) -> list[str]:
    return [f"{name}[{i}]" for i in range(3)]


def _core(shape: Size) -> list[int]:
    """A shape without its trailing ones, in whose number linear layers and 1x1 convolutions differ."""
    core = list(shape)
    while core and core[-1] == 1:
        core.pop()
    return core
