"""Samplers against k-diffusion's, in float64 on a mixture of Gaussians, whose denoiser is not linear.

Only `sampling.py` of the package is loaded, by file: importing the package itself needs a web client and more.
"""

import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest
import torch
from problems import draw, last, mixture
from torch.testing import assert_close

from ldm.diffusion.grids import make_grid
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DiffusionConfig, Schedule


def load_sampling():
    """k_diffusion/sampling.py with only what it needs of its package."""
    spec = importlib.machinery.PathFinder.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed", allow_module_level=True)
    for name in ("scipy", "torchdiffeq", "torchsde"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, which k-diffusion needs, is not installed", allow_module_level=True)
    package, utils = types.ModuleType("k_only"), types.ModuleType("k_only.utils")
    package.__path__ = list(spec.submodule_search_locations)
    utils.append_dims = lambda x, count: x.reshape(x.shape + (1,) * (count - x.ndim))
    package.utils = utils
    sys.modules |= {"k_only": package, "k_only.utils": utils}
    return importlib.import_module("k_only.sampling")


theirs = load_sampling()


def case(grid, steps):
    sigmas = make_grid(Schedule(DiffusionConfig()), grid, steps)
    return sigmas, float(sigmas[0]) * draw(2, 4, 4, 4)


ROWS = [
    ("euler", {}, "euler", {}),
    ("heun", {}, "heun", {}),
    ("dpm2", {}, "dpm_2", {}),
    *(("lms", {"order": order}, "lms", {"order": order}) for order in (1, 2, 3, 4)),
    ("dpmpp_2m", {}, "dpmpp_2m", {}),
    ("euler_ancestral", {}, "euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4}, "euler_ancestral", {"eta": 0.4}),
    ("dpm2_ancestral", {}, "dpm_2_ancestral", {}),
    ("dpm2_ancestral", {"eta": 0.0}, "dpm_2_ancestral", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", {}, "dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_2m_sde", {}, "dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"variant": "heun"}, "dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {}, "dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m_sde", {"eta": 0.0}),
]


@pytest.mark.parametrize(("name", "ours", "their_name", "their_options"), ROWS)
@pytest.mark.parametrize(
    ("grid", "steps"), [("karras", 1), ("karras", 2), ("uniform", 3), ("karras", 20), ("uniform", 27)]
)
def test_equal(name, ours, their_name, their_options, grid, steps):
    sigmas, x = case(grid, steps)
    noises, calls = draw(steps, *x.shape, seed=5), iter(range(steps))
    options = dict(their_options)
    if SAMPLERS[name].stochastic:
        options["noise_sampler"] = lambda sigma, sigma_next: noises[next(calls)]
    if steps == 1 and their_name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        expected = mixture(x, float(sigmas[0]))  # theirs breaks on one step
    else:
        expected = getattr(theirs, f"sample_{their_name}")(mixture, x, sigmas, disable=True, **options)
    step = last(SAMPLERS[name].function(mixture, x, sigmas, noise=lambda i: noises[i], **ours))
    assert_close(step.x, expected, rtol=1e-10, atol=1e-10)
    assert steps < 20 or expected.std() > 0.5  # of the mixture: about 1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_dpmpp_sde_equals_theirs(steps, eta):
    """Two draws a step: theirs of a path from sigma to the middle, and to sigma_next; ours of its two parts."""
    sigmas, x = case("karras", steps)
    parts, calls = draw(steps, 2, *x.shape, seed=5), iter(range(2 * steps))

    def their_noise(sigma, sigma_next):
        i, whole = divmod(next(calls), 2)
        start, middle, end = sigmas[i], (sigmas[i] * sigmas[i + 1]).sqrt(), sigmas[i + 1]
        path = (start - middle).sqrt() * parts[i, 0]
        return (path + (middle - end).sqrt() * parts[i, 1]) / (start - end).sqrt() if whole else parts[i, 0]

    expected = theirs.sample_dpmpp_sde(mixture, x, sigmas, disable=True, eta=eta, noise_sampler=their_noise)
    run = SAMPLERS["dpmpp_sde"].function(mixture, x, sigmas, noise=lambda i, part=0: parts[i, part], eta=eta)
    assert_close(last(run).x, expected, rtol=1e-10, atol=1e-10)


def test_their_brownian_tree_has_the_law_of_our_parts():
    """Noise of a step and of its first half correlate by the root of the half's length, in both."""
    sigma, middle, sigma_next = 4.0, 2.0, 1.0
    tree = theirs.BrownianTreeNoiseSampler(torch.zeros(20_000), 0.1, 10.0, seed=1)
    first, whole = tree(sigma, middle), tree(sigma, sigma_next)
    assert_close(
        (first * whole).mean().item(), math.sqrt((sigma - middle) / (sigma - sigma_next)), rtol=0, atol=0.03
    )
    assert_close(first.std().item(), 1.0, rtol=0, atol=0.03)
    assert_close(whole.std().item(), 1.0, rtol=0, atol=0.03)


@pytest.mark.parametrize(("name", "their_name"), [("edm_euler", "euler"), ("edm_heun", "heun")])
@pytest.mark.parametrize("churn", [0.0, 5.0, 40.0])
def test_churn_equals_theirs(name, their_name, churn):
    sigmas, x = case("karras", 20)
    torch.manual_seed(0)
    noises = [torch.randn_like(x) for _ in range(20)]  # as they draw it, used or not
    torch.manual_seed(0)
    names = {"s_churn": churn, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}
    expected = getattr(theirs, f"sample_{their_name}")(mixture, x, sigmas, disable=True, **names)
    options = {"churn": churn, "churn_min": 0.1, "churn_max": 10.0, "noise_scale": 1.003}
    step = last(SAMPLERS[name].function(mixture, x, sigmas, noise=lambda i: noises[i], **options))
    assert_close(step.x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_grids(steps):
    """Theirs in float32."""
    schedule = Schedule(DiffusionConfig())
    low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    for name, expected in {
        "karras": theirs.get_sigmas_karras(steps, low, high),
        "karras:5": theirs.get_sigmas_karras(steps, low, high, rho=5.0),
        "exponential": theirs.get_sigmas_exponential(steps, low, high),
        "polyexponential:0.7": theirs.get_sigmas_polyexponential(steps, low, high, rho=0.7),
    }.items():
        assert_close(make_grid(schedule, name, steps).float(), expected, rtol=2e-5, atol=0)
