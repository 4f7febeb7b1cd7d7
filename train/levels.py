"""How well a diffusion model denoises at fixed noise levels: a measure that can be compared between runs.

The value of a training loss depends on what the network predicts, how the loss is weighted and which levels
are drawn; the error of x0's estimate at a given level does not. `ldm-train diffusion` logs it at every
validation, `ldm-train ablate` asks finished models for it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.seeding import generator

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # about evenly spaced in ln sigma over the levels that models train on
BATCH = 64  # images at once


def denoising_errors(
    denoise: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, dict[str, Any]]],
    levels: Sequence[float],
    seed: int,
) -> dict[float, float]:
    """By level sigma: mean over images of (1 + 1 / sigma^2) |x0 - denoise(x0 + sigma eps)|^2, a value of x0.

    The factor makes it the squared error of the velocity v (Salimans & Ho 2022), about 1 at any level for a
    model that knows no more than that latents have mean 0 and variance 1, and whatever the network predicts.
    denoise: as `ldm.diffusion.denoiser.Denoiser`. batches: (latents (B, C, h, w), what conditions them);
    their noise eps is a function of (seed, number of the batch, number of the level). Without levels no batch
    is asked for.
    """
    errors: dict[float, list[Tensor]] = {level: [] for level in levels}
    for part, (x0, conditioning) in enumerate(batches if errors else ()):
        for number, (level, found) in enumerate(errors.items()):
            rng = generator(seed, "levels", part, number)
            noise = torch.randn(x0.shape, generator=rng).to(x0.device)
            estimate = denoise(x0 + level * noise, level, **conditioning)
            found.append((1 + level**-2) * (estimate - x0).square().mean(dim=(1, 2, 3)).cpu())
    return {level: float(torch.cat(found).mean()) for level, found in errors.items() if found}


def within(levels: Sequence[float], schedule: Schedule) -> tuple[float, ...]:
    """Those of `levels` that a model of this schedule is trained at, in their order, each once."""
    low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    return tuple(dict.fromkeys(level for level in levels if low <= level <= high))
