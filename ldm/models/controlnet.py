"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a picture of edges, depth or pose steers a frozen UNet.

    y_c = F(x; theta) + Z(F(x + hint features; theta_c); theta_z)    (eq. 2)

A trainable copy (theta_c) of the UNet's way down and middle block reads the latents plus the encoded hint.
Each of its outputs goes through a 1x1 convolution Z that starts at zero and becomes a residual, which
`UNet.forward(..., control=...)` adds to the skip of the same place and to the middle block: before training
the UNet's output is unchanged to the bit. Hints are RGB in [0, 1] at the resolution of the pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ldm.models.blocks import zero_init
from ldm.models.unet import UNet, UNetConfig, UNetEncoder

HINT_WIDTHS = (16, 32, 96, 256)  # of Stable Diffusion's, for a factor of 8 between pixels and latents
BASE_FIELDS = (  # in which a ControlNet and the UNet it steers must agree; `in_channels` may differ
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "context_dim",
    "num_classes",
    "vector_dim",
    "pooled_context",
)


@dataclass(frozen=True)
class ControlNetConfig:
    """Defaults: a ControlNet for Stable Diffusion 1.

    unet: of the UNet whose way down and middle block it copies.
    hint_channels: of the hint; 3 for RGB.
    hint_widths: channels of the hint encoder at each resolution, from the pixels to the latents. Each further
        one halves the resolution, so there are log2(autoencoder's factor) + 1 of them.
    global_pool: each residual is its mean over the picture, so that a hint tells contents and not places (the
        original's "shuffle" of version 1.1).
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = HINT_WIDTHS
    global_pool: bool = False

    def __post_init__(self) -> None:
        if self.hint_channels < 1:
            raise ValueError(f"ControlNet hint_channels must be at least 1, got {self.hint_channels}")
        if not self.hint_widths or min(self.hint_widths) < 1:
            raise ValueError(
                f"ControlNet hint_widths must be one or more positive widths, got {list(self.hint_widths)}"
            )

    @property
    def stride(self) -> int:
        """Pixels of the hint a latent, along a side; the autoencoder's factor must be the same."""
        return 2 ** (len(self.hint_widths) - 1)

    def check_fits(self, unet: UNetConfig, factor: int) -> None:
        """Raises ValueError where this ControlNet cannot steer `unet` on latents of an autoencoder with
        `factor`."""
        if self.stride != factor:
            raise ValueError(
                f"ControlNet with {len(self.hint_widths)} hint_widths is for an autoencoder with factor "
                f"{self.stride}, this one has {factor}"
            )
        if different := self.differences(unet):
            raise ValueError(f"ControlNet is made for another UNet: {', '.join(different)}")

    def differences(self, unet: UNetConfig) -> list[str]:
        """In what `unet` is none that this ControlNet was made for, both values each; empty where it is."""
        return [
            f"{name} {getattr(self.unet, name)} (the UNet's {getattr(unet, name)})"
            for name in BASE_FIELDS
            if getattr(self.unet, name) != getattr(unet, name)
        ]


