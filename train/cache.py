"""Moments of the frozen autoencoder, computed once for a training set and kept on disk.

The file is keyed by what made it (the images and the autoencoder's weights): a cache of other images or of
another autoencoder is never used, it is made anew.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.autoencoder import Autoencoder
from ldm.weights.io import load_weights, save_weights
from train.data import to_float


def fingerprint(pixels: Tensor, autoencoder: Autoencoder) -> str:
    """A hash of the images and of the autoencoder, configuration included."""
    digest = hashlib.blake2b(repr((tuple(pixels.shape), autoencoder.config)).encode(), digest_size=16)
    digest.update(pixels.contiguous().numpy().tobytes())
    for name, tensor in autoencoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def cached_moments(
    folder: Path, name: str, pixels: Tensor, autoencoder: Autoencoder
) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation (N, z, h, w), float32 on the CPU, of `pixels` (N, 3, H, W)
    uint8."""
    key = fingerprint(pixels, autoencoder)
    path = folder / f"{name}-{key}.safetensors"
    if not path.is_file():
        device = next(autoencoder.parameters()).device
        means, stds = [], []
        for part in tqdm(pixels.split(64), desc=f"encoding {name} images", unit="batch", leave=False):
            posterior = autoencoder.encode(to_float(part).to(device))
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
        save_weights(path, {"mean": torch.cat(means), "std": torch.cat(stds)})
    tensors, _ = load_weights(path)
    return tensors["mean"], tensors["std"]
