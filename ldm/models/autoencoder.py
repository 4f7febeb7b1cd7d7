"""The first stage: images to latents and back (Rombach et al. 2022, arXiv:2112.10752, section 3.1, app. G).

Encoder and decoder are residual networks with one attention block in the middle. What keeps the latents
between them tame has two forms: `AutoencoderKL` ends in a diagonal Gaussian posterior, `AutoencoderVQ` begins
its decoder with a codebook. `encode` and `decode` are the original's, unscaled; `encode_latents` and
`decode_latents` are the only two places that apply the latent scale and shift.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.models.blocks import Downsample, ResBlock, Upsample, silu
from ldm.models.quantizer import Quantized, VectorQuantizer

EPS = 1e-6  # of every norm in the autoencoder


@dataclass(frozen=True)
class AutoencoderConfig:
    """Defaults: KL-f8, as in Stable Diffusion 1 and 2. `attention_levels` are indices into `channel_mult`.

    z_channels: width of the bottleneck inside encoder and decoder; embed_dim: channels of the latents, None
    is as many. codebook_size: None is the KL form, a number the VQ form, whose released models have
    scale_factor 1.
    """

    in_channels: int = 3
    z_channels: int = 4
    embed_dim: int | None = None
    codebook_size: int | None = None
    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    norm_groups: int = 32
    scale_factor: float = 0.18215
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        widths = [self.base_channels * mult for mult in self.channel_mult]
        bad = [width for width in widths if width < 1 or width % self.norm_groups]
        if not widths or bad:
            raise ValueError(
                f"autoencoder widths {widths} must be multiples of norm_groups {self.norm_groups}"
            )
        if self.num_res_blocks < 1 or self.z_channels < 1 or self.in_channels < 1:
            raise ValueError(
                "autoencoder num_res_blocks, z_channels and in_channels must be at least 1, "
                f"got {self.num_res_blocks}, {self.z_channels} and {self.in_channels}"
            )
        for name in ("embed_dim", "codebook_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"autoencoder {name} must be at least 1, got {value}")
        if not set(self.attention_levels) <= set(range(len(widths))):
            raise ValueError(
                f"autoencoder attention_levels {list(self.attention_levels)} must be in 0..{len(widths) - 1}"
            )
        if self.scale_factor <= 0:
            raise ValueError(f"autoencoder scale_factor must be positive, got {self.scale_factor}")

    @property
    def factor(self) -> int:
        """How many pixels a latent cell covers in each direction."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, which are those of the diffusion model."""
        return self.z_channels if self.embed_dim is None else self.embed_dim

    @property
    def moments(self) -> int:
        """What the encoder gives a latent: mean and log-variance (KL), or the latent itself (VQ)."""
        return 2 if self.codebook_size is None else 1


