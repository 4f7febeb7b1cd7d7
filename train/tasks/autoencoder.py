"""Train a first stage: images in, reconstructions out; L1 + KL, optional perceptual and adversarial terms.

With `autoencoder.codebook_size` the bottleneck is a codebook instead (VQ form), whose loss takes the place of
the KL term. With an adversarial term two players move in every step: first the autoencoder, then the
discriminator, on the same images. Writes `autoencoder.safetensors`. In the KL form its latent scale and shift
are measured on the training images at the end (Rombach et al. 2022, section 4.3.2: the latents of the
diffusion model have zero mean and unit variance); in the VQ form they are 1 and 0, as in the released models.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import to_dict
from ldm.device import pick_device, place
from ldm.distributed import rank
from ldm.losses.adversarial import PatchDiscriminator, adaptive_weight, discriminator_hinge, generator_hinge
from ldm.losses.autoencoding import (
    ADAPTIVE_LIMIT,
    AutoencoderLossConfig,
    kl_loss,
    negative_log_likelihood,
    reconstruction_loss,
)
from ldm.losses.perceptual import SMALLEST_IMAGE, load_perceptual
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
from train.bad_steps import pictures
from train.bucketed import batch_rows, in_parts, largest, load, on_one_sheet
from train.buckets import bucket_shapes
from train.captions import data_key
from train.data import DataConfig, to_float
from train.distributed import parts_of
from train.given import fingerprint
from train.loop import Player, RunConfig
from train.reading import Ahead
from train.recompute import recompute_blocks
from train.streaming import joined, require_whole


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """`ldm-train autoencoder`: what to read, build, minimise and how to run."""

    data: DataConfig
    run: RunConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)

    def __post_init__(self) -> None:
        size, stage = self.data.size, self.autoencoder
        if self.run.parallel == "fsdp":
            raise ValueError("run.parallel=fsdp is for diffusion models; set it to ddp for an autoencoder")
        if self.run.compile:
            raise ValueError("run.compile=true is for diffusion models; set it to false for an autoencoder")
        if stage.in_channels != 3:
            raise ValueError(f"autoencoder.in_channels must be 3, for RGB pictures, got {stage.in_channels}")
        if size % stage.factor:
            raise ValueError(f"data.size {size} is not a multiple of the autoencoder's factor {stage.factor}")
        self.loss.require_form(stage.codebook_size)
        self.data.buckets.require_step(stage.factor)
        shapes = bucket_shapes(self.data.buckets, size) if self.data.buckets.on else [(size, size)]
        least = min(map(min, shapes))
        if self.loss.perceptual_weight and least < SMALLEST_IMAGE:
            side = f"data.size {size}" if least == size else f"a side of {least} px, which data.buckets has,"
            raise ValueError(f"{side} is too small for LPIPS, which needs {SMALLEST_IMAGE} px")
        if self.loss.adversarial_weight:
            for width, height in shapes:
                self.loss.discriminator.require_size(height, width)


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
        images = load(config.data, "train", config.run.batch)
        self.images, self.files = images.pixels, images.files  # (N, 3, H, W) uint8
        self.ahead = Ahead(self.images, self._rows, threads=int(config.data.stream))
        self.data_key = data_key(images.files)
        self.heldout = load(config.data, "heldout_image", config.run.batch, images).pixels
        torch.manual_seed(derive(config.run.seed, "initialisation"))
        model = make_autoencoder(config.autoencoder)
        initialise(model)
        self.model = place(model, self.device)
        if config.run.activation_checkpointing:
            recompute_blocks(self.model)
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
        self.players = {"model": Player(self.trained(), self.loss, seen=self.seen)}
        if self.usage is not None and isinstance(self.model, AutoencoderVQ):  # `loss` revives dead codes
            self.players["model"].written = (self.model.quantizer.embedding.weight,)
        if config.loss.perceptual_weight:
            self.perceptual = place(load_perceptual(config.loss.perceptual_weights), self.device)
        if config.loss.adversarial_weight:
            torch.manual_seed(derive(config.run.seed, "discriminator"))
            channels = config.autoencoder.in_channels
            self.discriminator = place(PatchDiscriminator(config.loss.discriminator, channels), self.device)
            self.players["discriminator"] = Player(
                self.discriminator,
                self.discriminator_loss,
                averaged=False,
                starts_at=config.loss.adversarial_start,
                seen=self.seen,
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

    @cached_property
    def given(self) -> dict[str, str]:
        """Hashes of the files that are read and not trained, by their keys (`given.py`)."""
        judged = self.config.loss.perceptual_weight > 0
        return {"loss.perceptual_weights": fingerprint(self.perceptual)} if judged else {}

    def batch(self, step: int, part: int) -> Tensor:
        """Images (b, 3, H, W) in [-1, 1] of one part of the batch of `step`."""
        require_whole(self.images)
        return to_float(self.ahead(step, part)).to(self.device)

    def _rows(self, step: int, part: int) -> Tensor:
        run = self.config.run
        rows = batch_rows(self.images, run.batch, run.seed, step)
        return rows.chunk(parts_of(run.accumulate))[part]

    def seen(self, step: int, parts: Iterable[int]) -> str:
        """The pictures in these parts of a batch."""
        return pictures([self.files[row] for part in parts for row in self._rows(step, part).tolist()])

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
        revived: dict[str, float] = {}
        if part == rank():  # each process's first part: all revive alike, and so keep the same codes
            revived = self.revive(images if part == 0 else self.batch(step, 0), step)
        reconstructions, bottleneck = self.reconstruct(images, step, part)
        l1 = reconstruction_loss(images, reconstructions)
        quality = psnr(images, reconstructions.detach()).mean()
        values = {"l1": l1.item(), "psnr": quality.item(), **revived}
        weights, reconstruction = self.config.loss, l1
        if weights.perceptual_weight:
            distance = self.perceptual(images, reconstructions).mean()
            reconstruction = l1 + weights.perceptual_weight * distance
            values[self.perceptual.log_name] = distance.item()
        nll = negative_log_likelihood(reconstruction, self.logvar)
        if weights.learned_logvar:
            values["logvar"] = self.logvar.item()
        if isinstance(bottleneck, Quantized):
            limit = ADAPTIVE_LIMIT
            total = nll + weights.codebook_weight * bottleneck.loss.mean()
            values |= {"codebook": bottleneck.loss.mean().item(), **self.of_codes(bottleneck.indices)}
            if self.usage is not None:
                self.usage.count(bottleneck.indices, part - rank())
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

    def rehearse(self, player: str, images: int) -> Tensor:
        width, height = largest(self.images)
        real = torch.zeros(images, 3, height, width, device=self.device)
        with torch.set_grad_enabled(player == "model"):
            made, bottleneck = self.reconstruct(real)
        weights = self.config.loss
        if player == "discriminator":
            return discriminator_hinge(self.discriminator(real), self.discriminator(made))
        total = reconstruction_loss(real, made)
        if isinstance(bottleneck, Quantized):
            total = total + bottleneck.loss.mean()
        else:
            total = total + kl_loss(bottleneck, real)
        if weights.perceptual_weight:
            total = total + self.perceptual(real, made).mean()
        if weights.adversarial_weight:
            self.discriminator.requires_grad_(False)
            total = total + generator_hinge(self.discriminator(made))
        return total

    def validate(self) -> dict[str, float]:
        """Mean PSNR of held-out images, decoded from the posterior's mode; nothing if none are held out.

        In the VQ form also the use of the codebook over all of them.
        """
        if not len(self.heldout):
            return {}
        qualities, indices = [], []
        for rows in in_parts(self.heldout, 32):
            images = to_float(self.heldout[rows]).to(self.device)
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
        pixels = pixels[:8]
        images = [to_float(pixels[rows]).to(self.device) for rows in in_parts(pixels, 8)]
        made = [self.model.decode(self.model.encode(some).mode()) for some in images]
        save_grid(on_one_sheet([*images, *made]), path, columns=len(pixels))

    def latent_scale(self) -> tuple[float, float]:
        """Scale and shift that give the latents of the training images zero mean and unit variance; of the
        VQ form's 1 and 0."""
        if isinstance(self.model, AutoencoderVQ):
            return 1.0, 0.0
        parts = (to_float(self.images[rows]).to(self.device) for rows in in_parts(self.images, 64))
        encoded = (self.model.encode(images).mode().cpu() for images in parts)
        if not isinstance(self.images, Tensor):
            encoded = (mode.flatten() for mode in encoded)  # of several shapes
        modes = joined(encoded, self.images)
        return 1 / float(modes.std()), float(modes.mean())

    def export(self, folder: Path) -> None:
        scale, shift = self.latent_scale()
        config = replace(self.config.autoencoder, scale_factor=scale, shift_factor=shift)
        tensors = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        save_weights(folder / "autoencoder.safetensors", tensors, {"config": to_dict(config)})
