"""Files of LoRAs, whoever wrote them: kohya, diffusers, peft, cloneofsimo, and our own.

    file = read_lora("style.safetensors", {"unet": unet.config, "text": text_encoder.config})
    attach(unet, file.parts["unet"], "style")

A file is known by its names (`lora_names.py`); what it holds becomes factors by the names of our layers. A
layer that the model lacks, or has in another shape, is an error that counts what did match; so are the
families that are no plain LoRA (LoHa, LoKr, DoRA, ...). A missing alpha means a scale of 1, as everywhere.
`lora_writing.py` writes the same forms.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from ldm.config import from_dict
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.lora_math import Factors, LoRAWeights, widths
from ldm.models.unet import UNetConfig
from ldm.weights.io import Refusal, parse_json
from ldm.weights.kinds import find_kind
from ldm.weights.lora_names import OLDER, PREFIXES, Layer, layers, simo_order, spellings
from ldm.weights.names import Config
from ldm.weights.source import Source, open_source

FORMS = ("ldm", "kohya", "diffusers", "peft", "cloneofsimo")
CONFIGS: dict[str, type] = {
    "unet": UNetConfig,
    "text": TextConfig,
    "autoencoder": AutoencoderConfig,
    "control": ControlNetConfig,
}
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"

ROLES = (  # the end of a tensor's name: what it is
    (r"\.(?:lora_down|lora_A(?:\.\w+)?|lora\.down|lora_linear_layer\.down)\.weight|\.down", "down"),
    (r"\.(?:lora_up|lora_B(?:\.\w+)?|lora\.up|lora_linear_layer\.up)\.weight|\.up", "up"),
    (r"\.alpha", "alpha"),
)
OLD = re.compile(r"(.+?)\.(?:processor\.)?(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
SIMO = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
FAMILIES = (  # part of a tensor's name, and whose it is
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("lora_mid", "a Tucker-decomposed LoCon"),
    ("oft_", "OFT"),
    (".on_input", "IA3"),
    ("ia3_", "IA3"),
    (".a1.weight", "GLoRA"),
    (".b1.weight", "GLoRA"),
    (".w_norm", "a trained norm"),
    (".b_norm", "a trained norm"),
    (".diff", "a full difference of weights"),
)


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds.

    parts: factors by our layers, of each part of a model ("unet", "text", ...). embeddings: tokens trained
    with it, by name. metadata: of the header. notes: lines a user should see.
    """

    path: Path
    form: str
    parts: dict[str, LoRAWeights]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_lora(
    path: str | Path,
    configs: Mapping[str, Config] | None = None,
    partial: bool = False,
    allow_nan: bool = False,
) -> LoRAFile:
    """The LoRA in a file, or in a folder of peft's, for a model with these parts.

    Args:
        configs: by part; by default what the file is for, see `base_of`.
        partial: leave out what the model lacks, with a note, rather than refuse it.
    Raises ValueError or FileNotFoundError, in one line that names the file.
    """
    sources = sources_of(path)
    configs = base_of(sources) if configs is None else dict(configs)
    parts: dict[str, dict[str, Factors]] = {}
    embeddings: dict[str, Tensor] = {}
    notes: list[str] = []
    for source in sources:
        form_of(source)  # refuses a file without one
        names = [name for name, entry in source.entries.items() if entry.dtype.is_floating_point]
        _refuse_families(source, names)
        tensors = {name: tensor.clone() for name, tensor in source.read(names, allow_nan=allow_nan)}
        embeddings |= _embeddings(source, tensors)
        pairs = _pairs(source, {name: t for name, t in tensors.items() if name not in embeddings}, configs)
        notes += _place(source, pairs, configs, parts, partial)
    ordered: dict[str, LoRAWeights] = {  # as the networks have them, whatever the file's order
        part: {layer: parts[part][layer] for layer in layers(config) if layer in parts[part]}
        for part, config in configs.items()
        if part in parts
    }
    metadata = sources[0].metadata
    return LoRAFile(Path(path), form_of(sources[0]), ordered, embeddings, metadata, tuple(notes))


def form_of(source: Source) -> str:
    """Which of FORMS the names are of. Raises ValueError for a file without a LoRA."""
    names = list(source.entries)
    if isinstance(source.metadata.get("lora"), dict):
        return "ldm"
    if any(SIMO.fullmatch(name) for name in names) or all(name.isdecimal() for name in names):
        return "cloneofsimo"
    if any(name.startswith(("lora_unet_", "lora_te")) for name in names):
        return "kohya"
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if any(_role(name) for name in names):
        return "diffusers"
    raise Refusal(source.path, f"holds no LoRA; its tensors are called {', '.join(names[:3]) or 'nothing'}")