class DiagonalGaussian:
    """The posterior N(mean, exp(logvar)), with the log-variance clamped to [-30, 20] as in the original."""

    def __init__(self, moments: Float[Tensor, "B C2 h w"]):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @cached_property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Float[Tensor, "B C h w"]:
        return self.mean

    def sample(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """`mean + std * noise`; the caller draws the noise, so that the randomness has one owner."""
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, " B"]:
        """KL to the standard normal, `1/2 sum(mean^2 + var - 1 - logvar)` over C, h, w."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class PointPosterior:
    """The VQ form's answer as a posterior: all on one point, so that every sample is the mean."""

    def __init__(self, mean: Float[Tensor, "B C h w"]):
        self.mean = mean

    @cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def mode(self) -> Float[Tensor, "B C h w"]:
        return self.mean

    def sample(self, noise: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return self.mean


class MidAttention(nn.Module):
    """Single-head self-attention over the pixels of the feature map, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        h = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])  # in the memory layout of x


class Level(nn.Module):
    """The residual (and attention) blocks of one resolution, then the change of resolution, if any."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        depth: int,
        attention: bool,
        resample: nn.Module | None,
        groups: int,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(
                channels if i == 0 else out_channels,
                out_channels,
                None,
                groups=groups,
                eps=EPS,
                zero_last=False,
            )
            for i in range(depth)
        )
        self.attentions = nn.ModuleList(
            MidAttention(out_channels, groups) for _ in range(depth if attention else 0)
        )
        self.resample = resample or nn.Identity()

    def forward(self, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions:
                h = self.attentions[i](h)
        return self.resample(h)


class MidBlock(nn.Module):
    def __init__(self, channels: int, attention: bool, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels, channels, None, groups=groups, eps=EPS, zero_last=False) for _ in range(2)
        )
        self.attention = MidAttention(channels, groups) if attention else nn.Identity()

    def forward(self, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.resnets[1](self.attention(self.resnets[0](h)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to moments (B, 2 z, h, w), in the VQ form (B, z, h, w), before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            down = Downsample(width, asymmetric=True) if i < len(widths) - 1 else None
            attention = i in config.attention_levels
            before = widths[max(i - 1, 0)]
            self.down_blocks.append(
                Level(before, width, config.num_res_blocks, attention, down, config.norm_groups)
            )
        self.mid_block = MidBlock(widths[-1], config.mid_attention, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.moments * config.z_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z h w"]:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(silu(self.norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Latents (B, z, h, w), after `post_quant_conv`, to images; one more residual block a level."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.base_channels * mult for mult in config.channel_mult][::-1]  # coarsest first
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config.mid_attention, config.norm_groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            up = Upsample(width) if i < len(widths) - 1 else None
            attention = len(widths) - 1 - i in config.attention_levels
            before = widths[max(i - 1, 0)]
            self.up_blocks.append(
                Level(before, width, config.num_res_blocks + 1, attention, up, config.norm_groups)
            )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(silu(self.norm_out(h)))


class Autoencoder(nn.Module, ABC):
    """What both forms share; images in [-1, 1]. `make_autoencoder` builds the one that a config describes."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        z, latent = config.z_channels, config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(config.moments * z, config.moments * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, z, 1)

    @property
    def factor(self) -> int:
        return self.config.factor

    @abstractmethod
    def encode(self, images: Float[Tensor, "B C H W"]) -> DiagonalGaussian | PointPosterior:
        """The posterior of unscaled latents. Raises ValueError unless the factor divides H and W."""

    def encode_moments(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M h w"]:
        """What `encode` makes its posterior of; errors as there."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"image size {width}x{height} is not a multiple of the autoencoder's factor {self.factor}"
            )
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        """Unscaled latents to images, nominally in [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(z))

    def encode_latents(
        self, images: Float[Tensor, "B C H W"], noise: Float[Tensor, "B Z h w"] | None = None
    ) -> Float[Tensor, "B Z h w"]:
        """Images to the diffusion latents `(z - shift) * scale`; z is the mode where `noise` is None."""
        posterior = self.encode(images)
        return self.scale_latents(posterior.mode() if noise is None else posterior.sample(noise))

    def scale_latents(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B Z h w"]:
        return (z - self.config.shift_factor) * self.config.scale_factor

    def decode_latents(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        """Latents of the diffusion model to images, `decode(latents / scale + shift)`."""
        return self.decode(latents / self.config.scale_factor + self.config.shift_factor)


class AutoencoderKL(Autoencoder):
    """KL-regularised autoencoder: the encoder gives a Gaussian, held near the standard normal in training."""

    def __init__(self, config: AutoencoderConfig):
        """Raises ValueError for the configuration of a VQ form."""
        if config.codebook_size is not None:
            raise ValueError(f"a KL autoencoder has no codebook, got codebook_size {config.codebook_size}")
        super().__init__(config)

    def encode(self, images: Float[Tensor, "B C H W"]) -> DiagonalGaussian:
        return DiagonalGaussian(self.encode_moments(images))

    def forward(
        self, images: Float[Tensor, "B C H W"], noise: Float[Tensor, "B Z h w"]
    ) -> tuple[Tensor, DiagonalGaussian]:
        """One training pass: the reconstruction of a posterior sample, and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior


class AutoencoderVQ(Autoencoder):
    """Vector-quantised autoencoder. The diffusion model works on the latents before quantisation, which is
    the first thing that `decode` does."""

    def __init__(self, config: AutoencoderConfig):
        """Raises ValueError for the configuration of a KL form."""
        if config.codebook_size is None:
            raise ValueError("a VQ autoencoder needs a codebook_size, got None")
        super().__init__(config)
        self.quantizer = VectorQuantizer(config.codebook_size, config.latent_channels)

    def encode(self, images: Float[Tensor, "B C H W"]) -> PointPosterior:
        """The latents before quantisation, as a posterior without spread; errors as in the base class."""
        return PointPosterior(self.encode_moments(images))

    def decode(self, z: Float[Tensor, "B Z h w"], quantize: bool = True) -> Float[Tensor, "B C H W"]:
        """Unscaled latents, by way of their nearest codes unless told not to, to images (not clamped)."""
        return super().decode(self.quantizer(z).z_q if quantize else z)

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, Quantized]:
        """One training pass: the reconstruction from the codes, and what the quantiser says of them."""
        quantized = self.quantizer(self.encode(images).mean)
        return self.decode(quantized.z_q, quantize=False), quantized


def make_autoencoder(config: AutoencoderConfig) -> AutoencoderKL | AutoencoderVQ:
    """The form that `config` describes, freshly initialised."""
    return AutoencoderKL(config) if config.codebook_size is None else AutoencoderVQ(config)
