"""The text tower of the latent diffusion paper (Rombach et al. 2022, arXiv:2112.10752, section 3.3 and
appendix E.2.1): a transformer encoder over BERT's word pieces, trained from scratch together with the UNet.

A pre-norm encoder (Vaswani et al. 2017, arXiv:1706.03762) with learned positions. It is not causal and
nothing masks the padding: every token sees all 77, so that the UNet was trained on the padding too. The
heads' channels are set apart from the width: 8 x 64 = 512 inside a width of 1280. `wordpiece.py` makes its
ids; `clip.py` is its successor in Stable Diffusion.
"""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class BertTextConfig:
    """Defaults: txt2img-1.45B. text2img256 has width 640, so mlp_width 2560; the heads stay 8 x 64."""

    vocab_size: int = 30522
    context_length: int = 77
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_channels: int = 64
    mlp_width: int = 5120

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"BERT text {field.name} must be at least 1, got {getattr(self, field.name)}"
                )


class BertTextBlock(nn.Module):
    """Self-attention over all tokens and an MLP with the exact GELU, each pre-normalised and residual."""

    def __init__(self, config: BertTextConfig):
        super().__init__()
        width, inner = config.width, config.heads * config.head_channels
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = self.norm1(x)
        q, k, v = (
            rearrange(project(h), "b t (heads d) -> b heads t d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # scale head_channels^-1/2
        x = x + self.to_out(rearrange(h, "b heads t d -> b t (heads d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class BertTextEncoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D), after the final layer norm.

    Raises ValueError for more tokens than `context_length`. Fewer are allowed, but then the states are others
    than with padding.
    """

    def __init__(self, config: BertTextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(BertTextBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        if ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"BERT text encoder takes {self.config.context_length} tokens, got {ids.shape[1]}"
            )
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)
