"""Train a first stage: images in, reconstructions out; L1 + KL, optional perceptual and adversarial terms.

With `autoencoder.codebook_size` the bottleneck is a codebook instead (VQ form), whose loss takes the place of
the KL term. With an adversarial term two players move in every step: first the autoencoder, then the
discriminator, on the same images. Writes `autoencoder.safetensors`. In the KL form its latent scale and shift
are measured on the training images at the end (Rombach et al. 2022, section 4.3.2: the latents of the
diffusion model have zero mean and unit variance); in the VQ form they are 1 and 0, as in the released models.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import to_dict
from ldm.device import pick_device, place
from ldm.losses.adversarial import PatchDiscriminator, adaptive_weight, discriminator_hinge, generator_hinge
from ldm.losses.autoencoding import (
    ADAPTIVE_LIMIT,
    AutoencoderLossConfig,
    kl_loss,
    negative_log_likelihood,
    reconstruction_loss,
)
from ldm.losses.perceptual import SMALLEST_IMAGE, load_lpips
from ldm.metrics import psnr
from ldm.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    AutoencoderVQ,
    DiagonalGaussian,
    MidAttention,
    make_autoencoder,
)
from ldm.models.blocks import ResBlock, zero_init
from ldm.models.quantizer import CodeUsage, Quantized, perplexity, usage
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
        size, stage = self.data.size, self.autoencoder
        if stage.in_channels != 3:
            raise ValueError(f"autoencoder.in_channels must be 3, for RGB pictures, got {stage.in_channels}")
        if size % stage.factor:
            raise ValueError(f"data.size {size} is not a multiple of the autoencoder's factor {stage.factor}")
        self.loss.require_form(stage.codebook_size)
        if self.loss.perceptual_weight and size < SMALLEST_IMAGE:
            raise ValueError(f"data.size {size} is too small for LPIPS, which needs {SMALLEST_IMAGE} px")
        if self.loss.adversarial_weight:
            self.loss.discriminator.require_size(size, size)


def initialise(model: AutoencoderKL | AutoencoderVQ) -> None:
    """Start weights for training from scratch, so that the first steps already see through the bottleneck.

    Orthogonal convolutions keep the scale of the signal through the layers (PyTorch's default shrinks it at
    each), residual branches start at zero, and the posterior starts narrow (standard deviation 0.05, not 1: a
    tiny KL weight leads there anyway). The codes of the VQ form start where the quantiser puts them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
    for module in model.modules():
        if isinstance(module, ResBlock):
            zero_init(module.conv2)
        elif isinstance(module, MidAttention):
            zero_init(module.to_out)
    if isinstance(model, AutoencoderKL):
        assert model.quant_conv.bias is not None
        nn.init.constant_(model.quant_conv.bias[model.config.latent_channels :], -6.0)


