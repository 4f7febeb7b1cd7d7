"""Teach a model a subject or a style by a LoRA: a change of low rank to some of its layers.

Hu et al. 2021 (arXiv:2106.09685); for image models first cloneofsimo's scripts, then kohya's and
diffusers'. It may learn with prior preservation (`prior.weight`), and with new words of the text tower
(`tokens`): then the words move first and the LoRA after them, or both at once, "pivotal tuning" (Roich et
al. 2021, arXiv:2106.05744). The finished run writes `lora.safetensors` for `ldm-sample --lora`, and the
forms that others read.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.device import DTYPES
from ldm.models.clip import TextEncoder
from ldm.models.frozen import lean
from ldm.models.lora import LoRA, LoRAConfig, add_lora
from ldm.weights.lora import FORMS
from ldm.weights.lora_writing import write_lora
from train.personal import PersonalConfig, PersonalTask
from train.tokens import NewWords, TokensConfig

FILES = {
    "ldm": "lora.safetensors",
    "kohya": "lora_kohya.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "peft",
    "cloneofsimo": "lora_cloneofsimo.safetensors",
}


@dataclass(frozen=True)
class LoRATaskConfig(PersonalConfig):
    """`ldm-train lora`.

    lora: of the UNet, lora_text: of the text tower, see `LoRAConfig`; null leaves a network as it is.
    tokens: new words to be learned with it, see `TokensConfig`. tokens_until: the step from which they stay
    as they are, 0 is never. lora_from: the first step in which the LoRA moves. rates: of `run.lr`, by what
    it is for: "lora", "lora_text", "tokens"; 1 where nothing is said. forms: of the files, some of ldm,
    kohya, diffusers, peft, cloneofsimo. dtype: their number format.
    """

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    lora_text: LoRAConfig | None = None
    tokens: TokensConfig = field(default_factory=TokensConfig)
    tokens_until: int = 0
    lora_from: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    forms: tuple[str, ...] = ("ldm",)
    dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is None and self.lora_text is None:
            raise ValueError("lora and lora_text are both null; one of them is to be trained")
        if not self.forms or (unknown := [form for form in self.forms if form not in FORMS]):
            got = repr(unknown[0]) if self.forms else "none"
            raise ValueError(f"forms must be some of {', '.join(FORMS)}, got {got}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, rate in self.rates.items():
            if name not in ("lora", "lora_text", "tokens") or not 0 < rate < float("inf"):
                raise ValueError(f"rates are numbers above 0 for lora, lora_text, tokens; got {name}: {rate}")
        if (self.tokens_until or self.lora_from) and not self.tokens.words:
            raise ValueError("tokens_until and lora_from are for a run that learns tokens.words as well")
        if min(self.tokens_until, self.lora_from) < 0 or 0 < self.tokens_until < self.lora_from:
            raise ValueError(
                f"from step {self.tokens_until} (tokens_until) to {self.lora_from} (lora_from) nothing moves"
            )
        if self.lora_from >= self.run.steps:
            raise ValueError(f"lora_from {self.lora_from} must be less than run.steps {self.run.steps}")
        if self.run.parallel == "fsdp":
            raise ValueError("what a LoRA trains is small: run.parallel=ddp")


class Adapters(nn.Module):
    """The adapters of a LoRA as a module to train: `factors` are for its states, which show no adapters."""

    def __init__(self, lora: LoRA):
        super().__init__()
        # A name in torch has no dots
        self.factors = nn.ParameterDict(
            {
                f"{layer}.{role}".replace(".", "/"): parameter
                for layer, adapter in lora.adapters.items()
                for role, parameter in (("down", adapter.down), ("up", adapter.up))
            }
        )
        self.adapters = nn.ModuleList(lora.adapters.values())  # for training and evaluation mode
        self.adapters.train()


class LoRATask(PersonalTask):
    config: LoRATaskConfig

    def __init__(self, config: LoRATaskConfig):
        self.tower_moves = config.lora_text is not None or bool(config.tokens.words)
        self.words: NewWords | None = None
        self.loras: dict[str, LoRA] = {}
        super().__init__(config, config.tokens.identifier)
        if self.words is not None:
            self.words.require_named(self.captions.all)

    def _networks(self) -> nn.ModuleDict:
        config, networks = self.config, nn.ModuleDict()
        if config.lora is not None:
            self.loras["unet"] = add_lora(self.unet, config.lora, seed=config.run.seed)
            networks["lora"] = Adapters(self.loras["unet"])
        if not config.run.compile:  # which keeps what it wants itself
            lean(self.unet)
        if config.lora_text is not None:
            if not isinstance(self.text_encoder, TextEncoder):
                raise ValueError(f"lora_text needs a text tower of CLIP's form; {config.model} has none")
            self.loras["text"] = add_lora(self.text_encoder, config.lora_text, seed=config.run.seed)
            networks["lora_text"] = Adapters(self.loras["text"])
        if config.tokens.words:
            self.words = NewWords(config.tokens, self.base, config.run.seed)
            networks["tokens"] = self.words.module
        return networks

    def _rates(self) -> dict[str, float]:
        return dict(self.config.rates)

    def _begin(self, step: int) -> None:
        if self.words is None:
            return
        self.words.begin(step)
        config = self.config
        moving(self.words.module.parameters(), config.tokens_until == 0 or step < config.tokens_until)
        for lora in self.loras.values():
            moving(lora.parameters(), step >= config.lora_from)

    def export(self, folder: Path) -> None:
        config = self.config
        configs = {"unet": self.unet.config, "text": getattr(self.text_encoder, "config", None)}
        parts = {part: lora.weights for part, lora in self.loras.items()}
        about = {"name": config.model, "hash": self.model_hash}
        told: dict[str, Any] = {"model": about, "steps": config.run.steps}
        folder.mkdir(parents=True, exist_ok=True)
        for form in config.forms:
            # Under its name once it is whole, also over the file of an earlier end of the run
            path, temporary = folder / FILES[form], folder / f".part-{FILES[form]}"
            discard(temporary)
            needed = {part: configs[part] for part in parts}
            write_lora(parts, temporary, needed, form, DTYPES[config.dtype], told)  # type: ignore[arg-type]
            if path.is_dir():
                discard(path)
            os.replace(temporary, path)
        if self.words is not None:
            self.words.export(folder, ["diffusers"], config.run.steps)


def moving(parameters: Iterable[Tensor], whether: bool) -> None:
    """Parameters without a gradient are left alone by the optimiser, weight decay included."""
    for parameter in parameters:
        parameter.requires_grad_(whether)


def discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
