"""The network of published Fréchet distances, where its weights are on disk: `--features inception:FILE`.

Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567) as TensorFlow's graph of 2015-12-05 computes it, which
is not torchvision's: its average poolings leave out the padding, and its last block takes a maximum. It is
the package torch-fidelity that has it, and the resize of TensorFlow 1 that belongs to it: bilinear to
299x299, corner on corner, without antialiasing, so that halving a picture keeps every second pixel. FILE is
the state dict that pytorch-fid and torch-fidelity publish, `pt_inception-2015-12-05-6726825d.pth`, or the
same tensors as .safetensors; it is read by our own reader (`ldm/weights/source.py`), as that package would
run what the file says. The features are the 2048 numbers after the last pooling.
"""

import io
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.weights.io import load_strict
from ldm.weights.source import open_source

SIDE, WIDTH = 299, 2048
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins, as its name says
RESIZE = f"torch-fidelity's bilinear of TensorFlow 1, not antialiased, to {SIDE}x{SIDE}"


def load_inception(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B 2048"]], str]:
    """The map from 8-bit pictures of any one size to features, and what the weights are.

    Raises ModuleNotFoundError, FileNotFoundError, or ValueError for a damaged file or another network's.
    """
    network = build()
    source = open_source(path)
    tensors = dict(source.read(source.entries))
    counters = {name: t for name, t in network.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        load_strict(network, {**counters, **tensors}, str(path))  # older files come without the counters
    except ValueError as error:
        raise ValueError(f"{error}; expected pt_inception-2015-12-05-{PUBLISHED}.pth") from None
    network.to(device)
    with open(path, "rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
    published = sha256.startswith(PUBLISHED)
    told = "as in published FIDs" if published else f"of {path.name}, not those of published FIDs"

    def features(images: Tensor) -> Tensor:
        return network(images)[0]

    return features, f"Inception-v3 of TensorFlow, weights {told}, sha256 {sha256[:16]}"


def build() -> Any:
    """torch-fidelity's network, frozen, its weights still random: given none, it would download them."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ModuleNotFoundError(
            "--features inception needs the package torch-fidelity: pip install torch-fidelity (or the extra "
            "[eval] of this package)"
        ) from error

    class Inception(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """Takes an empty state dict for what it is."""

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict and bool(state_dict), assign)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Inception("inception", [str(WIDTH)], feature_extractor_weights_path=nothing)
