"""Write a LoRA in any of the forms that `lora.py` reads: the same factors, bit for bit, under other names.

    ldm           one safetensors file of our layers; the header has the base model's configuration
    kohya         one safetensors file, which the web UIs read
    diffusers     pytorch_lora_weights.safetensors, as a file: for `load_lora_weights`
    peft          a folder with adapter_config.json for each part
    cloneofsimo   one safetensors file of numbered layers; without alpha, so that goes into `up`

What is written appears complete under its name or not at all. Used by training and `ldm-weights lora`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import to_dict
from ldm.models.lora_math import Factors, LoRAWeights
from ldm.weights.io import save_weights, write_atomically
from ldm.weights.lora import FORMS, PEFT_CONFIG, PEFT_FILES, LoRAFile
from ldm.weights.lora_names import KOHYA, PREFIXES, SIMO_CLASSES, simo_order, theirs
from ldm.weights.names import Config

Tensors = dict[str, Tensor]


def write_lora(
    lora: LoRAFile | Mapping[str, LoRAWeights],
    destination: str | Path,
    configs: Mapping[str, Config],
    form: str = "ldm",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write factors by part to a new file, or a folder in peft's form.

    Args:
        configs: of the base model, by part.
        dtype: number format; None keeps theirs.
        metadata: more for the header of our form and kohya's.
    Raises ValueError, with nothing written, for what the form cannot hold, values that are not finite (in
    `dtype`) and a destination that exists.
    """
    destination = Path(destination)
    parts = lora.parts if isinstance(lora, LoRAFile) else lora
    embeddings = lora.embeddings if isinstance(lora, LoRAFile) else {}
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if destination.exists():
        raise ValueError(f"{destination} exists; give a new name")
    if not any(parts.values()):
        raise ValueError("a LoRA without layers is not written")
    if form != "peft" and destination.suffix != ".safetensors":
        raise ValueError(f"{destination}: this form is one file, named *.safetensors")
    if embeddings and form not in ("ldm", "cloneofsimo"):
        raise ValueError(f"{form} holds no embeddings ({', '.join(embeddings)}); write ldm or cloneofsimo")
    cast = {
        part: {name: _cast(f"{part}.{name}", each, dtype) for name, each in weights.items()}
        for part, weights in parts.items()
        if weights
    }
    if form == "peft":
        _write_peft(cast, destination, configs)
        return destination
    tensors, header = {
        "ldm": _ldm,
        "kohya": _kohya,
        "diffusers": _diffusers,
        "cloneofsimo": _cloneofsimo,
    }[form](cast, configs)
    marked = dict.fromkeys(embeddings, "<embed>")
    extra = dict(metadata or {}) if form in ("ldm", "kohya") else {}
    save_weights(destination, {**tensors, **embeddings}, {"format": "pt", **extra, **marked, **header})
    return destination


def _cast(name: str, factors: Factors, dtype: torch.dtype | None) -> Factors:
    pair = [
        tensor.detach() if dtype is None else tensor.detach().to(dtype)
        for tensor in (factors.down, factors.up)
    ]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in pair):
        raise ValueError(f"layer {name} is not finite{f' as {dtype}' if dtype else ''}, so it is not written")
    return Factors(pair[0], pair[1], factors.alpha)


def _alpha(factors: Factors) -> Tensor:
    """As a tensor without dimensions, in the factors' format where that loses nothing."""
    own = torch.tensor(factors.alpha, dtype=factors.down.dtype)
    return own if float(own) == factors.alpha else torch.tensor(factors.alpha, dtype=torch.float32)


def _ldm(parts: Mapping[str, LoRAWeights], configs: Mapping[str, Config]) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for part, weights in parts.items():
        for layer, factors in weights.items():
            named = {"down": factors.down, "up": factors.up, "alpha": _alpha(factors)}
            tensors |= {f"{part}.{layer}.{role}": tensor for role, tensor in named.items()}
    return tensors, {"lora": {"base": {part: to_dict(configs[part]) for part in parts}}}


