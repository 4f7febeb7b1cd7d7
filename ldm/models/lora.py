"""Low-rank adaptation of any of our networks: LoRA (Hu et al. 2021, arXiv:2106.09685), LoCon of convolutions.

    lora = add_lora(unet, LoRAConfig(rank=4))           # fresh: outputs stay the same, bit for bit
    lora = attach(unet, weights, "style", scale=0.8)    # of a file, see ldm/weights/lora.py

A layer y = W x + b becomes y = W x + b + scale (alpha / rank) up(down(x)), with `up` zero at first. It
becomes so in place: a linear layer or convolution takes on a subclass of its class and a list of adapters,
and loses both again with the last adapter. So every name, parameter and hook of the network stays; its state
dict does not show adapters (a file of a LoRA is a file of its own), `parameters()` does, and
`variants.sharing`, compiling and moving work. What was made of the network before (`fast_convolutions`,
`compile_blocks`) does not know of adapters that come later; their scales are tensors, which all such forms
see change.
"""

import difflib
import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.lora_layers import LAYERS, PLAIN, Adapted, Adapter, adaptable
from ldm.models.lora_math import Factors, LoRAWeights
from ldm.seeding import generator

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out")
PROJECTIONS = (
    "*.ff.proj_in",
    "*.ff.proj_out",
    "*attention*.proj_in",
    "*attention*.proj_out",
    "*.fc1",
    "*.fc2",
)
CONVOLUTIONS = ("*.conv1", "*.conv2", "*.conv", "*.shortcut", "*.time_proj")
# What files of others usually hold: diffusers' and peft's, kohya's, and LoCon's besides
TARGETS = {
    "attention": ATTENTION,
    "transformer": ATTENTION + PROJECTIONS,
    "convolutions": CONVOLUTIONS,
}
INITS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted, and how.

    rank: of the change; alpha: its weight is alpha / rank, None is alpha = rank.
    dropout: of the input of `down`, in training.
    targets: names of TARGETS or patterns of our module names, such as "mid_block.*.to_k".
    ranks, alphas: by pattern, for layers that differ; the last that fits counts.
    init: of `down`: "kaiming" (uniform, as kohya and peft) or "gaussian" (variance 1 / rank).
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for where, rank in {"": self.rank, **self.ranks}.items():
            if rank < 1:
                raise ValueError(f"LoRA rank {f'of {where} ' if where else ''}must be at least 1, got {rank}")
        for where, alpha in {"": self.alpha, **self.alphas}.items():
            if alpha is not None and not 0 < alpha < math.inf:
                raise ValueError(f"LoRA alpha {f'of {where} ' if where else ''}must be above 0, got {alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            raise ValueError(f"LoRA targets must name layers: {', '.join(TARGETS)}, or patterns")
        if self.init not in INITS:
            raise ValueError(f"LoRA init must be {' or '.join(INITS)}, got {self.init!r}")

    def rank_of(self, layer: str) -> int:
        return _last(self.ranks, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """Of a layer, by its rank where nothing else is said."""
        alpha = _last(self.alphas, layer, self.alpha)
        return float(self.rank_of(layer)) if alpha is None else alpha


def _last(table: dict[str, Any], layer: str, otherwise: Any) -> Any:
    fitting = [value for pattern, value in table.items() if fnmatch.fnmatchcase(layer, pattern)]
    return fitting[-1] if fitting else otherwise


def targeted(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers that targets name, in the network's order. Raises ValueError where one names none."""
    layers, chosen = adaptable(module), set()
    for target in targets:
        fitting = {
            name
            for pattern in TARGETS.get(target, (target,))
            for name in layers
            if fnmatch.fnmatchcase(f".{name}" if pattern.startswith("*.") else name, pattern)
        }
        if not fitting and target not in TARGETS:
            ends = {f"*.{name.rpartition('.')[2]}" for name in layers}
            near = difflib.get_close_matches(target, [*TARGETS, *sorted(ends), *layers], n=3, cutoff=0.5)
            raise ValueError(
                f"LoRA target {target!r} is no layer of {type(module).__name__}; near it: "
                f"{', '.join(near) or 'nothing'}; known: {', '.join(TARGETS)}, and patterns of names such as "
                f"{next(iter(layers), 'none')}"
            )
        chosen |= fitting
    if not chosen:
        raise ValueError(f"LoRA targets {', '.join(targets)} are no layers of {type(module).__name__}")
    return [name for name in layers if name in chosen]


# --- a LoRA in a network ------------------------------------------------------------------------------------


class LoRA:
    """One LoRA in one network: its adapters by the name of their layer. See `add_lora` and `attach`."""

    def __init__(self, module: nn.Module, name: str, adapters: dict[str, Adapter]):
        self.module = module
        self.name = name
        self.adapters = adapters
        self.scale = 1.0
        self.merged = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: `down` and `up` of each layer, in the network's order."""
        for adapter in self.adapters.values():
            yield adapter.down
            yield adapter.up

    @property
    def weights(self) -> dict[str, Factors]:
        """What a file of it holds; the tensors are those that are trained."""
        return {name: adapter.factors for name, adapter in self.adapters.items()}

    @torch.no_grad()
    def set_scale(self, scale: float | int) -> None:
        """How strongly it acts from now on: 1 as trained, 0 not at all. Raises ValueError once merged."""
        if self.merged:
            raise ValueError(f"LoRA {self.name!r} is merged at scale {self.scale:g}; unmerge it first")
        if not math.isfinite(scale):
            raise ValueError(f"the scale of LoRA {self.name!r} must be a finite number, got {scale}")
        self.scale = float(scale)
        for adapter in self.adapters.values():
            adapter.strength.fill_(scale * adapter.alpha / len(adapter.down))

    def merge(self) -> None:
        """Add it to the network's own weights at its present scale: no work in a step any more.

        Computed in float32, then rounded to the weights' format. Raises ValueError where it is merged.
        """
        if self.merged:
            raise ValueError(f"LoRA {self.name!r} is merged already; a second time would double it")
        self._add(1)
        self._detach()
        self.merged = True

    def unmerge(self) -> None:
        """Subtract what `merge` added, up to rounding, and act as before. Raises ValueError unless merged."""
        if not self.merged:
            raise ValueError(f"LoRA {self.name!r} is not merged")
        self._add(-1)
        _attach(self.module, self.adapters)
        self.merged = False

    def remove(self) -> None:
        """Leave the network as it was, to the bit. Raises ValueError where it is merged: unmerge it first."""
        if self.merged:
            raise ValueError(f"LoRA {self.name!r} is merged into the weights; unmerge it first")
        self._detach()
        self.adapters = {}

    @torch.no_grad()
    def _add(self, sign: int) -> None:
        for name, adapter in self.adapters.items():
            weight = self.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            change = adapter.delta.to(weight.device)
            weight.copy_(weight.to(change.dtype) + sign * change)

    def _detach(self) -> None:
        for name, adapter in self.adapters.items():
            layer = self.module.get_submodule(name)
            assert isinstance(layer, Adapted)
            left = [other for other in layer.adapters if other is not adapter]
            layer.adapters = nn.ModuleList(left)
            if not left:
                del layer.adapters
                layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]


def add_lora(
    module: nn.Module,
    config: LoRAConfig,
    name: str = "lora",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoRA:
    """A fresh LoRA to train, which changes no output yet.

    Args:
        dtype: of its parameters; by default that of each layer.
        freeze: take the gradient from the network's own parameters. Other LoRAs keep theirs.
    Raises ValueError for targets that are no layers.
    """
    layers, weights = adaptable(module), {}
    for layer in targeted(module, config.targets):
        base, rank = layers[layer].weight, config.rank_of(layer)
        if rank > min(base.shape[0], base[0].numel()):
            raise ValueError(
                f"LoRA rank {rank} of {layer} is more than its weight has, {tuple(base.shape)}: use less"
            )
        down = _initial((rank, *base.shape[1:]), config.init, generator(seed, "lora", layer))
        kind = dtype or base.dtype
        up = torch.zeros(len(base), rank, *[1] * (base.ndim - 2))
        weights[layer] = Factors(down.to(base.device, kind), up.to(base.device, kind), config.alpha_of(layer))
    if freeze:
        own = {id(p) for each in module.modules() if isinstance(each, Adapter) for p in each.parameters()}
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    return _put(module, weights, name, config.dropout)


def attach(module: nn.Module, weights: LoRAWeights, name: str = "lora", scale: float | int = 1.0) -> LoRA:
    """A trained LoRA, in each layer's device and number format, without gradient.

    Raises ValueError for layers that the network does not have and for shapes that differ, with counts.
    """
    layers = adaptable(module)
    unknown = [layer for layer in weights if layer not in layers]
    other = [
        f"{layer} {tuple(factors.shape)} for {tuple(layers[layer].weight.shape)}"
        for layer, factors in weights.items()
        if layer in layers and layers[layer].weight.shape != factors.shape
    ]
    if unknown or other:
        matched = len(weights) - len(unknown) - len(other)
        told = [f"{len(unknown)} unknown: {', '.join(unknown[:3])}"] * bool(unknown)
        told += [f"{len(other)} of another shape: {', '.join(other[:3])}"] * bool(other)
        raise ValueError(
            f"LoRA {name!r} does not fit {type(module).__name__}: matched {matched} of {len(weights)} "
            f"layers; {'; '.join(told)}"
        )
    placed = {
        layer: Factors(
            factors.down.to(layers[layer].weight), factors.up.to(layers[layer].weight), factors.alpha
        )
        for layer, factors in weights.items()
    }
    lora = _put(module, placed, name, 0.0)
    for parameter in lora.parameters():
        parameter.requires_grad_(False)
    lora.set_scale(scale)
    return lora


def _put(module: nn.Module, weights: LoRAWeights, name: str, dropout: float) -> LoRA:
    adapters = {
        layer: Adapter(module.get_submodule(layer), factors, dropout).train(module.training)
        for layer, factors in weights.items()
    }
    _attach(module, adapters)
    return LoRA(module, name, adapters)


def _attach(module: nn.Module, adapters: dict[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, Adapted):
            layer.__class__ = LAYERS[type(layer)]
            layer.adapters = nn.ModuleList()
        layer.adapters.append(adapter)  # type: ignore[union-attr, operator]


def _initial(shape: tuple[int, ...], init: str, rng: torch.Generator) -> Tensor:
    """Values of `down`, on the CPU: uniform with the variance 1 / (3 fan in), or normal with 1 / rank."""
    if init == "gaussian":
        return torch.randn(shape, generator=rng) / math.sqrt(shape[0])
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=rng) - 1) * bound
