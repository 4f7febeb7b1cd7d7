"""Train a first stage: images in, reconstructions out; L1 + KL, optional perceptual and adversarial terms.

With an adversarial term two players move in every step: first the autoencoder, then the discriminator, on
the same images. Writes `autoencoder.safetensors`, whose latent scale and shift are measured on the training
images at the end (Rombach et al. 2022, section 4.3.2: the latents of the diffusion model have zero mean and
unit variance).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import to_dict
from ldm.device import pick_device, place
from ldm.losses.adversarial import PatchDiscriminator, adaptive_weight, discriminator_hinge, generator_hinge
from ldm.losses.autoencoding import ADAPTIVE_LIMIT, AutoencoderLossConfig, kl_loss, reconstruction_loss
from ldm.losses.perceptual import load_lpips
from ldm.metrics import psnr
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian, MidAttention
from ldm.models.blocks import ResBlock, zero_init
from ldm.seeding import derive, generator
from ldm.weights.io import save_weights
from sample.images import save_grid
from train.data import DataConfig, batch_indices, load_images, to_float
from train.loop import Player, RunConfig


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """`ldm-train autoencoder`: what to read, build, minimise and how to run."""

    data: DataConfig
    run: RunConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)

    def __post_init__(self) -> None:
        if self.loss.adversarial_weight:
            self.loss.discriminator.require_size(self.data.size, self.data.size)


def initialise(model: AutoencoderKL) -> None:
    """Start weights for training from scratch, so that the first steps already see through the bottleneck.

    Orthogonal convolutions keep the scale of the signal through the layers (PyTorch's default shrinks it at
    each), residual branches start at zero, and the posterior starts narrow (standard deviation 0.05, not 1: a
    tiny KL weight leads there anyway).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
    for module in model.modules():
        if isinstance(module, ResBlock):
            zero_init(module.conv2)
        elif isinstance(module, MidAttention):
            zero_init(module.to_out)
    assert model.quant_conv.bias is not None
    nn.init.constant_(model.quant_conv.bias[model.config.latent_channels :], -6.0)


class AutoencoderTask:
    def __init__(self, config: AutoencoderTaskConfig):
        self.config = config
        self.device = pick_device(config.run.device)
        self.images = load_images(config.data, "train").pixels  # (N, 3, H, W) uint8
        self.heldout = load_images(config.data, "heldout_image").pixels
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        model = AutoencoderKL(config.autoencoder)
        initialise(model)
        self.model = place(model, self.device)
        self.players = {"model": Player(self.model, self.loss)}
        if config.loss.perceptual_weight:
            self.perceptual = place(load_lpips(config.loss.perceptual_weights), self.device)
        if config.loss.adversarial_weight:
            torch.manual_seed(derive(config.run.seed, "discriminator"))
            channels = config.autoencoder.in_channels
            self.discriminator = place(PatchDiscriminator(config.loss.discriminator, channels), self.device)
            self.players["discriminator"] = Player(
                self.discriminator,
                self.discriminator_loss,
                averaged=False,
                starts_at=config.loss.adversarial_start,
            )

    def batch(self, step: int, part: int) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] of one part of the batch of `step`."""
        run = self.config.run
        rows = batch_indices(len(self.images), run.batch, run.seed, step)
        return to_float(self.images[rows.chunk(run.accumulate)[part]]).to(self.device)

    def reconstruct(self, images: Tensor, *key: int | str) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstructions from a sample of the posterior, whose noise is a function of the seed and `key`."""
        side = [size // self.model.factor for size in images.shape[-2:]]
        shape = (len(images), self.config.autoencoder.latent_channels, *side)
        noise = torch.randn(shape, generator=generator(self.config.run.seed, "posterior", *key))
        return self.model(images, noise.to(self.device))

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        images = self.batch(step, part)
        reconstructions, posterior = self.reconstruct(images, step, part)
        l1 = reconstruction_loss(images, reconstructions)
        kl = kl_loss(posterior, images)
        quality = psnr(images, reconstructions.detach()).mean()
        values = {"l1": l1.item(), "kl": kl.item(), "psnr": quality.item()}
        weights, reconstruction = self.config.loss, l1
        if weights.perceptual_weight:
            distance = self.perceptual(images, reconstructions).mean()
            reconstruction = l1 + weights.perceptual_weight * distance
            values["perceptual"] = distance.item()
        total = reconstruction + weights.kl_weight * kl
        if weights.adversarial_weight and step >= weights.adversarial_start:
            self.discriminator.requires_grad_(False)  # the gradient passes through it and leaves none in it
            adversarial = generator_hinge(self.discriminator(reconstructions))
            last_layer, limit = self.model.decoder.conv_out.weight, ADAPTIVE_LIMIT / images[0].numel()
            factor = adaptive_weight(reconstruction, adversarial, last_layer, limit)
            total = total + weights.adversarial_weight * factor * adversarial
            values |= {"adversarial": adversarial.item(), "adaptive_weight": factor.item()}
        return total, values

    def discriminator_loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        images = self.batch(step, part)
        with torch.no_grad():
            reconstructions, _ = self.reconstruct(images, step, part)
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        return discriminator_hinge(real, fake), {"real": real.mean().item(), "fake": fake.mean().item()}

    def validate(self) -> dict[str, float]:
        """Mean PSNR of held-out images, decoded from the posterior's mode; nothing if none are held out."""
        if not len(self.heldout):
            return {}
        values = [
            psnr(images, self.model.decode(self.model.encode(images).mode()))
            for images in (to_float(part).to(self.device) for part in self.heldout.split(32))
        ]
        return {"heldout_psnr": float(torch.cat(values).mean())}

    def preview(self, path: Path) -> None:
        """Held-out images (training images where none are held out) above their reconstructions."""
        pixels = self.heldout if len(self.heldout) else self.images
        images = to_float(pixels[:8]).to(self.device)
        pairs = torch.cat([images, self.model.decode(self.model.encode(images).mode())])
        save_grid(pairs, path, columns=len(images))

    def export(self, folder: Path) -> None:
        modes = torch.cat(
            [self.model.encode(to_float(part).to(self.device)).mode().cpu() for part in self.images.split(64)]
        )
        config = replace(
            self.config.autoencoder, shift_factor=float(modes.mean()), scale_factor=1 / float(modes.std())
        )
        tensors = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        save_weights(folder / "autoencoder.safetensors", tensors, {"config": to_dict(config)})