class AutoencoderTask:
    def __init__(self, config: AutoencoderTaskConfig):
        self.config = config
        self.device = pick_device(config.run.device)
        self.images = load_images(config.data, "train").pixels  # (N, 3, H, W) uint8
        self.heldout = load_images(config.data, "heldout_image").pixels
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        model = make_autoencoder(config.autoencoder)
        initialise(model)
        self.model = place(model, self.device)
        self.logvar = torch.tensor(config.loss.logvar, device=self.device)
        if config.loss.learned_logvar:
            self.logvar = nn.Parameter(self.logvar)
        self.usage: CodeUsage | None = None
        if isinstance(self.model, AutoencoderVQ):
            quantizer = self.model.quantizer
            quantizer.beta, quantizer.legacy = config.loss.beta, config.loss.legacy
            if config.loss.revive_after:
                size = quantizer.embedding.num_embeddings
                self.usage = CodeUsage(size, config.loss.revive_after).to(self.device)
        self.players = {"model": Player(self.trained(), self.loss)}
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

    def trained(self) -> nn.Module:
        """The autoencoder, and what else a run's state holds: the log-variance, the counters of the codes."""
        beside: dict[str, nn.Module] = {}
        if self.usage is not None:
            beside["usage"] = self.usage
        if isinstance(self.logvar, nn.Parameter):
            beside["loss"] = nn.ParameterDict({"logvar": self.logvar})
        # Alone it keeps its own names, so that states written before there were such options go on
        return nn.ModuleDict({"autoencoder": self.model, **beside}) if beside else self.model

    def batch(self, step: int, part: int) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] of one part of the batch of `step`."""
        run = self.config.run
        rows = batch_indices(len(self.images), run.batch, run.seed, step)
        return to_float(self.images[rows.chunk(run.accumulate)[part]]).to(self.device)

    def reconstruct(self, images: Tensor, *key: int | str) -> tuple[Tensor, DiagonalGaussian | Quantized]:
        """Reconstructions, and what the bottleneck says of them.

        By a sample of the posterior, whose noise is a function of the seed and `key`; in the VQ form by the
        nearest codes.
        """
        if isinstance(self.model, AutoencoderVQ):
            return self.model(images)
        side = [size // self.model.factor for size in images.shape[-2:]]
        shape = (len(images), self.config.autoencoder.latent_channels, *side)
        noise = torch.randn(shape, generator=generator(self.config.run.seed, "posterior", *key))
        return self.model(images, noise.to(self.device))

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        images = self.batch(step, part)
        revived = self.revive(images, step) if part == 0 else {}
        reconstructions, bottleneck = self.reconstruct(images, step, part)
        l1 = reconstruction_loss(images, reconstructions)
        quality = psnr(images, reconstructions.detach()).mean()
        values = {"l1": l1.item(), "psnr": quality.item(), **revived}
        weights, reconstruction = self.config.loss, l1
        if weights.perceptual_weight:
            distance = self.perceptual(images, reconstructions).mean()
            reconstruction = l1 + weights.perceptual_weight * distance
            values["perceptual"] = distance.item()
        nll = negative_log_likelihood(reconstruction, self.logvar)
        if weights.learned_logvar:
            values["logvar"] = self.logvar.item()
        if isinstance(bottleneck, Quantized):
            limit = ADAPTIVE_LIMIT
            total = nll + weights.codebook_weight * bottleneck.loss.mean()
            values |= {"codebook": bottleneck.loss.mean().item(), **self.of_codes(bottleneck.indices)}
            if self.usage is not None:
                self.usage.count(bottleneck.indices, part)
        else:
            limit = ADAPTIVE_LIMIT / images[0].numel()
            kl = kl_loss(bottleneck, images)
            total = nll + weights.kl_weight * kl
            values["kl"] = kl.item()
        if weights.adversarial_weight and step >= weights.adversarial_start:
            self.discriminator.requires_grad_(False)  # the gradient passes through it and leaves none in it
            adversarial = generator_hinge(self.discriminator(reconstructions))
            factor = adaptive_weight(nll, adversarial, self.model.decoder.conv_out.weight, limit)
            total = total + weights.adversarial_weight * factor * adversarial
            values |= {"adversarial": adversarial.item(), "adaptive_weight": factor.item()}
        return total, values

    def of_codes(self, indices: Tensor) -> dict[str, float]:
        """How much of the codebook these choices (B, h, w) use: the share of codes, and the perplexity."""
        size = self.config.autoencoder.codebook_size
        assert size is not None
        return {"usage": usage(indices, size).item(), "perplexity": perplexity(indices, size).item()}

    @torch.no_grad()
    def revive(self, images: Tensor, step: int) -> dict[str, float]:
        """Put dead codes, if the run revives any, onto latents of `images`, picked by (seed, step); how many.

        Before the pass that trains on them, and with an encoding of its own: it happens rarely.
        """
        if self.usage is None or not isinstance(self.model, AutoencoderVQ):
            return {}
        revived = 0
        if self.usage.dead():
            rng = generator(self.config.run.seed, "revive", step)
            z = self.model.encode(images).mean
            revived = self.usage.revive(self.model.quantizer.embedding.weight, z, rng)
        return {"revived": float(revived * self.config.run.accumulate)}  # the loop divides by it

    def discriminator_loss(self, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        images = self.batch(step, part)
        with torch.no_grad():
            reconstructions, _ = self.reconstruct(images, step, part)
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        return discriminator_hinge(real, fake), {"real": real.mean().item(), "fake": fake.mean().item()}

    def validate(self) -> dict[str, float]:
        """Mean PSNR of held-out images, decoded from the posterior's mode; nothing if none are held out.

        In the VQ form also the use of the codebook over all of them.
        """
        if not len(self.heldout):
            return {}
        qualities, indices = [], []
        for images in (to_float(part).to(self.device) for part in self.heldout.split(32)):
            z = self.model.encode(images).mode()
            qualities.append(psnr(images, self.model.decode(z)))
            if isinstance(self.model, AutoencoderVQ):
                indices.append(self.model.quantizer(z).indices)
        values = {"psnr": float(torch.cat(qualities).mean())}
        if indices:
            values |= self.of_codes(torch.cat(indices))
        return {f"heldout_{name}": value for name, value in values.items()}

    def preview(self, path: Path) -> None:
        """Held-out images (training images where none are held out) above their reconstructions."""
        pixels = self.heldout if len(self.heldout) else self.images
        images = to_float(pixels[:8]).to(self.device)
        pairs = torch.cat([images, self.model.decode(self.model.encode(images).mode())])
        save_grid(pairs, path, columns=len(images))

    def latent_scale(self) -> tuple[float, float]:
        """Scale and shift that give the latents of the training images zero mean and unit variance; of the
        VQ form's 1 and 0."""
        if isinstance(self.model, AutoencoderVQ):
            return 1.0, 0.0
        modes = torch.cat(
            [self.model.encode(to_float(part).to(self.device)).mode().cpu() for part in self.images.split(64)]
        )
        return 1 / float(modes.std()), float(modes.mean())

    def export(self, folder: Path) -> None:
        scale, shift = self.latent_scale()
        config = replace(self.config.autoencoder, scale_factor=scale, shift_factor=shift)
        tensors = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        save_weights(folder / "autoencoder.safetensors", tensors, {"config": to_dict(config)})
