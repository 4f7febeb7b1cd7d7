"""Training noise: each kind's formula, its variance, and that it depends on its own key alone."""

import math

import pytest
import torch
from torch.testing import assert_close

from ldm.diffusion.noising import NoiseConfig, offset_noise, perturbation, pyramid_noise, training_noise


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def white(*shape, seed=5):
    return torch.randn(*shape, generator=rng(seed))


def test_nothing_is_switched_on_by_default():
    noise = white(2, 4, 8, 8)
    made, extra = training_noise(noise, NoiseConfig(), 0, 1)
    assert made is noise and extra is None


def test_each_is_a_function_of_its_key_alone():
    """The same when drawn again, another for another step, unchanged by the kinds beside it."""
    noise = white(2, 4, 8, 8)
    config = NoiseConfig(offset=0.2, pyramid=0.5, perturbation=0.1)
    made, extra = training_noise(noise, config, 3, 7, 0)
    again, extra_again = training_noise(noise, config, 3, 7, 0)
    assert torch.equal(made, again) and torch.equal(extra, extra_again)
    other, extra_other = training_noise(noise, config, 3, 8, 0)
    assert not torch.equal(made, other) and not torch.equal(extra, extra_other)
    alone, nothing = training_noise(noise, NoiseConfig(pyramid=0.5), 3, 7, 0)
    assert nothing is None
    moved = training_noise(noise, NoiseConfig(offset=0.2), 3, 7, 0)[0] - noise
    assert_close(made - alone, moved, rtol=0, atol=1e-6)
    assert torch.equal(extra, training_noise(noise, NoiseConfig(perturbation=0.1), 3, 7, 0)[1])


def test_offset():
    noise = white(500, 4, 8, 6)
    made = offset_noise(noise, 0.3, rng())
    moved = made - noise
    assert_close(moved, moved[..., :1, :1].expand_as(moved), rtol=0, atol=1e-6)  # one number a channel
    assert_close(
        moved[..., 0, 0], 0.3 * torch.randn(500, 4, 1, 1, generator=rng())[..., 0, 0], rtol=0, atol=1e-6
    )
    assert_close(made.var().item(), 1 + 0.3**2, rtol=0.03, atol=0)


def test_pyramid_by_hand():
    """2 x 2 has one coarser octave, of side 1, and 1 x 1 none."""
    noise = white(3, 4, 2, 2)
    coarse = torch.randn(3, 4, 1, 1, generator=rng())
    made = pyramid_noise(noise, 0.6, rng())
    assert_close(made, (noise + 0.6 * coarse) / math.sqrt(1 + 0.36), rtol=0, atol=1e-6)
    assert torch.equal(pyramid_noise(noise, 0.0, rng()), noise)
    assert torch.equal(pyramid_noise(noise[..., :1, :1], 0.6, rng()), noise[..., :1, :1])


def test_pyramid_interpolates_as_torch_does():
    """4 x 4 has octaves of sides 2 and 1; between the places of 2 lie 1/4 and 3/4."""
    noise, draws = white(3, 4, 4, 4), rng()
    two, one = torch.randn(3, 4, 2, 2, generator=draws), torch.randn(3, 4, 1, 1, generator=draws)
    up = torch.nn.functional.interpolate(two, size=(4, 4), mode="bilinear")
    side = torch.tensor([1, 10 / 16, 10 / 16, 1])  # squared weights 1; 9/16 + 1/16
    variance = 1 + 0.25 * torch.outer(side, side) + 0.0625
    expected = (noise + 0.5 * up + 0.25 * one) / variance.sqrt()
    assert_close(pyramid_noise(noise, 0.5, rng()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sides", [(8, 8), (7, 12)])
def test_pyramid_has_unit_variance_at_every_place_and_more_of_it_in_the_mean(sides):
    made = pyramid_noise(white(4000, 2, *sides), 0.7, rng())
    assert_close(made.var(dim=(0, 1)), torch.ones(sides), rtol=0, atol=0.08)
    assert_close(made.mean().item(), 0.0, rtol=0, atol=0.05)
    assert made.mean(dim=(2, 3)).var() > 5 / math.prod(sides)  # white noise: 1 / the number of places


def test_pyramid_leaves_samples_apart():
    """The divisor is not measured: another sample's noise changes nothing."""
    noise = white(2, 4, 8, 8)
    made = pyramid_noise(noise, 0.5, rng())
    noise[1] *= 100
    assert torch.equal(pyramid_noise(noise, 0.5, rng())[0], made[0])


def test_perturbation():
    noise = white(100, 4, 8, 8)
    extra = perturbation(noise, 0.1, rng())
    assert extra.shape == noise.shape
    assert_close(extra.std().item(), 0.1, rtol=0.02, atol=0)
    assert abs((extra * noise).mean()) < 2e-3


@pytest.mark.parametrize(("values", "message"), [
    ({"offset": -0.1}, "noise.offset must be a number of at least 0, got -0.1"),
    ({"perturbation": math.inf}, "noise.perturbation must be a number of at least 0, got inf"),
    ({"pyramid": 1.0}, r"noise.pyramid must be in \[0, 1\), got 1.0"),
    ({"pyramid": math.nan}, r"noise.pyramid must be in \[0, 1\), got nan"),
])  # fmt: skip
def test_illegal_config(values, message):
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**values)
