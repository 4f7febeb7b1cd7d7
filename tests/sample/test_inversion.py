"""Inversion and the way back: exact in the limit of steps, and of iterations, on data with a known denoiser."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import make_grid
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.metrics import psnr
from sample.inversion import invert_and_return
from sample.pipeline import Pipeline

MEAN, STD = 0.7, 0.5


def exact(x: Tensor, sigma: Any) -> Tensor:
    """Of Gaussian data N(MEAN, STD^2)."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


@pytest.fixture
def latents() -> Tensor:
    return MEAN + STD * torch.randn(3, 4, 8, 8, dtype=torch.float64)


def grid(steps: int) -> Tensor:
    return make_grid(Schedule(DiffusionConfig()), "karras", steps)


def test_the_error_falls_with_steps(latents: Tensor) -> None:
    errors = [float(invert_and_return(exact, latents, grid(steps)).rmse.max()) for steps in (5, 20, 80, 320)]
    assert all(after < 0.5 * before for before, after in pairwise(errors))
    assert errors[-1] < 0.01


def test_the_error_falls_with_iterations_to_nothing(latents: Tensor) -> None:
    errors = [
        float(invert_and_return(exact, latents, grid(20), iterations).rmse.max())
        for iterations in (1, 2, 4, 8, 64)
    ]
    assert all(after < 0.5 * before for before, after in pairwise(errors))
    assert errors[-1] < 1e-9


def test_the_noise_is_that_of_the_exact_path(latents: Tensor) -> None:
    """x(sigma) = m + (x0 - m) sqrt(s^2 + sigma^2) / s."""
    sigmas = grid(640)
    found = invert_and_return(exact, latents, sigmas, 3)
    expected = MEAN + (latents - MEAN) * (STD**2 + float(sigmas[0]) ** 2) ** 0.5 / STD
    assert float((found.noise - expected).norm() / (expected - MEAN).norm()) < 0.03


def test_what_is_told(latents: Tensor) -> None:
    seen: list[tuple[int, int]] = []

    def decode(z: Tensor) -> Tensor:
        return z[:, :3] / 4

    found = invert_and_return(exact, latents, grid(5), 2, decode=decode, progress=lambda *at: seen.append(at))
    assert seen == [(i, 10) for i in range(1, 11)]
    assert_close(found.rmse, (found.back - latents).square().mean(dim=(1, 2, 3)).sqrt())
    assert found.psnr is not None
    assert_close(found.psnr, psnr(decode(latents), decode(found.back)))
    assert invert_and_return(exact, latents, grid(5)).psnr is None


def test_another_way_back(latents: Tensor) -> None:
    """An edit: back to data of another mean, from the same noise."""
    found = invert_and_return(exact, latents, grid(200), 8, back=lambda x, sigma: exact(x - 2, sigma) + 2)
    assert float(found.back.mean() - latents.mean()) == pytest.approx(2, abs=0.1)
    assert found.rmse.min() > 1.5


def test_of_a_network(pipe: Pipeline) -> None:
    """Float32, through the UNet with a prompt; each picture as it is alone."""
    cond = pipe.conditioning(["a cat", "a dog"])
    denoiser = Denoiser(pipe.unet, pipe.schedule)
    latents = torch.randn(2, 4, 8, 8)
    errors = []
    for iterations in (1, 6):
        found = invert_and_return(
            lambda x, sigma: denoiser(x, sigma, **cond), latents, grid(12), iterations, decode=pipe.decode
        )
        errors.append(float(found.rmse.max()))
    assert errors[1] < 0.5 * errors[0]
    alone = invert_and_return(
        lambda x, sigma: denoiser(x, sigma, context=cond["context"][1:]), latents[1:], grid(12), 6
    )
    assert_close(alone.back, found.back[1:], rtol=0, atol=1e-3)  # after 84 evaluations, by way of sigma 14


def test_what_cannot_be_inverted(latents: Tensor) -> None:
    with pytest.raises(ValueError, match="fall to 0 from a finite one, got inf to 0"):
        invert_and_return(exact, latents, torch.tensor([torch.inf, 1.0, 0.0]))
    with pytest.raises(ValueError, match="got 2 to 1"):
        invert_and_return(exact, latents, torch.tensor([2.0, 1.0]))
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        invert_and_return(exact, latents, grid(3), 0)
    with pytest.raises(ValueError, match="not finite after step 1 of 3 on the way to noise"):
        invert_and_return(lambda x, sigma: x * torch.nan, latents, grid(3))
    with pytest.raises(ValueError, match="not finite after step 1 of 3 on the way back"):
        invert_and_return(exact, latents, grid(3), back=lambda x, sigma: x * torch.nan)
