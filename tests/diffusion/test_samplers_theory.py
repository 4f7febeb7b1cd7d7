"""Samplers on problems with known answers: orders of convergence, and the law of what the stochastic ones draw."""

import math

import numpy as np
import pytest
import torch
from problems import MEAN, STD, draw, exact_denoiser, last, seeded
from torch.testing import assert_close

from ldm.diffusion.grids import make_grid
from ldm.diffusion.inversion import ddim_invert
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig, Schedule

TOP, BOTTOM = 5.0, 0.1  # levels of the problem


def smooth(steps):
    """Equal steps of ln sigma from TOP to BOTTOM."""
    return torch.linspace(math.log(TOP), math.log(BOTTOM), steps + 1, dtype=torch.float64).exp()


def graded(steps):
    """`smooth`, its first step cut into a tiny one and doubling ones, so that a first-order start costs nothing.

    After the last come three more levels, where some samplers lower their order.
    """
    levels = smooth(steps)
    ratio = math.log(levels[0] / levels[1])
    cuts = 2.0 ** -torch.arange(18, 0, -1, dtype=torch.float64)  # shares of the first step
    start = (math.log(TOP) - ratio * cuts).exp()
    return torch.cat(
        [levels[:1], start, levels[1:], BOTTOM * torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)]
    )


def error_at_bottom(name, options, sigmas):
    """Largest error, of the exact path of Gaussian data, of the step that ends at BOTTOM."""
    x = MEAN + TOP * draw(1, 1, 4, 4)
    for step in SAMPLERS[name].function(exact_denoiser, x, sigmas, **options):
        if abs(step.sigma - BOTTOM) < 1e-12:
            exact = MEAN + (x - MEAN) * math.sqrt((STD**2 + BOTTOM**2) / (STD**2 + TOP**2))
            return (step.x - exact).abs().max().item()
    raise AssertionError("no step ends at BOTTOM")


@pytest.mark.parametrize(("name", "options", "grid", "order"), [
    ("euler", {}, smooth, 1),
    ("heun", {}, smooth, 2),
    ("edm_heun", {"churn": 0.0}, smooth, 2),
    ("edm_euler", {"churn": 0.0}, smooth, 1),
    ("dpm2", {}, smooth, 2),
    ("dpm2_ancestral", {"eta": 0.0}, smooth, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, smooth, 2),
    ("dpmpp_sde", {"eta": 0.0}, smooth, 2),
    ("plms", {}, smooth, 2),
    ("pndm", {}, smooth, 2),
    ("dpmpp_2m", {}, graded, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, graded, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "variant": "heun"}, graded, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, graded, 2),  # for the half that its docstring tells of
    *(("lms", {"order": k}, graded, k) for k in (1, 2, 3, 4)),
    *(("deis", {"order": k}, graded, k) for k in (1, 2, 3)),
    *(("unipc", {"order": k, "variant": v}, graded, k + 1) for k in (1, 2, 3) for v in ("bh1", "bh2")),
])  # fmt: skip
def test_order(name, options, grid, order):
    counts = (40, 80, 160)
    errors = [error_at_bottom(name, options, grid(steps)) for steps in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 0.5, (slope, errors)


# ---- laws ----

CENTRE = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
COUNT = 20_000


def correlated(x, sigma):
    """The exact denoiser of N(CENTRE, COVARIANCE) data, x (B, 2)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
    return CENTRE + (x - CENTRE) @ gain.T


def consistency(x, sigma):
    """Where the deterministic path from x ends: what a distilled model answers."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    root = vectors @ torch.diag((values / (values + sigma**2)).sqrt()) @ vectors.T
    return CENTRE + (x - CENTRE) @ root.T


def sample_law(name, denoise, steps, **options):
    """Mean and covariance of samples from the exact start."""
    sigmas = make_grid(Schedule(DiffusionConfig()), "karras" if name not in ("lcm", "tcd") else "lcm", steps)
    start = torch.linalg.cholesky(COVARIANCE + sigmas[0] ** 2 * torch.eye(2, dtype=torch.float64))
    x = CENTRE + draw(COUNT, 2) @ start.T
    x = last(SAMPLERS[name].function(denoise, x, sigmas, noise=seeded(x), **options)).x
    return x.mean(0), x.T.cov()


@pytest.mark.parametrize(("name", "steps", "options"), [
    ("ddpm", 250, {}),
    ("ddim", 120, {"eta": 1.0}),
    ("ddim", 60, {"eta": 0.5}),
    ("euler_ancestral", 250, {}),
    ("dpm2_ancestral", 80, {}),
    ("dpmpp_2s_ancestral", 80, {}),
    ("dpmpp_sde", 80, {}),
    ("dpmpp_2m_sde", 60, {}),
    ("dpmpp_2m_sde", 60, {"variant": "heun"}),
    ("dpmpp_2m_sde", 60, {"eta": 0.5}),
    ("dpmpp_3m_sde", 60, {}),
    ("edm_euler", 250, {"noise_scale": 1.0, "churn": 20.0}),
    ("edm_heun", 60, {"noise_scale": 1.0}),
])  # fmt: skip
def test_law_of_gaussian_data(name, steps, options):
    """Four standard errors of 20000 samples, and 3 % for finitely many steps."""
    mean, covariance = sample_law(name, correlated, steps, **options)
    variance = COVARIANCE.diagonal()
    assert ((mean - CENTRE).abs() < 4 * (variance / COUNT).sqrt() + 0.01).all(), mean
    spread = ((variance[:, None] * variance + COVARIANCE**2) / COUNT).sqrt()  # of a sample covariance
    assert ((covariance - COVARIANCE).abs() < 4 * spread + 0.03 * COVARIANCE).all(), covariance


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(("name", "options"), [("lcm", {}), ("tcd", {"gamma": 1.0})])
def test_law_of_a_distilled_model(name, options, steps):
    """A model that jumps along the exact path gives the exact law in any number of steps."""
    mean, covariance = sample_law(name, consistency, steps, **options)
    assert ((mean - CENTRE).abs() < 4 * (COVARIANCE.diagonal() / COUNT).sqrt()).all()
    assert_close(covariance, COVARIANCE, rtol=0.05, atol=0)


# ---- inversion ----


def test_inversion_comes_back():
    """Down again by DDIM; each further iteration solves the step better, and many solve it exactly."""
    sigmas = make_grid(Schedule(DiffusionConfig()), "compvis", 20)
    x = MEAN + STD * draw(2, 4, 4, 4)

    def reconstruction(iterations):
        top = last(ddim_invert(exact_denoiser, x, sigmas.flip(0), iterations=iterations)).x
        return (last(SAMPLERS["ddim"].function(exact_denoiser, top, sigmas)).x - x).abs().max().item()

    errors = [reconstruction(iterations) for iterations in (1, 2, 4)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert reconstruction(60) < 1e-10


def test_inversion_of_a_picture_starts_at_level_0():
    sigmas = make_grid(Schedule(DiffusionConfig()), "karras", 10).flip(0)
    x = draw(1, 4, 4, 4)
    steps = list(ddim_invert(exact_denoiser, x, sigmas))
    assert [step.index for step in steps] == list(range(10))
    assert steps[-1].sigma == sigmas[-1] and steps[-1].x.isfinite().all()


def test_inversion_refuses():
    x, up = draw(1, 4, 4, 4), torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        next(ddim_invert(exact_denoiser, x, up, iterations=0))
    with pytest.raises(ValueError, match="sigmas must rise; flip the grid"):
        next(ddim_invert(exact_denoiser, x, up.flip(0)))
