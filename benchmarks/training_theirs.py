"""The other side of `training.py`: a step of diffusers' training script, on copies of our task's weights."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.device import DTYPES
from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.diffusers_config import scheduler_json
from sample.images import read_rgb
from train.data import ImageFolder
from train.tasks.diffusion import DiffusionTask


class Script:
    """A step of a training script after diffusers' examples/text_to_image, with --use_ema, and with a text
    tower that is trained too (as in its train_dreambooth.py), since ours is."""

    def __init__(self, task: DiffusionTask, end_to_end: bool, compiled: bool = False) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        from benchmarks import theirs

        run = task.config.run
        self.clip, self.dtype = run.clip, DTYPES[run.precision]
        self.unet, self.text_encoder = theirs.unet(task.unet), deepcopy(task.text_encoder)
        assert self.text_encoder is not None
        self.network = torch.compile(self.unet) if compiled else self.unet
        self.scheduler = DDPMScheduler.from_config(scheduler_json(task.config.diffusion))
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=run.lr, betas=(run.betas[0], run.betas[1]), weight_decay=run.weight_decay
        )
        self.lr_scheduler = get_scheduler("constant_with_warmup", self.optimizer, num_warmup_steps=run.warmup)
        self.ema = EMAModel(self.parameters, decay=run.ema_decay)
        self.batches = pictures(task, self.dtype) if end_to_end else latents(task)

    def __call__(self) -> float:
        z, ids = next(self.batches)
        noise = torch.randn_like(z)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),))
        noised = self.scheduler.add_noise(z, noise, t)
        target = self.scheduler.get_velocity(z, noise, t)
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            context = self.text_encoder(ids)  # type: ignore[misc]
            prediction = self.network(noised, t, encoder_hidden_states=context, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return loss.item()


def latents(task: DiffusionTask) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of latents, encoded before, and token ids."""
    data, batch = task.data, task.config.run.batch
    assert isinstance(data.mean, Tensor)
    assert isinstance(data.std, Tensor)
    assert data.ids is not None
    while True:
        for rows in torch.randperm(len(data)).split(batch):
            z = data.mean[rows] + data.std[rows] * torch.randn_like(data.mean[rows])
            yield task.autoencoder.scale_latents(z), data.ids[rows]


def pictures(task: DiffusionTask, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches read from their files and encoded when they are asked for, by diffusers' AutoencoderKL."""
    from benchmarks import theirs

    assert isinstance(task.autoencoder, AutoencoderKL)
    assert task.read is not None
    vae = theirs.autoencoder(task.autoencoder).requires_grad_(False).to(dtype)
    entries, size = ImageFolder(task.config.data, "train").entries, task.config.data.size

    def read(index: int) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.array(read_rgb(entries[index].path, size))).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1, task.read([entries[index].caption])[0]  # type: ignore[misc]

    loader: DataLoader[Any] = DataLoader(_Set(len(entries), read), task.config.run.batch, shuffle=True)

    def encoded() -> Iterator[tuple[Tensor, Tensor]]:  # apart: the networks above are made at once
        while True:
            for images, ids in loader:
                z = vae.encode(images.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
                yield z, ids

    return encoded()


class _Set(torch.utils.data.Dataset[Any]):
    def __init__(self, length: int, read: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.length, self.read = length, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(index)
