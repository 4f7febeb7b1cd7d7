"""Teach a model new words for a subject or a style, and nothing else: textual inversion.

Gal et al. 2022 (arXiv:2208.01618), eq. 2: the vectors of one or more new words are found by the model's own
loss on pictures whose captions name them; model and every other word stay as they are. The finished run
writes `embedding.safetensors` for `ldm-sample --embedding`, and the forms that others read.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ldm.models.frozen import lean
from train.personal import PersonalConfig, PersonalTask
from train.subject import SubjectConfig
from train.tokens import NewWords, TokensConfig, check_forms


@dataclass(frozen=True)
class TextualInversionTaskConfig(PersonalConfig):
    """`ldm-train textual-inversion`.

    tokens: the new words, see `TokensConfig`; the subject's name is all of them, unless `subject` says it.
    forms: of the files, some of diffusers, original, webui.
    """

    subject: SubjectConfig = field(default_factory=lambda: SubjectConfig(templates=("object",)))
    tokens: TokensConfig = field(default_factory=TokensConfig)
    forms: tuple[str, ...] = ("diffusers",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_forms(self.forms)
        if not self.tokens.words:
            raise ValueError('tokens.words is empty; give a new word, such as ["<toy>"]')
        if self.run.parallel == "fsdp":
            raise ValueError("what textual inversion trains is small: run.parallel=ddp")


class TextualInversionTask(PersonalTask):
    config: TextualInversionTaskConfig
    tower_moves = True

    def __init__(self, config: TextualInversionTaskConfig):
        super().__init__(config, config.tokens.identifier)
        self.words.require_named(self.captions.all)

    def _networks(self) -> nn.ModuleDict:
        self.words = NewWords(self.config.tokens, self.base, self.config.run.seed)
        if not self.config.run.compile:  # which keeps what it wants itself
            lean(self.unet)
        return nn.ModuleDict({"tokens": self.words.module})

    def _begin(self, step: int) -> None:
        self.words.begin(step)

    def export(self, folder: Path) -> None:
        self.words.begin(self.config.run.steps - 1)
        self.words.export(folder, self.config.forms, self.config.run.steps)
