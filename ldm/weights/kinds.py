"""What kind of model a set of tensors is, told by names and shapes from the list in `configs/model`.

A kind is one YAML file there: the configurations of its parts. Weights do not say how many heads an attention
has, nor whether a network predicts eps or v, so shapes are compared with what is known rather than turned
into a configuration. Used by `checkpoint.py`.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from ldm.config import configs_folder, load_config
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.bert import BertTextConfig
from ldm.models.class_embedder import ClassEmbedderConfig
from ldm.models.clip import TextConfig
from ldm.models.controlnet import ControlNetConfig
from ldm.models.unet import UNetConfig
from ldm.weights import compvis
from ldm.weights.names import Config
from ldm.weights.names import shapes as expected_shapes

Shapes = Mapping[str, Size]
Translate = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a model; None for those it does not have.

    text, bert and classes are what the UNet's context may come from: CLIP, the BERT-like tower of the first
    latent diffusion models, a table of classes. use_ema: where a file holds raw and averaged weights, the
    original samples with the averaged ones.
    """

    unet: UNetConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    text: TextConfig | None = None
    bert: BertTextConfig | None = None
    classes: ClassEmbedderConfig | None = None
    control: ControlNetConfig | None = None
    diffusion: DiffusionConfig | None = None
    use_ema: bool = False

    @property
    def parts(self) -> dict[str, Config]:
        """The configuration of each part there is, by its field's name."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: config for name, config in named.items() if config is not None}


PARTS = tuple(field.name for field in fields(ModelConfig) if field.name not in ("diffusion", "use_ema"))


@dataclass(frozen=True)
class Kind:
    """A model of `configs/model`, or of a YAML file of the user's."""

    name: str
    config: ModelConfig


def kind_names() -> list[str]:
    return sorted(path.stem for path in (configs_folder() / "model").glob("*.yaml"))


@cache
def find_kind(name: str) -> Kind:
    """A kind by its name, or by the path of a YAML file of that form.

    Raises FileNotFoundError, with the nearest known names, and ValueError for a malformed file.
    """
    path = (
        Path(name) if Path(name).suffix in (".yaml", ".yml") else configs_folder() / "model" / f"{name}.yaml"
    )
    if not path.is_file():
        near = difflib.get_close_matches(name, kind_names(), n=3, cutoff=0.3)
        raise FileNotFoundError(
            f"kind {name!r} is not known; {'near: ' + ', '.join(near) + '; ' if near else ''}all: "
            + ", ".join(kind_names())
        )
    return Kind(path.stem, load_config(ModelConfig, path))


def recognise(found: Mapping[str, Shapes], source: str, to_ours: Translate = compvis.to_ours) -> list[Kind]:
    """The kinds that these parts can be, each given by names (below its prefix) and shapes.

    to_ours: of the names' spelling. More than one where weights of equal shapes are used differently. Raises
    ValueError, with the first misfits to the likeliest kind, where there is none.
    """
    fitting: list[Kind] = []
    nearest: tuple[int, str, list[str]] | None = None
    for kind in map(find_kind, kind_names()):
        config = adapted(kind.config, found)
        if not set(found) <= set(config.parts) or _main_part(config.parts) not in found:
            continue
        if not all(_alike(found[name], config.parts[name]) for name in found):
            continue
        wrong = [line for name, shapes in found.items() for line in fits(shapes, config.parts[name], to_ours)]
        if not wrong:
            fitting.append(Kind(kind.name, config))
        elif nearest is None or len(wrong) < nearest[0]:
            nearest = (len(wrong), kind.name, wrong)
    if fitting:
        return fitting
    if nearest is None:
        raise ValueError(f"{source}: a model of unknown form ({_told(found)}); {FORMS}")
    count, name, wrong = nearest
    more = f" and {count - 5} more" if count > 5 else ""
    raise ValueError(f"{source}: most like {name}, but does not fit it: {'; '.join(wrong[:5])}{more}")


def _main_part(parts: Mapping[str, Config]) -> str:
    """What a file must hold to be of a kind with these parts."""
    return next(name for name in ("control", "unet", "autoencoder") if name in parts)


FORMS = "give its configuration by --kind, a name or YAML file like those in configs/model"


def adapted(config: ModelConfig, found: Mapping[str, Shapes]) -> ModelConfig:
    """`config` with what a file decides: Stable Diffusion 2's text tower comes with or without its last
    layer, which is not read."""
    text = config.text
    if text is not None and text.skip_layers and "text" in found:
        blocks = {
            name.split(".")[2] for name in found["text"] if name.startswith(("transformer.res", "encoder.l"))
        }
        if len(blocks) == text.layers - text.skip_layers:
            return replace(config, text=replace(text, layers=len(blocks), skip_layers=0))
    return config


def fits(shapes: Shapes, config: Config, to_ours: Translate = compvis.to_ours) -> list[str]:
    """What is missing, unexpected or misshapen for `config`; empty where all fits."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return misfits(to_ours(empty, config), config)


def misfits(tensors: Mapping[str, Tensor], config: Config) -> list[str]:
    """The same for tensors in our names."""
    expected = expected_shapes(config)
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    lines += [f"{name} is unexpected" for name in tensors if name not in expected]
    return lines + [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]


def _alike(shapes: Shapes, config: Config) -> bool:
    """A cheap test before `fits`: the first layers have the right widths."""
    wanted = _first_layers(config)
    return all(tuple(shapes[name]) == wanted[name] for name in wanted if name in shapes)


def _first_layers(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers that tell most models apart, in CompVis names."""
    match config:
        case UNetConfig():
            return {"input_blocks.0.0.weight": (config.model_channels, config.in_channels, 3, 3)}
        case ControlNetConfig():
            return _first_layers(config.unet)
        case AutoencoderConfig():
            coarse = config.base_channels * config.channel_mult[-1]
            return {
                "encoder.conv_in.weight": (config.base_channels, config.in_channels, 3, 3),
                "decoder.conv_in.weight": (coarse, config.z_channels, 3, 3),
            }
        case ClassEmbedderConfig():
            return {"embedding.weight": (config.num_classes, config.dim)}
        case BertTextConfig():
            return {"transformer.token_emb.weight": (config.vocab_size, config.width)}
        case TextConfig():
            table = (config.vocab_size, config.width)
            return {"embeddings.token_embedding.weight": table, "token_embedding.weight": table}


def _told(found: Mapping[str, Shapes]) -> str:
    told = {
        f"{part} {name} {list(shape)}"
        for part, shapes in found.items()
        for name, shape in shapes.items()
        if name.endswith(("input_blocks.0.0.weight", "conv_in.weight", "token_embedding.weight"))
    }
    return "; ".join(sorted(told)[:5]) or "no tensor of a known part"
