"""How others name the layers of a LoRA: every spelling of every layer, from our tables of tensor names.

    ours         unet.mid_block.attention.blocks.0.attn1.to_q
    diffusers    unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q, also without `unet.`
    older        ... attn1.processor.to_q_lora
    peft         base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    kohya        lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q
    cloneofsimo  unet:135, the number in the order of diffusers' modules of late 2022

No name is guessed from underscores: each is written out for the layers that the configuration has. Used by
`lora.py` and `lora_writing.py`.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from torch import Size

from ldm.models.clip import TextConfig
from ldm.models.lora_layers import adaptable
from ldm.models.unet import UNetConfig
from ldm.weights import compvis, diffusers
from ldm.weights.names import Config, build_empty

Layer = tuple[str, str]  # part, our layer

PREFIXES = {"unet": "unet", "text": "text_encoder"}  # of the parts, in diffusers' files
KOHYA = {"unet": ("lora_unet_",), "text": ("lora_te_", "lora_te1_")}  # the first is written
OLDER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}  # of text towers
# The classes whose linear layers cloneofsimo's files hold, and their order in a transformer block then
SIMO_CLASSES = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text": ["CLIPAttention"]}
SIMO_BLOCK = (
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out")),
    "ff.proj_in",
    *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out")),
)
SIMO_TEXT = ("to_k", "to_v", "to_q", "to_out")


@cache
def layers(config: Config) -> Mapping[str, Size]:
    """Every layer of a network that can have a LoRA, with its weight's shape; allocates nothing."""
    found = adaptable(build_empty(config))
    return MappingProxyType({name: layer.weight.shape for name, layer in found.items()})


@cache
def theirs(config: Config) -> Mapping[str, str]:
    """Our layer -> diffusers' or transformers' module, for those that are one module there.

    Raises ValueError for a part whose LoRAs only our own files hold.
    """
    if isinstance(config, UNetConfig):
        names = diffusers.unet_names(config)
    elif isinstance(config, TextConfig):
        names = {ours: f"text_model.{name}" for ours, name in compvis.transformers_names(config).items()}
    else:
        raise ValueError(f"only files of ours hold a LoRA of {type(config).__name__.removesuffix('Config')}")
    modules = {layer: names.get(f"{layer}.weight", "") for layer in layers(config)}
    return MappingProxyType({ours: name.removesuffix(".weight") for ours, name in modules.items() if name})


def spellings(configs: Mapping[str, Config]) -> dict[str, Layer]:
    """Every name that a file may have for a layer, all forms together."""
    table: dict[str, Layer] = {}
    for part, config in configs.items():
        for layer in layers(config):
            table[f"{part}.{layer}"] = (part, layer)
        if part not in PREFIXES:
            continue
        for layer, module in theirs(config).items():
            bare = module.removeprefix("text_model.")  # as transformers 5 has it
            named = [module, bare, older(module)]
            dotted = [*named, *(f"{PREFIXES[part]}.{name}" for name in named)]
            kohya = [prefix + module.replace(".", "_") for prefix in KOHYA[part]]
            table |= dict.fromkeys([*dotted, *kohya], (part, layer))
    return table


def older(module: str) -> str:
    """The module by the name that the first LoRAs of diffusers gave it: `self_attn.to_q` of a text tower."""
    block, _, last = module.rpartition(".")
    old = {new: name for name, new in OLDER.items()}
    return f"{block}.{old[last]}" if last in old else module


def simo_order(part: str, config: Config) -> list[str]:
    """The layers of cloneofsimo's files, in order: blocks down, then up, then the middle."""
    own = list(layers(config))
    if part == "text":
        count = config.layers if isinstance(config, TextConfig) else 0
        return [f"blocks.{i}.{name}" for i in range(count) for name in SIMO_TEXT]
    blocks = [name.removesuffix(".attn1.to_q") for name in own if name.endswith(".attn1.to_q")]
    blocks.sort(key=lambda name: ("down", "up", "mid").index(name.split("_")[0]))  # keeps their own order
    return [f"{block}.{name}" for block in blocks for name in SIMO_BLOCK]
