"""Teach a model a subject by training all of it: DreamBooth.

Ruiz et al. 2023 (arXiv:2208.12242): a rare identifier and the noun of the subject's class name it; pictures
of the class, made by the model before, keep it from forgetting the class (section 3.3, `prior.py`). The
paper trains the text tower too, and then the super-resolution model, with less noise on its small pictures:
that is `ldm-train diffusion configs/train/tiny_dreambooth_upscaler.yaml`. The finished run writes a model
folder for `ldm-sample`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from train.conditioning import trained_networks
from train.personal import PersonalConfig, PersonalTask
from train.prior import PriorConfig
from train.sharded import building_device
from train.subject import SubjectConfig


@dataclass(frozen=True)
class DreamBoothTaskConfig(PersonalConfig):
    """`ldm-train dreambooth`.

    train_text: the text tower too, as in the paper. subject.identifier "sks" and a noun are what the
    subject is called. rate_text: what the tower's learning rate is of `run.lr`.
    """

    subject: SubjectConfig = field(default_factory=lambda: SubjectConfig(identifier="sks"))
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(weight=1.0))
    train_text: bool = False
    rate_text: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate_text < float("inf"):
            raise ValueError(f"rate_text must be above 0, got {self.rate_text}")


class DreamBoothTask(PersonalTask):
    config: DreamBoothTaskConfig

    def __init__(self, config: DreamBoothTaskConfig):
        self.tower_moves = config.train_text
        super().__init__(config)

    def _networks(self) -> nn.ModuleDict:
        where = building_device(self.config.run)
        self.unet.to(where).requires_grad_(True).train()
        tower = self.base.text_encoder if self.config.train_text else None
        if self.config.train_text:
            if tower is None:
                raise ValueError(f"train_text: {self.config.model} reads no text")
            tower.to(where).requires_grad_(True).train()
        networks = trained_networks(self.unet, tower)
        self.sharded = tuple(networks.values())
        return networks

    def _rates(self) -> dict[str, float]:
        return {"text_encoder": self.config.rate_text}

    def export(self, folder: Path) -> None:
        self.base.save(folder)
