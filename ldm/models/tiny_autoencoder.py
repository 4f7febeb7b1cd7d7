"""The tiny autoencoder (TAESD family, madebyollin/taesd): a first stage distilled to be quick.

A stack of small residual blocks without attention and, in its plain form, without normalisation. It is
trained to map images to the latents of one given diffusion model and back, in that model's own scale: the
latents that the UNet sees. So no scale factor is applied anywhere, and there is no posterior to draw from.

    images    (B, 3, H, W) in [-1, 1]; the networks work on [0, 1], to which `Encoder` and `Decoder` convert
    latents   (B, z, h, w), scaled as the diffusion model takes and gives them

The defaults are TAESD, for Stable Diffusion 1 and 2. TAEF2, of 32 channels, adds to each block of the level
at the latents' size a normalised bottleneck: `TinyAutoencoderConfig(latent_channels=32, bottleneck=256)`.
`ldm/weights/tiny.py` reads the public files; `sample/preview.py` shows with a decoder what is being sampled.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LIMIT = 3.0  # the decoder bends latents to within this, softly
GROUPS = 4  # of the norm in a bottleneck


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Defaults: TAESD.

    encoder_blocks, decoder_blocks: residual blocks a level, in running order: finest first in the encoder,
        coarsest first in the decoder.
    bottleneck: width inside the bottlenecks of the coarsest level; 0 is none.
    latent_magnitude, latent_shift: of the map of latents to [0, 1], see `TinyAutoencoder.to_unit`.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    bottleneck: int = 0
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5

    def __post_init__(self) -> None:
        blocks = (self.encoder_blocks, self.decoder_blocks)
        if len(self.encoder_blocks) != len(self.decoder_blocks) or any(min(b, default=0) < 1 for b in blocks):
            raise ValueError(
                "tiny autoencoder encoder_blocks and decoder_blocks must have as many levels as each other, "
                f"with at least 1 block each, got {list(self.encoder_blocks)} and {list(self.decoder_blocks)}"
            )
        if min(self.in_channels, self.latent_channels, self.channels) < 1:
            raise ValueError(
                "tiny autoencoder in_channels, latent_channels and channels must be at least 1, "
                f"got {self.in_channels}, {self.latent_channels} and {self.channels}"
            )
        if self.bottleneck < 0 or self.bottleneck % GROUPS:
            raise ValueError(
                f"tiny autoencoder bottleneck must be 0 or a multiple of {GROUPS}, got {self.bottleneck}"
            )
        if self.latent_magnitude <= 0:
            raise ValueError(
                f"tiny autoencoder latent_magnitude must be positive, got {self.latent_magnitude}"
            )

    @property
    def factor(self) -> int:
        """How many pixels a latent cell covers in each direction."""
        return 2 ** (len(self.encoder_blocks) - 1)


class Bottleneck(nn.Module):
    """Mix the channels of each place in a wider space, normalised over the picture; without biases."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.conv_out = nn.Conv2d(width, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.conv_out(F.relu(self.norm(self.conv_in(x))))


class TinyBlock(nn.Module):
    """Three convolutions beside a shortcut, ReLU behind the sum; a bottleneck, if any, adds to x before."""

    def __init__(self, channels: int, bottleneck: int = 0):
        super().__init__()
        self.bottleneck = Bottleneck(channels, bottleneck) if bottleneck else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if self.bottleneck is not None:
            x = x + self.bottleneck(x)
        h = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(h) + x)


class Level(nn.Module):
    """The blocks of one resolution with the convolution that halves it before them or doubles it behind."""

    def __init__(self, channels: int, depth: int, bottleneck: int, *, down: bool = False, up: bool = False):
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False) if down else None
        self.resnets = nn.ModuleList(TinyBlock(channels, bottleneck) for _ in range(depth))
        self.up = nn.Conv2d(channels, channels, 3, padding=1, bias=False) if up else None

    def forward(self, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        if self.down is not None:
            h = self.down(h)  # (B, C, H/2, W/2)
        for resnet in self.resnets:
            h = resnet(h)
        if self.up is not None:
            h = self.up(F.interpolate(h, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)
        return h


class Encoder(nn.Module):
    """Images in [-1, 1] to latents in the diffusion model's own scale; usable alone."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        last = len(config.encoder_blocks) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(config.channels, depth, config.bottleneck if i == last else 0, down=i > 0)
            for i, depth in enumerate(config.encoder_blocks)
        )
        self.conv_out = nn.Conv2d(config.channels, config.latent_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z h w"]:
        """Raises ValueError unless the factor divides H and W."""
        height, width = images.shape[-2:]
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(
                f"image size {width}x{height} is not a multiple of the tiny autoencoder's factor {factor}"
            )
        h = self.conv_in((images + 1) / 2)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(h)


class Decoder(nn.Module):
    """Latents in the diffusion model's own scale to images, nominally in [-1, 1] (not clamped); usable alone.

    Latents are first bent to within (-3, 3) by `3 tanh(z / 3)`.
    """

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        last = len(config.decoder_blocks) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, config.channels, 3, padding=1)
        self.up_blocks = nn.ModuleList(
            Level(config.channels, depth, config.bottleneck if i == 0 else 0, up=i < last)
            for i, depth in enumerate(config.decoder_blocks)
        )
        self.conv_out = nn.Conv2d(config.channels, config.in_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        h = F.relu(self.conv_in(LIMIT * torch.tanh(z / LIMIT)))
        for block in self.up_blocks:
            h = block(h)
        return 2 * self.conv_out(h) - 1


class TinyAutoencoder(nn.Module):
    """Both halves. Images in [-1, 1], latents in the diffusion model's own scale."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        return self.config.factor

    def encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z h w"]:
        """Images to latents for the diffusion model as they are. Raises ValueError unless the factor divides
        H and W."""
        return self.encoder(images)

    def decode(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        """Latents of the diffusion model as they are to images, nominally in [-1, 1] (not clamped)."""
        return self.decoder(latents)

    def to_unit(self, latents: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B Z h w"]:
        """Latents as values in [0, 1], to keep them as the pixels of a picture: `z / (2 magnitude) + shift`,
        clamped."""
        scaled = latents / (2 * self.config.latent_magnitude) + self.config.latent_shift
        return scaled.clamp(0, 1)

    def from_unit(self, unit: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B Z h w"]:
        """The inverse of `to_unit` for latents within its range."""
        return (unit - self.config.latent_shift) * 2 * self.config.latent_magnitude

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The reconstruction of images."""
        return self.decode(self.encode(images))
