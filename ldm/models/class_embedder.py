"""Class numbers as a context of one token (Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1).

The stand-in for a text tower: the UNet's cross-attention reads one learned vector a class. A model trained
for classifier-free guidance has one class more than the data, the last, which means none.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """Defaults: the original's first class-conditional ImageNet model.

    null_class: the class that means none; None for a model that was always told a class.
    """

    num_classes: int = 1000
    dim: int = 512
    null_class: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"class embedder {name} must be at least 1, got {getattr(self, name)}")
        if self.null_class is not None and not 0 <= self.null_class < self.num_classes:
            raise ValueError(
                f"class embedder null_class {self.null_class} must be in 0..{self.num_classes - 1}"
            )

    @property
    def width(self) -> int:
        """Width of the context, under the name that it has in text towers."""
        return self.dim


class ClassTokenizer:
    """Prompts that are class numbers ("207") to classes (N,); the empty prompt is the null class."""

    def __init__(self, config: ClassEmbedderConfig):
        self.config = config
        self.context_length = 1

    def __call__(self, texts: list[str]) -> Int[Tensor, " N"]:
        """Raises ValueError for a prompt that is no class, or an empty one where no class means none."""
        classes = []
        for text in texts:
            last = self.config.num_classes - 1
            if not text.strip():
                if self.config.null_class is None:
                    raise ValueError(
                        "this model has no class that means none: give a class in every prompt, guidance 1"
                    )
                classes.append(self.config.null_class)
            elif text.strip().isdecimal() and int(text) <= last:
                classes.append(int(text))
            else:
                raise ValueError(f"this model takes a class number 0..{last} as prompt, got {text!r}")
        return torch.tensor(classes, dtype=torch.int64)

    def cut(self, text: str) -> str:
        """Nothing of a class number is cut off."""
        return ""


class ClassEmbedder(nn.Module):
    def __init__(self, config: ClassEmbedderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.dim)

    def forward(self, classes: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """The context of each class. Raises ValueError for a class that the model does not have."""
        bad = [number for number in classes.tolist() if not 0 <= number < self.config.num_classes]
        if bad:
            raise ValueError(f"class {bad[0]} is not in 0..{self.config.num_classes - 1}")
        return rearrange(self.embedding(classes), "b d -> b 1 d")
