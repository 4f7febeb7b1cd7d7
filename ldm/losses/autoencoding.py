"""The autoencoder's loss (Rombach et al. 2022, arXiv:2112.10752, appendix G, eq. 25), some terms optional:

    nll + kl_weight kl + adversarial_weight lambda g                 KL form
    nll + codebook_weight codebook + adversarial_weight lambda g     VQ form
    nll = (l1 + perceptual_weight lpips) / exp(logvar) + logvar

with `g` and `lambda` from `adversarial.py`, `lpips` from `perceptual.py`, `codebook` from the quantiser. For
the KL form the original sums over the values of a picture; here everything is divided by their number, which
changes no ratio of terms and makes the numbers comparable between sizes. For the VQ form it takes means, as
is done here.
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from ldm.losses.adversarial import DiscriminatorConfig
from ldm.models.autoencoder import DiagonalGaussian

ADAPTIVE_LIMIT = 1e4  # of the adaptive weight, on the scale of the original's loss: sums for KL, means for VQ
LOGVAR_LIMIT = 20.0


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms, as in the original's configurations; 0 leaves a term out.

    kl_weight: KL form alone. codebook_weight, beta, legacy, revive_after: VQ form alone; beta and legacy are
    the quantiser's, revive_after is the number of steps without use after which a code is replaced by a
    latent of the batch (0: never).
    logvar: log of the scale of the reconstruction's errors; learned_logvar: it starts there and is trained
    with the weights. (In the original's code it is a parameter that no optimiser knows.)
    perceptual_weights: safetensors file with a trained LPIPS network, needed for a perceptual term; or "hed",
    the VGG distance that stands in for it (`perceptual.py`), which the log calls "vgg_distance".
    adversarial_start: generator step, counted from 0, in which discriminator and adversarial term set in: one
    update of the autoencoder, whatever the accumulation, is a step; the discriminator's are not counted. (The
    original's counter, Lightning's `global_step`, counts both players' from Lightning 1.6 on.)
    """

    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    beta: float = 0.25
    legacy: bool = True
    revive_after: int = 0
    logvar: float = 0.0
    learned_logvar: bool = False
    perceptual_weight: float = 0.0
    perceptual_weights: str = ""
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        for name in (
            *("kl_weight", "codebook_weight", "beta", "revive_after"),
            *("perceptual_weight", "adversarial_weight", "adversarial_start"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if not abs(self.logvar) <= LOGVAR_LIMIT:
            raise ValueError(f"loss.logvar must be in -{LOGVAR_LIMIT}..{LOGVAR_LIMIT}, got {self.logvar}")
        if self.perceptual_weight and not self.perceptual_weights:
            raise ValueError(
                "loss.perceptual_weight needs loss.perceptual_weights=FILE with a trained LPIPS, or hed"
            )

    def require_form(self, codebook_size: int | None) -> None:
        """Raises ValueError for settings that make no sense with the autoencoder's form."""
        if codebook_size is None and self.revive_after:
            raise ValueError(
                f"loss.revive_after {self.revive_after} needs codes: set autoencoder.codebook_size"
            )
        if codebook_size is not None and not self.codebook_weight:
            raise ValueError("loss.codebook_weight must be positive: nothing else moves the codes")
        if codebook_size is not None and not self.beta:
            told = "the codes would never move" if self.legacy else "nothing would hold the latents near them"
            raise ValueError(f"loss.beta must be positive with autoencoder.codebook_size: {told}")


def reconstruction_loss(
    images: Float[Tensor, "B C H W"], reconstructions: Float[Tensor, "B C H W"]
) -> Float[Tensor, ""]:
    """L1, mean over everything."""
    return (images - reconstructions.float()).abs().mean()


def negative_log_likelihood(
    reconstruction: Float[Tensor, ""], logvar: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """`reconstruction / exp(logvar) + logvar`, least at `logvar = log(reconstruction)`.

    For L1 that of Laplace's distribution with scale exp(logvar), up to a constant.
    """
    return reconstruction / logvar.exp() + logvar


def kl_loss(posterior: DiagonalGaussian, images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """KL of the posterior to the standard normal, nats per pixel value."""
    return posterior.kl().mean() / images[0].numel()
