"""The CLIP text tower (Radford et al. 2021, arXiv:2103.00020): a causal transformer over token ids.

OpenAI's form has the quick GELU, OpenCLIP's the exact one; Stable Diffusion 1 reads the last layer, Stable
Diffusion 2 the penultimate one, both after the final layer norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.models.attention import attend
from ldm.models.tokenizer import END_ID


@dataclass(frozen=True)
class TextConfig:
    """Defaults: the text tower of CLIP ViT-L/14, as in Stable Diffusion 1.

    activation: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
    skip_layers: 0 reads the last layer, 1 the penultimate one (Stable Diffusion 2).
    padding: "end" repeats the end token, "zero" pads with id 0 (Stable Diffusion 2).
    repeat_end: hidden states behind the end token repeat the end token's. They then carry nothing else, and
        since the tower is causal it stops at the longest prompt of the batch; for models trained that way.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    skip_layers: int = 0
    padding: str = "end"
    repeat_end: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"text activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.padding not in ("end", "zero"):
            raise ValueError(f"text padding must be 'end' or 'zero', got {self.padding!r}")
        for name in ("vocab_size", "context_length", "width", "layers", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"text {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} must be a multiple of heads {self.heads}")
        if not 0 <= self.skip_layers < self.layers:
            raise ValueError(f"text skip_layers must be in 0..{self.layers - 1}, got {self.skip_layers}")


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, OpenAI's approximation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TextBlock(nn.Module):
    """Causal self-attention and an MLP, each pre-normalised and residual."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = self.norm1(x)
        q, k, v = (
            rearrange(project(h), "b t (heads d) -> b heads t d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = attend(q, k, v, causal=True)
        x = x + self.to_out(rearrange(h, "b heads t d -> b t (heads d)"))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D), after the final layer norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        # Set by textual_inversion.py: (numbers behind the table, rows of the table) -> rows
        self.with_new_words: Callable[[Tensor, Tensor], Tensor] | None = None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The rows of the token table; for ids behind the end token, the new words' (textual inversion)."""
        if self.with_new_words is None:
            return self.token_embedding(ids)
        return self.with_new_words(ids - END_ID - 1, self.token_embedding(ids.clamp(max=END_ID)))

    def hidden(self, ids: Int[Tensor, "B T"], skip_layers: int = 0) -> Float[Tensor, "B T D"]:
        """The residual stream after all blocks but the last `skip_layers`, before the final layer norm."""
        x = self.embed(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks[: len(self.blocks) - skip_layers]:
            x = block(x)
        return x

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        if ids.shape[1] > self.config.context_length:
            raise ValueError(f"text encoder takes {self.config.context_length} tokens, got {ids.shape[1]}")
        if not self.config.repeat_end:
            return self.final_norm(self.hidden(ids, self.config.skip_layers))
        ends = (ids == END_ID).int().argmax(dim=1)  # position of the first end token
        used = min(ids.shape[1], -(-(int(ends.max()) + 1) // 8) * 8)  # in steps of 8: few distinct shapes
        h = self.final_norm(self.hidden(ids[:, :used], self.config.skip_layers))
        positions = torch.minimum(torch.arange(ids.shape[1], device=ids.device), ends[:, None])  # (B, T)
        return h[torch.arange(len(ids), device=ids.device)[:, None], positions]  # (B, T, D)
