"""Moments of the frozen autoencoder, computed once for a training set and kept on disk.

The file is keyed by what made it (the images and the autoencoder's weights): a cache of other images or of
another autoencoder is never used, it is made anew. Of pixels that are a view of a file (`streaming.py`) the
moments are one too, so that neither is ever in memory as a whole.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.autoencoder import Autoencoder
from ldm.weights.io import load_weights
from train.data import to_float
from train.streaming import growing, map_weights, mapped_key, whole


def fingerprint(pixels: Tensor, autoencoder: Autoencoder) -> str:
    """A hash of the images and of the autoencoder, configuration included; of a file's the file's key."""
    digest = hashlib.blake2b(repr((tuple(pixels.shape), autoencoder.config)).encode(), digest_size=16)
    if key := mapped_key(pixels):
        digest.update(key.encode())
    else:
        for part in pixels.split(1024):
            digest.update(part.contiguous().numpy().data)
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
    streamed = mapped_key(pixels) is not None
    if not (whole(path) if streamed else path.is_file()):
        device = next(autoencoder.parameters()).device
        config, factor = autoencoder.config, autoencoder.factor
        shape = (len(pixels), config.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
        # In full precision whoever asks: in one process the first step does, inside its mixed precision.
        full = torch.autocast(device.type, enabled=False)
        with full, growing(path, {"mean": shape, "std": shape}) as append:
            for part in tqdm(pixels.split(64), desc=f"encoding {name} images", unit="batch", leave=False):
                posterior = autoencoder.encode(to_float(part).to(device))
                append["mean"](posterior.mean)
                append["std"](posterior.std)
    tensors, _ = map_weights(path, key) if streamed else load_weights(path)
    return tensors["mean"], tensors["std"]
