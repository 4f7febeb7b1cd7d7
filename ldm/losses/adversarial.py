"""The autoencoder's adversarial term: a patch discriminator that tells pictures from reconstructions.

PatchGAN (Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2), the hinge loss (Lim & Ye 2017,
arXiv:1705.02894) and the adaptive weight of VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 7), put together
as in Rombach et al. 2022, appendix G. `train/tasks/autoencoder.py` plays the two networks against each
other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Defaults: the original's, for 256 px. features: width of the first layer; the widest has 8 times it.

    Each output judges a patch of `9 * 2**layers - 2` pixels a side: 16, 34, 70, 142 for 1 to 4 layers.
    """

    layers: int = 3
    features: int = 64

    def __post_init__(self) -> None:
        if self.layers < 1 or self.features < 1:
            raise ValueError(
                f"loss.discriminator.layers {self.layers} and loss.discriminator.features {self.features} "
                "must be at least 1"
            )

    def require_size(self, height: int, width: int) -> None:
        """Raises ValueError for images that leave no output at all."""
        smallest = 3 * 2**self.layers
        if min(height, width) < smallest:
            raise ValueError(
                f"images of {width}x{height} are too small for a discriminator with {self.layers} layers, "
                f"which needs {smallest} px; lower loss.discriminator.layers"
            )


class PatchDiscriminator(nn.Module):
    """4x4 convolutions: `layers` that halve the resolution, then two that keep it; high logits mean "real".

    BatchNorm in all but the first and the last, leaky ReLU with slope 0.2, weights drawn from N(0, 0.02^2)
    and norm scales from N(1, 0.02^2).
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3):
        super().__init__()
        self.config = config
        widths = [config.features * min(2**i, 8) for i in range(config.layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for i in range(1, len(widths)):
            stride = 2 if i < config.layers else 1
            blocks += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        """One logit for each patch; `h = H / 2**layers - 2`. Raises ValueError for images that leave none."""
        self.config.require_size(*images.shape[-2:])
        return self.blocks(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_hinge(real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """`1/2 (mean(max(0, 1 - real)) + mean(max(0, 1 + fake)))` from the logits of both."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def generator_hinge(fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """`-mean(fake)`: the reconstructions are to get high logits."""
    return -fake.float().mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    last_layer: Float[Tensor, "..."],
    limit: float = 1e4,
) -> Float[Tensor, ""]:
    """The factor by which the adversarial term pulls at the decoder's last layer as the reconstruction does.

    `|d reconstruction / d last_layer| / (|d adversarial / d last_layer| + 1e-4)`, at most `limit`, without a
    gradient of its own. Both graphs stay alive for the backward pass to come.
    """
    (pull,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (pull.norm() / (push.norm() + 1e-4)).clamp(max=limit).detach()
