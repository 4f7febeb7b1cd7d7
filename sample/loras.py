"""LoRAs in a model that draws: by `--lora FILE[:SCALE]`, by `<lora:name:0.8>` in prompts, and from Python.

    lora = pipe.add_lora("style.safetensors", 0.8)
    for step in pipe.stream(["a red apple"]):
        lora.set_scale(step.index / 50)     # another scale at each step

The tag is the web UIs': `<lora:name>`, `<lora:name:both>`, `<lora:name:text:unet>`, also with `te=` and
`unet=`, of a file in the folder of `--adapters DIR`. It is taken out of the prompt before that is read.
`Called` is what one command asks for: pictures made together agree in their LoRAs, so that the scales can be
set for each batch.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ldm.models.clip import TextEncoder
from ldm.models.lora import LoRA, attach
from ldm.weights.folder import weights_hash
from ldm.weights.lora import read_lora
from sample.adapters import LORAS, find_adapter, shipped_adapter
from sample.parts import Parts

TAG = re.compile(r"<lora:([^<>]*)>")


@dataclass(frozen=True)
class Asked:
    """One LoRA of a prompt or option: the name in the folder or a path, its scale in UNet and text tower."""

    name: str
    scale: float | int = 1.0
    text_scale: float | int = 1.0


class AddedLoRA:
    """A LoRA in a model's parts; its scales count from the next evaluation of each."""

    def __init__(self, parts: Parts, name: str, path: Path, loras: dict[str, LoRA]):
        self.parts = parts
        self.name = name
        self.path = path
        self.loras = loras

    def set_scale(self, scale: float | int, text_scale: float | int | None = None) -> None:
        """In the UNet (and autoencoder), and in the text tower, which is the same where nothing is said.

        The text tower reads a prompt before the first step. Raises ValueError for infinity and NaN.
        """
        for part, lora in self.loras.items():
            lora.set_scale(scale if part != "text" or text_scale is None else text_scale)

    def remove(self) -> None:
        """Leave the model as it was, to the bit."""
        for lora in self.loras.values():
            lora.remove()
        del self.parts.loras[self.name]
        _changed(self.parts)


def add_lora(
    parts: Parts,
    path: str | Path,
    scale: float | int = 1.0,
    text_scale: float | int | None = None,
    name: str | None = None,
    partial: bool = False,
) -> AddedLoRA:
    """Put the LoRA of a file into a model, in any form that `read_lora` knows.

    name: what it is called, the file's without its suffix where None. partial: leave out layers that the
    model lacks. Raises FileNotFoundError, and ValueError as `read_lora`; the model is then as it was.
    """
    path = Path(path).expanduser()
    name = path.stem if name is None else name
    if name in parts.loras:
        raise ValueError(f"LoRA {name!r} is in the model already; remove it, or give another name")
    modules = _modules(parts)
    configs = {part: module.config for part, module in modules.items()}
    file = read_lora(path, configs, partial)  # type: ignore[arg-type]
    for note in file.notes:
        print(f"ldm-sample: warning: {path} {note}", file=sys.stderr)
    loras = {part: attach(modules[part], weights, name) for part, weights in file.parts.items()}
    added = parts.loras[name] = AddedLoRA(parts, name, path, loras)
    _changed(parts)
    try:
        added.set_scale(scale, text_scale)
    except ValueError:
        added.remove()
        raise
    return added


def _modules(parts: Parts) -> dict[str, nn.Module]:
    """The parts that a LoRA can be in, by the names of files."""
    modules: dict[str, nn.Module] = {"unet": parts.unet, "autoencoder": parts.autoencoder}
    return modules | ({"text": parts.text_encoder} if isinstance(parts.text_encoder, TextEncoder) else {})


def _changed(parts: Parts) -> None:
    """Other forms of the network are made anew: they would not know."""
    parts.network, parts.form = parts.unet, None


