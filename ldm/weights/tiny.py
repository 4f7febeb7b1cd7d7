"""Files of the tiny autoencoder (TAESD family) in the forms they are published in.

    original     `taesd_encoder.pth` and `taesd_decoder.pth`, or `.safetensors`: each half a plain list,
                 `3.conv.0.weight` being the first convolution of the fourth entry; in one file with
                 `encoder.` or `decoder.` before it. The decoder's entry 0 is the clamp of its input.
    diffusers    `decoder.layers.2.conv.0.weight`: without that clamp, so one lower in the decoder

Readers take either, tell them apart by the names, and infer the configuration from names and shapes before
a tensor is read, by `ldm/weights/source.py`, which runs no stranger's pickle.
`to_ours` and `to_original` are exact inverses.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Size, Tensor, nn

from ldm.models.tiny_autoencoder import Decoder, Encoder, TinyAutoencoder, TinyAutoencoderConfig
from ldm.weights.io import load_strict
from ldm.weights.names import Names, inside, into_ours, into_theirs
from ldm.weights.source import open_source

M = TypeVar("M", bound=nn.Module)

HALVES = ("encoder", "decoder")
BLOCK = {
    "conv1": "conv.0",
    "conv2": "conv.2",
    "conv3": "conv.4",
    "bottleneck.conv_in": "pool.0",
    "bottleneck.norm": "pool.1",
    "bottleneck.conv_out": "pool.3",
}
DIFFUSERS = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")
ORIGINAL = re.compile(r"(?:(encoder|decoder)\.)?(\d+)\.(.+)")
A_BLOCK = re.compile(r"(encoder|decoder)\.\d+\.conv\.4\.weight")


# --- reading ------------------------------------------------------------------------------------------------


def load_tiny_encoder(path: str | Path) -> Encoder:
    """The encoder of a file that holds one, in float32 on the CPU.

    Raises FileNotFoundError, or ValueError for a damaged or foreign file, each in one line.
    """
    return _load_half(path, "encoder", Encoder)


def load_tiny_decoder(path: str | Path) -> Decoder:
    """The decoder of a file that holds one. Errors as in `load_tiny_encoder`."""
    return _load_half(path, "decoder", Decoder)


def load_tiny_autoencoder(*paths: str | Path) -> TinyAutoencoder:
    """Both halves, from one file of both or from a file each. Errors as in `load_tiny_encoder`."""
    files = [_File(path) for path in paths]
    where = " and ".join(map(str, paths))
    if len(set().union(*(file.shapes for file in files))) < sum(len(file.shapes) for file in files):
        raise ValueError(f"{where}: both files hold the same half; expected an encoder and a decoder")
    shapes = {name: shape for file in files for name, shape in file.shapes.items()}
    for half in HALVES:
        require(half, shapes, where)
    config = infer_config(shapes, where)
    tensors = {name: tensor for file in files for name, tensor in file.read(file.shapes).items()}
    module = TinyAutoencoder(config)
    load_strict(module, to_ours(tensors, config), where)
    return module


class _File:
    """A file in either form: `shapes` and `read` go by the original's names with the half before them."""

    def __init__(self, path: str | Path):
        self.source = open_source(path)
        self.stored = {original(name, self.source.entries): name for name in self.source.entries}
        if not any(A_BLOCK.fullmatch(name) for name in self.stored):
            raise ValueError(
                f"{path} holds no tiny autoencoder of the TAESD family: it has no tensor named like "
                "3.conv.4.weight or decoder.layers.2.conv.4.weight"
            )
        if len(self.stored) < len(self.source.entries):
            raise ValueError(f"{path} names the same tensor twice, in two forms")
        self.shapes = {name: self.source.entries[stored].shape for name, stored in self.stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        tensors = self.source.read([self.stored[name] for name in names], torch.float32)
        return {name: tensor for name, (_, tensor) in zip(names, tensors, strict=True)}


def _load_half(path: str | Path, half: str, module_class: Callable[[TinyAutoencoderConfig], M]) -> M:
    file, other = _File(path), HALVES[half == "encoder"]
    require(half, file.shapes, str(path))
    shapes = {name: shape for name, shape in file.shapes.items() if not name.startswith(f"{other}.")}
    config = infer_config(shapes, str(path))
    module = module_class(config)
    ours = to_ours(file.read(shapes), config)
    load_strict(module, {name.removeprefix(f"{half}."): ours[name] for name in ours}, str(path))
    return module


def require(half: str, shapes: Mapping[str, Size], source: str) -> None:
    """Raises ValueError where a half is missing."""
    if not part(shapes, half):
        raise ValueError(f"{source}: there is no {half} of a tiny autoencoder in it, only the other half")


def part(shapes: Mapping[str, Size], half: str) -> dict[str, Size]:
    """What belongs to a half, without its prefix."""
    prefix = f"{half}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


# --- names --------------------------------------------------------------------------------------------------


def original(name: str, names: Container[str]) -> str:
    """A name of either form as the original's with `encoder.` or `decoder.` before it.

    names: all of the file. Any other name stays as it is, so that strict loading reports it.
    """
    if match := DIFFUSERS.fullmatch(name):
        return f"{match[1]}.{int(match[2]) + (match[1] == 'decoder')}.{match[3]}"
    if match := ORIGINAL.fullmatch(name):
        # A bare list: the encoder starts at entry 0; in the decoder that is the clamp, without tensors.
        return f"{match[1] or ('encoder' if '0.weight' in names else 'decoder')}.{match[2]}.{match[3]}"
    return name


def to_ours(tensors: Mapping[str, Tensor], config: TinyAutoencoderConfig) -> dict[str, Tensor]:
    """The original's names, with `encoder.` or `decoder.` before them, in ours; unknown ones stay."""
    return into_ours(tensors, original_names(config))


def to_original(tensors: Mapping[str, Tensor], config: TinyAutoencoderConfig) -> dict[str, Tensor]:
    """The inverse of `to_ours`. A file of one half holds those of `decoder.` without that prefix, say.

    Raises ValueError unless `tensors` are exactly those of the `TinyAutoencoder` that `config` describes.
    """
    return into_theirs(tensors, original_names(config))


def original_names(config: TinyAutoencoderConfig) -> Names:
    """The name of each of our tensors, ours -> theirs."""
    modules = {"encoder.conv_in": "encoder.0"}
    index = 0
    for i, depth in enumerate(config.encoder_blocks):
        if i > 0:
            index += 1
            modules[f"encoder.down_blocks.{i}.down"] = f"encoder.{index}"
        for j in range(depth):
            index += 1
            modules |= inside(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.{index}", BLOCK)
    modules["encoder.conv_out"] = f"encoder.{index + 1}"

    modules["decoder.conv_in"] = "decoder.1"
    index = 2  # a ReLU
    for i, depth in enumerate(config.decoder_blocks):
        for j in range(depth):
            index += 1
            modules |= inside(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.{index}", BLOCK)
        if i < len(config.decoder_blocks) - 1:
            index += 2  # doubling the size takes a place of its own
            modules[f"decoder.up_blocks.{i}.up"] = f"decoder.{index}"
    modules["decoder.conv_out"] = f"decoder.{index + 1}"

    with torch.device("meta"):
        ours = TinyAutoencoder(config).state_dict()
    split = (name.rpartition(".") for name in ours)
    return {f"{module}.{kind}": f"{modules[module]}.{kind}" for module, _, kind in split}


# --- the configuration of a file ----------------------------------------------------------------------------


class _Half(NamedTuple):
    """What a half says of the whole, and its own blocks a level."""

    in_channels: int
    latent_channels: int
    channels: int
    bottleneck: int
    blocks: tuple[int, ...]


def infer_config(shapes: Mapping[str, Size], source: str) -> TinyAutoencoderConfig:
    """The configuration that the original's names, with the half before them, and the shapes imply.

    Of a half that is not there the blocks are those of the other in reverse. Raises ValueError where the
    names are no such list, or the halves do not fit each other.
    """
    own = {half: part(shapes, half) for half in HALVES}
    found = {half: _read_half(own[half], half, source) for half in HALVES if own[half]}
    known = next(iter(found.values()))
    if any(half[:-1] != known[:-1] for half in found.values()):
        raise ValueError(f"{source}: encoder and decoder are of different models")
    encoder_blocks, decoder_blocks = (
        found[half].blocks if half in found else known.blocks[::-1] for half in HALVES
    )
    try:
        return TinyAutoencoderConfig(
            in_channels=known.in_channels,
            latent_channels=known.latent_channels,
            channels=known.channels,
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
            bottleneck=known.bottleneck,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _read_half(own: Mapping[str, Size], half: str, source: str) -> _Half:
    """What the shapes of one half say, in both of which single convolutions part the blocks into levels."""
    entries = sorted({int(match[2]) for name in own if (match := ORIGINAL.fullmatch(name))})
    single = [place for place, entry in enumerate(entries) if f"{entry}.weight" in own]
    convs = [own[f"{entries[place]}.weight"] for place in single]
    pools = [shape for name, shape in own.items() if name.endswith(".pool.0.weight")]
    if len(convs) < 2 or any(len(shape) != 4 for shape in (*convs, *pools)):
        raise ValueError(f"{source}: its {half} is no list of convolutions and blocks of the TAESD family")
    first, last = convs[0][1], convs[-1][0]
    in_channels, latent_channels = (first, last) if half == "encoder" else (last, first)
    return _Half(
        in_channels,
        latent_channels,
        channels=convs[0][0],
        bottleneck=pools[0][0] if pools else 0,
        blocks=tuple(after - before - 1 for before, after in pairwise(single)),
    )