class HintEncoder(nn.Module):
    """3x3 convolutions with SiLU between, two at each resolution; the last starts at zero."""

    def __init__(self, channels: int, widths: Sequence[int], out: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, widths[0], 3, padding=1)])
        for narrow, wide in pairwise(widths):
            self.convs.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.convs.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.convs.append(zero_init(nn.Conv2d(widths[-1], out, 3, padding=1)))

    def forward(self, hint: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_out h w"]:
        h = self.convs[0](hint)
        for conv in self.convs[1:]:
            h = conv(F.silu(h))  # the strided ones halve: (B, C2, H/2, W/2)
        return h


class ControlNet(UNetEncoder):
    """`forward(x_t, t, context, encode_hint(hint)) -> residuals`, the `control` of `UNet.forward`."""

    OTHER_FORWARDS = ("encode_hint",)  # methods to call besides `forward`, for what wraps that

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.config = config
        self.hint_encoder = HintEncoder(config.hint_channels, config.hint_widths, config.unet.model_channels)
        outputs = [*config.unet.skip_channels, config.unet.widths[-1]]  # the last one: of the middle block
        self.zero_convs = nn.ModuleList(zero_init(nn.Conv2d(width, width, 1)) for width in outputs)

    @classmethod
    def from_unet(
        cls, unet: UNet, hint_channels: int = 3, hint_widths: tuple[int, ...] = HINT_WIDTHS
    ) -> "ControlNet":
        """A trainable ControlNet at the start of its training for `unet`: with copies of its weights, on its
        device, in its precision."""
        controlnet = cls(ControlNetConfig(unet.config, hint_channels, hint_widths)).to(unet.conv_in.weight)
        own = controlnet.state_dict()
        shared = {name: tensor for name, tensor in unet.state_dict().items() if name in own}
        controlnet.load_state_dict(own | shared)
        return controlnet

    def encode_hint(self, hint: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_out h w"]:
        """Features of a hint in [0, 1], for `forward`: once a picture, since no timestep enters.

        Raises ValueError where the hint has the wrong channels or a side that is no multiple of
        `config.stride`.
        """
        channels, stride = self.config.hint_channels, self.config.stride
        if hint.shape[1] != channels:
            raise ValueError(f"ControlNet takes a hint of {channels} channels, got {hint.shape[1]}")
        if hint.shape[2] % stride or hint.shape[3] % stride:
            raise ValueError(
                f"ControlNet takes a hint with sides that are multiples of {stride}, "
                f"got {hint.shape[3]}x{hint.shape[2]}"
            )
        return self.hint_encoder(hint)

    def forward(
        self,
        x: Float[Tensor, "B C h w"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "RB T D"] | None,
        features: Float[Tensor, "B_hint C_hint h_hint w_hint"],
        y: Float[Tensor, "B_y V"] | Int[Tensor, " B_y"] | None = None,
    ) -> list[Tensor]:
        """One residual a skip of the UNet, in running order, then that of the middle block.

        Args:
            x, t, context, y: as of `UNet.forward`.
            features: from `encode_hint`, one of each sample or one for all.
        Raises ValueError as the UNet does, and where `features` are of another size than the latents.
        """
        self._check_features(x, features)
        middle, skips, _ = self.encode(x, t, context, y, features)
        control = [conv(h) for conv, h in zip(self.zero_convs, [*skips, middle], strict=True)]
        if self.config.global_pool:
            return [residual.mean((2, 3), keepdim=True).expand_as(residual) for residual in control]
        return control

    def _check_features(self, x: Tensor, features: Tensor) -> None:
        batch, channels, height, width = features.shape
        if channels != self.config.unet.model_channels:
            raise ValueError(
                f"ControlNet takes hint features of {self.config.unet.model_channels} channels, as "
                f"encode_hint gives them, got {channels}"
            )
        if (height, width) != x.shape[2:]:
            stride, latent = self.config.stride, f"{x.shape[3]}x{x.shape[2]}"
            raise ValueError(
                f"ControlNet's hint is {width * stride}x{height * stride} pixels; latents of {latent} take "
                f"{x.shape[3] * stride}x{x.shape[2] * stride}, {stride} times their size"
            )
        if batch not in (1, len(x)):
            raise ValueError(
                f"ControlNet takes a hint of each sample or one for all, got {batch} for {len(x)}"
            )


def scale_residuals(control: Sequence[Float[Tensor, "B _ _ _"]], scale: float | int) -> list[Tensor]:
    """The residuals of a ControlNet at strength `scale`: 0 is without, 1 as trained. It must be finite."""
    if not math.isfinite(scale):
        raise ValueError(f"control scale must be a finite number, got {scale}")
    return list(control) if scale == 1 else [scale * residual for residual in control]


def add_residuals(controls: Sequence[Sequence[Float[Tensor, "B _ _ _"]]]) -> list[Tensor]:
    """The joint residuals of several ControlNets on one UNet: their sums, place by place.

    Raises ValueError where they are for different UNets or latents.
    """
    shapes = [[tuple(residual.shape) for residual in control] for control in controls]
    for other in shapes[1:]:
        if other != shapes[0]:
            differ = next((pair for pair in zip(shapes[0], other, strict=False) if pair[0] != pair[1]), "")
            raise ValueError(
                f"ControlNets are for different UNets: {len(shapes[0])} and {len(other)} residuals {differ}"
            )
    return [reduce(torch.add, place) for place in zip(*controls, strict=True)]