# --- what a command asks for --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Called:
    """The LoRAs of one command. tags: whether prompts have them; always: those of `--lora`."""

    parts: Parts
    tags: bool
    always: tuple[Asked, ...]

    def of(self, prompt: str) -> tuple[Asked, ...]:
        """What a prompt wants; pictures made together agree in it."""
        return self.always + (read_tags(prompt)[1] if self.tags else ())

    def text(self, prompt: str) -> str:
        return read_tags(prompt)[0] if self.tags else prompt

    def start(self, prompts: Sequence[str]) -> list[str]:
        """Set the scales for pictures that agree; returns their prompts without tags."""
        wanted = {asked.name: asked for asked in self.of(prompts[0])}
        for name, added in self.parts.loras.items():
            asked = wanted.get(name, Asked(name, 0.0, 0.0))
            added.set_scale(asked.scale, asked.text_scale)
        return [self.text(prompt) for prompt in prompts]

    @property
    def record(self) -> dict[str, dict[str, str]]:
        """For the text chunk: a hash of each file."""
        hashes = {name: weights_hash([added.path]) for name, added in self.parts.loras.items()}
        return {"lora_hashes": hashes} if hashes else {}


def call(parts: Parts, args: argparse.Namespace, asked: Sequence[tuple[str, str]]) -> Called:
    """Give a model the LoRAs that a command asks for, and only these.

    asked: prompt and negative prompt of each picture. Raises ValueError for a name that is twice in one
    prompt, a tag in a negative prompt and another form of tag, and as `add_lora` and `find_adapter`.
    """
    tags = getattr(args, "syntax", "plain") != "plain"  # a command without it reads captions as they are
    files = [located(text) for text in args.lora or ()]
    called = Called(parts, tags, tuple(Asked(path.stem, scale, scale) for path, scale in files))
    paths = {path.stem: path for path, _ in files}
    for prompt, negative in asked if tags else ():
        if TAG.search(negative):
            raise ValueError(
                f"negative prompt {negative[:60]!r}: a LoRA belongs into the prompt and acts on both"
            )
        for each in read_tags(prompt)[1]:
            paths[each.name] = paths.get(each.name) or named(each.name, args.adapters)
    for prompt, _ in asked:
        names = [each.name for each in called.of(prompt)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"LoRA {twice!r} is asked for twice for one picture")
    for added in [*parts.loras.values()]:  # of the command before, in a sweep
        added.remove()
    for name, path in paths.items():
        added = add_lora(parts, path, name=name)
        for word in read_embedding_names(added.path):
            print(
                f"ldm-sample: warning: {path} holds the word {word} too; --embedding {path}", file=sys.stderr
            )
    return called


def named(name: str, folder: str | None) -> Path:
    """The file that a tag means: of the folder, where one is given, or else shipped. Raises ValueError."""
    shipped = shipped_adapter("lora", name) if folder is None else None
    return shipped or find_adapter(folder, name, LORAS)


def read_embedding_names(path: Path) -> list[str]:
    """Words that were trained together with a LoRA, in its own file."""
    from ldm.weights.source import open_source

    return [str(name) for name, value in open_source(path).metadata.items() if value == "<embed>"]


def read_tags(prompt: str) -> tuple[str, tuple[Asked, ...]]:
    """A prompt without its tags, and what they say. Raises ValueError for a tag of another form."""
    return TAG.sub("", prompt), tuple(_read(found[0], found[1]) for found in TAG.finditer(prompt))


def _read(tag: str, inside: str) -> Asked:
    name, *rest = (part.strip() for part in inside.split(":"))
    values: dict[str, float] = {}
    for place, text in zip(("te", "unet", None), rest, strict=False):
        key, equals, value = text.rpartition("=")
        key = key if equals else place or ""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if key not in ("te", "unet") or key in values or not math.isfinite(number):
            raise ValueError(f"{tag} must be like <lora:name:0.8> or <lora:name:te=0.5:unet=0.8>")
        values[key] = number
    if not name or len(rest) > 2:
        raise ValueError(f"{tag} must be like <lora:name:0.8> or <lora:name:te=0.5:unet=0.8>")
    text_scale = values.get("te", 1.0)
    return Asked(name, values.get("unet", text_scale), text_scale)


def located(text: str) -> tuple[Path, float]:
    """The file, also a shipped one by its name, and the scale that `FILE[:SCALE]` means.

    Raises ValueError for a scale that is none.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return shipped_adapter("lora", text) or Path(text).expanduser(), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text).expanduser(), 1.0  # a path with a colon in it
    if not math.isfinite(value):
        raise ValueError(f"--lora must be like FILE or FILE:0.8, got {text!r}")
    return shipped_adapter("lora", path) or Path(path).expanduser(), value