def base_of(sources: list[Source]) -> dict[str, Config]:
    """The parts of the model that the files are for: as our header says, else Stable Diffusion of that width.

    Raises ValueError where neither tells.
    """
    told = sources[0].metadata.get("lora")
    if isinstance(told, dict) and isinstance(told.get("base"), dict):
        known = {
            part: data for part, data in told["base"].items() if part in CONFIGS and isinstance(data, dict)
        }
        return {part: from_dict(CONFIGS[part], data, str(sources[0].path)) for part, data in known.items()}
    for source in sources:
        form_of(source)
        _refuse_families(source, source.entries)
        found = {entry.shape[1] for entry in source.entries.values() if len(entry.shape) > 1}
        for width, kind in ((1024, "sd21_base"), (768, "sd15")):
            if width in found:
                config = find_kind(kind).config
                return {part: each for part, each in config.parts.items() if part in PREFIXES}
    raise Refusal(sources[0].path, "does not tell which model it is for; give it by --model")


def sources_of(path: str | Path) -> list[Source]:
    """The weight files of a LoRA, opened: one, or in a folder of peft's one a part."""
    return [open_source(file) for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    """The weight files: of a folder of peft's, that of each part."""
    if not path.is_dir():
        return [path]
    found = [folder / name for folder in (path, *sorted(path.iterdir())) for name in PEFT_FILES]
    if files := [file for file in found if file.is_file()]:
        return files
    raise Refusal(path, f"is a folder without {' or '.join(PEFT_FILES)}")


def _refuse_families(source: Source, names: Iterable[str]) -> None:
    for mark, family in FAMILIES:
        if found := next((name for name in names if mark in name), None):
            raise Refusal(source.path, f"holds {family} ({found}), which is not read; LoRA and LoCon are")


def _embeddings(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tokens, as cloneofsimo's and our files hold them."""
    marked = {name for name, value in source.metadata.items() if value == "<embed>"}
    return {name: tensor for name, tensor in tensors.items() if name in marked}


# --- names to layers ----------------------------------------------------------------------------------------


def _role(name: str) -> tuple[str, str] | None:
    """The layer's name in the file, and whether this is its down, up or alpha; None for another tensor."""
    if old := OLD.fullmatch(name):
        block, which, role = old.groups()
        which = "to_out.0" if which == "to_out" else which
        return f"{block}.{OLDER[which] if block.endswith('self_attn') else which}", role
    for pattern, role in ROLES:
        if found := re.fullmatch(f"(.+?)(?:{pattern})", name):
            return found[1].removeprefix("base_model.model."), role
    return None


def _pairs(
    source: Source, tensors: Mapping[str, Tensor], configs: Mapping[str, Config]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by role, the layers by their names in the file."""
    pairs: dict[str, dict[str, Tensor]] = {}
    listed = all(name.isdecimal() for name in tensors)  # cloneofsimo's list: up, down, up, down, ...
    part = next(
        (p for p in ("text", "unet") if p in configs and f".{PREFIXES[p]}" in source.path.name), "unet"
    )
    for name, tensor in tensors.items():
        if listed:
            found: tuple[str, str] | None = (
                f"{PREFIXES[part]}:{int(name) // 2}",
                "down" if int(name) % 2 else "up",
            )
        elif simo := SIMO.fullmatch(name):
            found = f"{simo[1]}:{simo[2]}", simo[3]
        else:
            found = _role(name)
        if found is None:
            raise Refusal(source.path, f"holds {name} besides its LoRA, which nothing here reads")
        pairs.setdefault(found[0], {})[found[1]] = tensor
    return pairs


def _place(
    source: Source,
    pairs: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Config],
    parts: dict[str, dict[str, Factors]],
    partial: bool,
) -> list[str]:
    """Put the factors of each layer under its part and name. Raises ValueError with counts, or notes them."""
    table, unknown, misshapen = _table(source, pairs, configs), list[str](), list[str]()
    told = _alphas(source)
    for name, pair in pairs.items():
        if missing := [role for role in ("down", "up") if role not in pair]:
            raise Refusal(source.path, f"holds only a part of layer {name}: {missing[0]} is missing")
        if name not in table:
            unknown.append(name)
            continue
        part, layer = table[name]
        down, up, shape = pair["down"], pair["up"], layers(configs[part])[layer]
        fitting = _fitted(down, up, shape)
        if fitting is None and min(down.ndim, up.ndim) > 1 and len(down) == up.shape[1]:
            misshapen.append(f"{name} {_shape(down, up)} for {'x'.join(map(str, shape))}")
            continue
        try:
            down, up = fitting or (down, up)
            alpha = float(pair["alpha"]) if "alpha" in pair else told(name, len(down))
            factors = Factors(down, up, alpha)
        except (ValueError, RuntimeError) as error:
            raise Refusal(source.path, f"layer {name}: {error}") from None
        if layer in parts.setdefault(part, {}):
            raise Refusal(source.path, f"holds layer {part}.{layer} twice")
        parts[part][layer] = factors
    return _report(source, len(pairs), unknown, misshapen, partial)


def _report(source: Source, count: int, unknown: list[str], misshapen: list[str], partial: bool) -> list[str]:
    if not unknown and not misshapen:
        return []
    matched = count - len(unknown) - len(misshapen)
    told = [f"{len(unknown)} unknown: {', '.join(unknown[:3])}"] * bool(unknown)
    told += [f"{len(misshapen)} of another width: {', '.join(misshapen[:3])}"] * bool(misshapen)
    line = f"matched {matched} of {count} layers; {'; '.join(told)}"
    if partial and matched:
        return [f"{line}; these are left out"]
    raise Refusal(source.path, f"is a LoRA for another model: {line}")


def _table(source: Source, names: Iterable[str], configs: Mapping[str, Config]) -> dict[str, Layer]:
    if form_of(source) != "cloneofsimo":
        return spellings(configs)
    table: dict[str, Layer] = {}
    for part in (part for part in PREFIXES if part in configs):
        numbers = [name for name in names if name.startswith(f"{PREFIXES[part]}:")]
        classes = source.metadata.get(PREFIXES[part]) or []
        order = simo_order(part, configs[part])
        if part == "unet" and (len(numbers) * 9 == len(order) * 8 or (classes and "GEGLU" not in classes)):
            order = [layer for layer in order if not layer.endswith("proj_in")]  # its first version
        if strange := set(classes) - {"CrossAttention", "Attention", "GEGLU", "CLIPAttention"}:
            raise Refusal(
                source.path, f"holds layers of {', '.join(map(str, strange))}, whose order is unknown"
            )
        if numbers and len(numbers) != len(order):
            raise Refusal(
                source.path,
                f"is a LoRA for another model: it numbers {len(numbers)} layers of its {PREFIXES[part]}, "
                f"this model has {len(order)}",
            )
        table |= {f"{PREFIXES[part]}:{i}": (part, layer) for i, layer in enumerate(order)}
    return table


def _fitted(down: Tensor, up: Tensor, shape: Size) -> tuple[Tensor, Tensor] | None:
    """The factors in the shapes of a layer's, 1x1 convolutions and linear layers being the same thing."""
    if min(down.ndim, up.ndim) < 2:
        return None
    rank = len(down)
    if (
        down.numel() != rank * math.prod(shape[1:])
        or up.numel() != rank * shape[0]
        or up.shape[0] != shape[0]
    ):
        return None
    if down.ndim > 2 and down.ndim == len(shape) and down.shape[1:] != shape[1:]:
        return None
    return down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *[1] * (len(shape) - 2))


def _shape(down: Tensor, up: Tensor) -> str:
    """Of the weight that these factors are for."""
    return widths([(up.shape[0], *down.shape[1:])])


# --- alpha that is told apart -------------------------------------------------------------------------------


def _alphas(source: Source) -> Callable[[str, int], float]:
    """From a layer's name and rank to the alpha that the header or peft's configuration beside it says."""
    options: dict[str, dict[str, Any]] = {}
    told, beside = source.metadata.get("lora_adapter_metadata"), source.path.parent / PEFT_CONFIG
    if isinstance(told, dict):
        for key, value in told.items():
            part, _, name = key.partition(".")
            options.setdefault(part, {})[name] = value
    elif form_of(source) in ("peft", "diffusers") and beside.is_file():
        try:
            options[""] = parse_json(beside.read_bytes())
        except ValueError as error:
            raise Refusal(beside, f"is no configuration of peft's ({error})") from None

    def alpha(layer: str, rank: int) -> float:
        part = layer.partition(".")[0]
        said = options.get(part, options.get("", {}))
        if said.get("use_dora"):
            raise ValueError("is DoRA, which is not read")
        patterns = said.get("alpha_pattern") or {}
        named = {
            re.sub(r"[\^\\$]", "", key): value for key, value in patterns.items()
        }  # a stranger's pattern
        fitting = [value for key, value in named.items() if f".{layer}".endswith(f".{key}")]
        value = fitting[0] if fitting else said.get("lora_alpha", rank)
        if not isinstance(value, int | float):
            raise ValueError(f"lora_alpha must be a number, got {json.dumps(value)[:40]}")
        return float(value) * (math.sqrt(rank) if said.get("use_rslora") else 1)

    return alpha
