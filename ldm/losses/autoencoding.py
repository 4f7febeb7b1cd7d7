"""The autoencoder's loss (Rombach et al. 2022, arXiv:2112.10752, appendix G, eq. 25), some terms optional:

    l1 + perceptual_weight lpips + kl_weight kl + adversarial_weight lambda g

with `g` and `lambda` from `adversarial.py`, `lpips` from `perceptual.py`. The original sums over the values
of a picture; here everything is divided by their number, which changes no ratio of terms and makes the
numbers comparable between sizes.
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from ldm.losses.adversarial import DiscriminatorConfig
from ldm.models.autoencoder import DiagonalGaussian

ADAPTIVE_LIMIT = 1e4  # of the adaptive weight, where the loss is summed over the values of a picture


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms, as in the original's configurations; 0 leaves a term out.

    perceptual_weights: safetensors file with a trained LPIPS network, needed for a perceptual term.
    adversarial_start: generator step, counted from 0, in which discriminator and adversarial term set in.
    """

    kl_weight: float = 1e-6
    perceptual_weight: float = 0.0
    perceptual_weights: str = ""
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        for name in ("kl_weight", "perceptual_weight", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError("loss.perceptual_weight needs loss.perceptual_weights=FILE with a trained LPIPS")


def reconstruction_loss(
    images: Float[Tensor, "B C H W"], reconstructions: Float[Tensor, "B C H W"]
) -> Float[Tensor, ""]:
    """L1, mean over everything."""
    return (images - reconstructions.float()).abs().mean()


def kl_loss(posterior: DiagonalGaussian, images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """KL of the posterior to the standard normal, nats per pixel value."""
    return posterior.kl().mean() / images[0].numel()