def _kohya(parts: Mapping[str, LoRAWeights], configs: Mapping[str, Config]) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for part, module, factors in _theirs(parts, configs):
        name = KOHYA[part][0] + module.replace(".", "_")
        named = {"lora_down.weight": factors.down, "lora_up.weight": factors.up, "alpha": _alpha(factors)}
        tensors |= {f"{name}.{role}": tensor for role, tensor in named.items()}
    ranks, alphas = (
        [value(each) for weights in parts.values() for each in weights.values()] for value in (_rank, _of)
    )
    told = {"ss_network_module": "networks.lora", "ss_network_dim": f"{_most(ranks)}"}
    return tensors, {**told, "ss_network_alpha": f"{_most(alphas)}"}


def _diffusers(
    parts: Mapping[str, LoRAWeights], configs: Mapping[str, Config]
) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for part, module, factors in _theirs(parts, configs):
        kind = "lora" if part == "unet" else "lora_linear_layer"
        named = {f"{kind}.down.weight": factors.down, f"{kind}.up.weight": factors.up}
        tensors |= {f"{PREFIXES[part]}.{module}.{role}": tensor for role, tensor in named.items()}
    told = {
        f"{PREFIXES[part]}.{key}": value
        for part, weights in parts.items()
        for key, value in _peft_config(part, weights, configs).items()
    }
    return tensors, {"lora_adapter_metadata": json.dumps(told, indent=2, sort_keys=True)}


def _write_peft(parts: Mapping[str, LoRAWeights], folder: Path, configs: Mapping[str, Config]) -> None:
    for part in parts:
        theirs_of_part = list(_theirs({part: parts[part]}, configs))
        tensors = {
            f"base_model.model.{module}.{role}.weight": tensor
            for _, module, factors in theirs_of_part
            for role, tensor in (("lora_A", factors.down), ("lora_B", factors.up))
        }
        where = folder / PREFIXES[part]
        save_weights(where / PEFT_FILES[0], tensors, {"format": "pt"})
        config = {"peft_type": "LORA", **_peft_config(part, parts[part], configs)}
        write_atomically(where / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _peft_config(part: str, weights: LoRAWeights, configs: Mapping[str, Config]) -> dict[str, Any]:
    """What peft's LoraConfig takes: the usual rank and alpha, and by layer where it differs."""
    # Ends of names suffice, and transformers 5 has no `text_model.`
    modules = {layer: name.removeprefix("text_model.") for layer, name in theirs(configs[part]).items()}
    rank, alpha = (_most([value(factors) for factors in weights.values()]) for value in (_rank, _of))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {modules[n]: f.rank for n, f in weights.items() if f.rank != rank},
        "alpha_pattern": {modules[n]: _of(f) for n, f in weights.items() if _of(f) != alpha},
        "target_modules": sorted(modules[name] for name in weights),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _cloneofsimo(
    parts: Mapping[str, LoRAWeights], configs: Mapping[str, Config]
) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    header: dict[str, Any] = {}
    for part, weights in parts.items():
        if part not in PREFIXES:
            theirs(configs[part])  # raises
        order = simo_order(part, configs[part])
        if wrong := sorted(set(order) ^ set(weights)):
            raise ValueError(
                f"cloneofsimo's form numbers all layers of {', '.join(SIMO_CLASSES[part])}, {len(order)} of "
                f"the {PREFIXES[part]}; {len(wrong)} are missing or not among them: {', '.join(wrong[:3])}"
            )
        header[PREFIXES[part]] = json.dumps(SIMO_CLASSES[part])
        for i, layer in enumerate(order):
            factors = weights[layer]
            up = (
                factors.up
                if factors.scale == 1
                else (factors.up.float() * factors.scale).to(factors.up.dtype)
            )
            name = f"{PREFIXES[part]}:{i}"
            tensors |= {f"{name}:up": up, f"{name}:down": factors.down}
            header[f"{name}:rank"] = str(factors.rank)
    return tensors, header


def _theirs(
    parts: Mapping[str, LoRAWeights], configs: Mapping[str, Config]
) -> Iterator[tuple[str, str, Factors]]:
    """(part, their module, factors) of each layer. Raises ValueError for a layer they have not as one."""
    for part, weights in parts.items():
        modules = theirs(configs[part])
        for layer, factors in weights.items():
            if layer not in modules:
                raise ValueError(f"layer {part}.{layer} is no single layer in that form; write ldm")
            yield part, modules[layer], factors


def _rank(factors: Factors) -> int:
    return factors.rank


def _of(factors: Factors) -> float | int:
    """Alpha, whole where it is."""
    return int(factors.alpha) if float(factors.alpha).is_integer() else factors.alpha


def _most(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
