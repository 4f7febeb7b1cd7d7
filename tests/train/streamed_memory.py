"""Reads a set of pictures and encodes it under a limit of memory: `streamed_memory.py FOLDER MIB true|false`.

Started by `test_streamed_runs.py` as a process of its own, whose limit (of memory to write to) begins after imports.
The last word is `data.stream`.
"""

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from train.cache import cached_moments
from train.data import DataConfig, batch_indices, load_images, to_float
from train.streaming import joined


class Means(nn.Conv2d):
    """In the place of an autoencoder: means of 2 x 2 pixels, so that the moments are as large as the pixels."""

    config, factor = SimpleNamespace(latent_channels=3), 2

    def encode(self, images):
        mean = avg_pool2d(images, 2)
        return SimpleNamespace(mean=mean, std=mean.abs())


def main(folder, mebibytes, stream):
    torch.set_num_threads(1)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + mebibytes * 2**20,) * 2)
    config = DataConfig(str(folder), size=64, heldout=0.0, cache=str(folder / "cache"), stream=stream)
    pixels = load_images(config, "train").pixels
    mean, std = cached_moments(folder / "cache", "train", pixels, Means(1, 1, 1))
    assert torch.equal(joined(mean.split(64), pixels)[-1], mean[-1])
    for step in range(20):
        rows = batch_indices(len(pixels), 16, 0, step)
        assert torch.equal(Means.encode(None, to_float(pixels[rows])).std, std[rows])
    print("bytes", pixels.numel() + 4 * mean.numel() + 4 * std.numel())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "true")
