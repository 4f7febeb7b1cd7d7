"""The denoising UNet (Rombach et al. 2022, arXiv:2112.10752, section 3.3; ADM: arXiv:2105.05233).

One class serves text-, class-, image-concat- and unconditional models: the context is optional, classes and
vectors add to the timestep embedding, and an image condition is concatenated to `x` by the caller
(`in_channels` counts it). Stable Diffusion 1 is the default configuration. The way down and the middle stand
in `UNetEncoder`, since a ControlNet (controlnet.py) is a copy of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ldm.models.attention import QKV_LAYOUTS, SelfAttentionBlock, SpatialTransformer
from ldm.models.blocks import (
    Downsample,
    ResBlock,
    TimestepEmbedding,
    Upsample,
    repeat_rows,
    silu,
    timestep_embedding,
    zero_init,
)


@dataclass(frozen=True)
class UNetConfig:
    """Defaults: the UNet of Stable Diffusion 1.

    attention: "transformer" (spatial transformer, with context where `context_dim` is set) or "adm"
        (self-attention only).
    attention_resolutions: downsampling factors at which there is attention. The middle block always has it.
    context_dim: width of the context for cross-attention; None for a model without ("adm" always).
    cross_only: downsampling factors at which transformers attend to the context alone, in self-attention's
        place too (Stable Diffusion's x4 upscaler, whose pictures are large); never the middle block.
    head_channels: channels of a head; where None, every attention has `num_heads` heads.
    num_classes: class-conditional by an embedding table; vector_dim: conditioned on a vector by an MLP;
        pooled_context: that vector is the context's last token, which in a causal text tower has read the
        whole prompt (Podell et al. 2023, SDXL, arXiv:2307.01952, section 2.1). At most one of the three.
    sample_size: side of the latents the model was trained on, the default size for sampling.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention: str = "transformer"
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    transformer_depth: int = 1
    context_dim: int | None = 768
    cross_only: tuple[int, ...] = ()
    num_heads: int = 8
    head_channels: int | None = None
    linear_projection: bool = False
    qkv_order: str = "heads_first"
    num_classes: int | None = None
    vector_dim: int | None = None
    pooled_context: bool = False
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    norm_groups: int = 32
    dropout: float = 0.0
    sample_size: int = 64

    def __post_init__(self) -> None:
        if self.attention not in ("transformer", "adm"):
            raise ValueError(f"UNet attention must be 'transformer' or 'adm', got {self.attention!r}")
        if self.qkv_order not in QKV_LAYOUTS:
            raise ValueError(f"UNet qkv_order must be {' or '.join(QKV_LAYOUTS)}, got {self.qkv_order!r}")
        if (self.num_classes is not None) + (self.vector_dim is not None) + self.pooled_context > 1:
            raise ValueError("UNet takes only one of classes (num_classes), vector_dim and pooled_context")
        if self.pooled_context and self.context_dim is None:
            raise ValueError("UNet pooled_context needs a context: context_dim is null")
        if self.attention == "adm" and self.context_dim is not None:
            raise ValueError(
                f"UNet attention 'adm' takes no context: context_dim {self.context_dim} must be null"
            )
        if self.cross_only and self.context_dim is None:
            raise ValueError(f"UNet cross_only {self.cross_only} needs a context: context_dim is null")
        for name in ("in_channels", "out_channels", "num_res_blocks", "transformer_depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"UNet {name} must be at least 1, got {getattr(self, name)}")
        widths = self.widths
        if not widths or any(width < 1 or width % self.norm_groups for width in widths):
            raise ValueError(f"UNet widths {widths} must be multiples of norm_groups {self.norm_groups}")
        unit = self.num_heads if self.head_channels is None else self.head_channels
        for level, width in enumerate(widths):
            attends = 2**level in self.attention_resolutions or level == len(widths) - 1
            if attends and (unit < 1 or width % unit):
                what = "num_heads" if self.head_channels is None else "head_channels"
                raise ValueError(f"UNet widths {widths}: {width} must be a multiple of {what} {unit}")

    @property
    def factor(self) -> int:
        """The side of `x` must be a multiple of this."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the finest."""
        return [self.model_channels * mult for mult in self.channel_mult]

    @property
    def skip_channels(self) -> list[int]:
        """Channels of each tensor that the way down hands over to the way up, in running order."""
        channels = [self.model_channels]
        for level, width in enumerate(self.widths):
            channels += [width] * (self.num_res_blocks + (level < len(self.widths) - 1))
        return channels

    def heads(self, channels: int) -> int:
        return channels // self.head_channels if self.head_channels else self.num_heads


class UNetEncoder(nn.Module):
    """The timestep embedding, the way down and the middle block: what a UNet and a ControlNet share."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.encoder_config = config
        width, time_dim = config.model_channels, 4 * config.model_channels

        self.time_embedding = TimestepEmbedding(width, time_dim)
        self.class_embedding: nn.Module | None = None
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, time_dim)
        elif config.vector_dim is not None:
            self.class_embedding = TimestepEmbedding(config.vector_dim, time_dim)
        elif config.pooled_context and config.context_dim is not None:
            self.class_embedding = TimestepEmbedding(config.context_dim, time_dim)

        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (channels, out) in enumerate(pairwise([width, *config.widths])):
            self.down_blocks.append(DownBlock(config, channels, out, time_dim, level))
        self.mid_block = MidBlock(config, config.widths[-1], time_dim)

    def encode(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "RB T D"] | None,
        y: Float[Tensor, "B_y V"] | Int[Tensor, " B_y"] | None,
        hint: Float[Tensor, "B_hint C_hint h w"] | None = None,
    ) -> tuple[Float[Tensor, "B_mid C_mid h_mid w_mid"], list[Tensor], Float[Tensor, "B_emb time_dim"]]:
        """The middle block's output, the skips in running order, and the embedding for the way up.

        Arguments as of `UNet.forward`; `hint` is added behind the first convolution. Where the context has
        R B rows, so has the output; skips from before the first cross-attention and the embedding have B.
        """
        self._check(x, context)
        y = self._pooled(context, y)
        if y is not None and len(y) > len(x):  # the embedding differs, and with it everything
            x, t = repeat_rows(x, len(y)), repeat_rows(t, len(y))
        emb = self.embed(t, y)
        h = self.conv_in(x)
        if hint is not None:
            h = h + repeat_rows(hint, len(h))
        skips = [h]
        for block in self.down_blocks:
            h, new = block(h, emb, context)
            skips += new
        return self.mid_block(h, emb, context), skips, emb

    def embed(
        self, t: Shaped[Tensor, " B"], y: Shaped[Tensor, "B ..."] | None
    ) -> Float[Tensor, "B time_dim"]:
        """The timestep embedding plus that of the class or vector `y`."""
        if (y is None) != (self.class_embedding is None):
            needed = "needs a class or vector y" if y is None else "takes no class or vector y"
            classes, width = self.encoder_config.num_classes, self.encoder_config.vector_dim
            raise ValueError(f"this {self._name} {needed} (num_classes {classes}, vector_dim {width})")
        features = timestep_embedding(t, self.encoder_config.model_channels)
        emb = self.time_embedding(features.to(self.conv_in.weight.dtype))
        return emb if self.class_embedding is None else emb + self.class_embedding(y)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _pooled(self, context: Tensor | None, y: Tensor | None) -> Tensor | None:
        """The vector for `embed`: the context's last token where this network reads it, else `y`."""
        if not self.encoder_config.pooled_context or context is None:
            return y
        if y is not None:
            raise ValueError(
                f"this {self._name} takes no class or vector y: it reads the context's last token"
            )
        return context[:, -1]  # (B, D)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        config = self.encoder_config
        if x.shape[1] != config.in_channels:
            raise ValueError(f"{self._name} takes {config.in_channels} channels, got {x.shape[1]}")
        if x.shape[2] % config.factor or x.shape[3] % config.factor:
            raise ValueError(
                f"{self._name} takes sides that are multiples of {config.factor}, "
                f"got {x.shape[3]}x{x.shape[2]}"
            )
        width = None if context is None else context.shape[2]
        if width != config.context_dim:
            raise ValueError(f"{self._name} takes a context of width {config.context_dim}, got {width}")
        if context is not None and len(context) % len(x):
            raise ValueError(
                f"{self._name} takes one or several contexts for each of {len(x)} x, got {len(context)}"
            )


class UNet(UNetEncoder):
    """`forward(x_t, t, context) -> eps, v or x0`, whichever it was trained to predict."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.config = config
        skips, channels = config.skip_channels, config.widths[-1]
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(config.widths))):
            taken = [skips.pop() for _ in range(config.num_res_blocks + 1)]
            out = config.widths[level]
            self.up_blocks.append(UpBlock(config, channels, taken, out, 4 * config.model_channels, level))
            channels = out

        self.norm_out = nn.GroupNorm(config.norm_groups, channels)
        self.conv_out = zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1))

    def forward(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "RB T D"] | None = None,
        y: Float[Tensor, "B_y V"] | Int[Tensor, " B_y"] | None = None,
        control: Sequence[Float[Tensor, "_ _ _ _"]] | None = None,
    ) -> Float[Tensor, "B_out C_out h w"]:
        """
        Args:
            x: noised latents, with any image condition concatenated on the channels.
            t: timesteps in [0, num_timesteps), integer or fractional.
            context: hidden states of the text encoder, for cross-attention; B rows, or R B for R contexts of
                the same x, as torch.cat([uncond, cond]). The output then has R B rows, as of
                torch.cat([x] * R); what comes before the first cross-attention is computed once.
            y: class indices (B,) or vectors (B, V) where the model takes them; or R B of them.
            control: residuals from a ControlNet, B or R B rows each, added to the skips in their order, the
                last one to the middle block.
        Raises ValueError where x has the wrong channels or a side that is no multiple of `config.factor`, and
        where context or y is missing, unexpected or of the wrong width.
        """
        h, skips, emb = self.encode(x, t, context, y)
        if control is not None:
            assert len(control) == len(skips) + 1, "one control residual a skip, and one for the middle"
            skips = [add_rows(skip, residual) for skip, residual in zip(skips, control[:-1], strict=True)]
            h = add_rows(h, control[-1])
        for block in self.up_blocks:
            h = block(h, skips, emb, context)
        return self.conv_out(silu(self.norm_out(h)))


def add_rows(a: Float[Tensor, "A *shape"], b: Float[Tensor, "B *shape"]) -> Float[Tensor, "C *shape"]:
    """`a + b`, the one with fewer rows repeated."""
    rows = max(len(a), len(b))
    return repeat_rows(a, rows) + repeat_rows(b, rows)


def attention_block(config: UNetConfig, channels: int, *, cross_only: bool = False) -> nn.Module:
    heads, groups = config.heads(channels), config.norm_groups
    if config.attention == "adm":
        return SelfAttentionBlock(channels, heads, groups=groups, qkv_order=config.qkv_order)
    return SpatialTransformer(
        channels,
        config.context_dim,
        heads,
        depth=config.transformer_depth,
        groups=groups,
        linear_projection=config.linear_projection,
        cross_only=cross_only,
    )


def res_block(
    config: UNetConfig, channels: int, out: int, time_dim: int, resample: str | None = None
) -> ResBlock:
    return ResBlock(
        channels,
        out,
        time_dim,
        groups=config.norm_groups,
        scale_shift=config.scale_shift_norm,
        resample=resample,
        dropout=config.dropout,
    )


class DownBlock(nn.Module):
    """Residual (and attention) blocks of one resolution, then the halving, if any; yields every output."""

    def __init__(self, config: UNetConfig, channels: int, out: int, time_dim: int, level: int):
        super().__init__()
        depth = config.num_res_blocks
        self.resnets = nn.ModuleList(
            res_block(config, channels if i == 0 else out, out, time_dim) for i in range(depth)
        )
        attends = 2**level in config.attention_resolutions
        self.attentions = nn.ModuleList(
            attention_block(config, out, cross_only=2**level in config.cross_only)
            for _ in range(depth if attends else 0)
        )
        self.downsample: nn.Module | None = None
        if level < len(config.channel_mult) - 1:
            self.downsample = (
                res_block(config, out, out, time_dim, "down") if config.resblock_updown else Downsample(out)
            )

    def forward(
        self,
        h: Float[Tensor, "B C h w"],
        emb: Float[Tensor, "B_emb E"],
        context: Float[Tensor, "RB T D"] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if self.attentions:
                h = self.attentions[i](h, context)
            outputs.append(h)
        if self.downsample is not None:
            h = self.downsample(h, emb) if isinstance(self.downsample, ResBlock) else self.downsample(h)
            outputs.append(h)
        return h, outputs


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, time_dim: int):
        super().__init__()
        self.resnets = nn.ModuleList(res_block(config, channels, channels, time_dim) for _ in range(2))
        self.attention = attention_block(config, channels)

    def forward(
        self,
        h: Float[Tensor, "B C h w"],
        emb: Float[Tensor, "B_emb E"],
        context: Float[Tensor, "RB T D"] | None,
    ) -> Float[Tensor, "B_out C h w"]:
        return self.resnets[1](self.attention(self.resnets[0](h, emb), context), emb)


class UpBlock(nn.Module):
    """One residual block more than on the way down, each fed with a skip; then the doubling, if any."""

    def __init__(
        self, config: UNetConfig, channels: int, skips: list[int], out: int, time_dim: int, level: int
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            res_block(config, (channels if i == 0 else out) + skip, out, time_dim)
            for i, skip in enumerate(skips)
        )
        attends = 2**level in config.attention_resolutions
        self.attentions = nn.ModuleList(
            attention_block(config, out, cross_only=2**level in config.cross_only)
            for _ in range(len(skips) if attends else 0)
        )
        self.upsample: nn.Module | None = None
        if level > 0:
            self.upsample = (
                res_block(config, out, out, time_dim, "up") if config.resblock_updown else Upsample(out)
            )

    def forward(
        self,
        h: Float[Tensor, "B C h w"],
        skips: list[Tensor],
        emb: Float[Tensor, "B_emb E"],
        context: Float[Tensor, "RB T D"] | None,
    ) -> Float[Tensor, "B_out C2 h2 w2"]:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1), emb)
            if self.attentions:
                h = self.attentions[i](h, context)
        if self.upsample is None:
            return h
        return self.upsample(h, emb) if isinstance(self.upsample, ResBlock) else self.upsample(h)
