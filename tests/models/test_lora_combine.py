"""Sums, lower ranks and differences of LoRAs against the whole matrices."""

import pytest
import torch

from ldm.models.lora_combine import averaged, concatenated, extracted, kept, reduced
from ldm.models.lora_math import Factors, delta

SHAPES = {"linear": (7, 5), "conv": (7, 5, 3, 3), "point": (7, 5, 1, 1)}


def random(rank: int, alpha: float, seed: int) -> dict[str, Factors]:
    torch.manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2)), alpha
        )
        for name, shape in SHAPES.items()
    }


def test_concatenation_is_the_exact_sum() -> None:
    a, b = random(2, 1.0, 0), random(3, 6.0, 1)
    del b["point"]
    both = concatenated([(a, 0.7), (b, -0.4)])
    for name in SHAPES:
        expected = 0.7 * delta(a[name]) + (-0.4 * delta(b[name]) if name in b else 0)
        torch.testing.assert_close(delta(both[name]), expected)
        assert both[name].rank == (5 if name in b else 2)


def test_a_lower_rank_is_the_nearest() -> None:
    """As far from the whole as the singular values that are left out, and nothing is nearer."""
    weights = random(4, 2.0, 0)
    for name, factors in reduced(weights, rank=2).items():
        whole = delta(weights[name]).flatten(1)
        values = torch.linalg.svdvals(whole)
        distance = (delta(factors).flatten(1) - whole).norm()
        torch.testing.assert_close(distance, values[2:].norm())
        assert factors.rank == 2 and factors.scale == 1
        torch.testing.assert_close(factors.up.norm(), factors.down.norm())  # balanced
    for name, factors in reduced(weights, rank=9).items():  # no more than there is
        assert factors.rank == 4
        torch.testing.assert_close(delta(factors), delta(weights[name]))


def test_the_energy_decides_the_rank() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])  # energies 4, 1, 1
    assert [kept(values, None, energy) for energy in (0.5, 4 / 6, 0.7, 5 / 6, 0.9, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert kept(values, 2, 1.0) == 2
    assert kept(torch.tensor([1.0, 1e-9]), 2, None) == 1  # rounding is no rank


def test_the_communitys_merge_is_no_sum() -> None:
    """The formula, evaluated; with one LoRA it carries the square of the ratio."""
    a, b = random(2, 1.0, 0), random(2, 4.0, 1)
    merged = averaged([(a, 0.5), (b, -0.25)])
    for name in SHAPES:
        s = [0.5, -0.25 * 4**0.5]
        up = abs(s[0]) * a[name].up + abs(s[1]) * b[name].up
        down = s[0] * a[name].down + s[1] * b[name].down
        torch.testing.assert_close(delta(merged[name]), delta(Factors(down, up, 1.0)))
        exact = 0.5 * delta(a[name]) - 0.25 * delta(b[name])
        assert (delta(merged[name]) - exact).norm() > 0.1 * exact.norm()
    alone = averaged([(a, 0.5)])
    torch.testing.assert_close(delta(alone["conv"]), 0.25 * delta(a["conv"]))


def test_a_difference_of_low_rank_is_extracted_exactly() -> None:
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    lora = random(2, 3.0, 1)
    tuned = {name: weight + delta(lora[name]) for name, weight in base.items()}
    tuned["linear"] = base["linear"]  # not touched: not in the file
    found = extracted(base, tuned, rank=4, energy=0.9999999)
    assert list(found) == ["conv", "point"]
    for name, factors in found.items():
        assert factors.rank == 2
        torch.testing.assert_close(delta(factors), delta(lora[name]), atol=1e-5, rtol=1e-5)


def test_half_precision_is_widened() -> None:
    half = {name: Factors(f.down.half(), f.up.half(), f.alpha) for name, f in random(3, 2.0, 0).items()}
    for combined in (concatenated([(half, 1.0)]), reduced(half, rank=3), averaged([(half, 1.0)])):
        for name, factors in combined.items():
            assert factors.down.dtype == torch.float32
            torch.testing.assert_close(delta(factors), delta(half[name]), atol=1e-5, rtol=1e-5)


def test_errors() -> None:
    a, base = random(2, 1.0, 0), {"x": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="linear has different shapes: 7x5, 8x5"):
        concatenated([(a, 1.0), ({"linear": Factors(torch.ones(1, 5), torch.ones(8, 1), 1.0)}, 1.0)])
    with pytest.raises(ValueError, match=r"different ranks \(2, 3\) cannot be averaged; sum them"):
        averaged([(a, 1.0), (random(3, 1.0, 0), 1.0)])
    with pytest.raises(ValueError, match="say how much is kept"):
        reduced(a)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        reduced(a, rank=0)
    with pytest.raises(ValueError, match=r"energy kept must be above 0 and at most 1, got 1.5"):
        reduced(a, energy=1.5)
    with pytest.raises(ValueError, match="do not differ"):
        extracted(base, base, rank=1)
    with pytest.raises(ValueError, match=r"x is \(2, 2\) in the base, \(3, 2\)"):
        extracted(base, {"x": torch.ones(3, 2)}, rank=1)
    zero = {"x": Factors(torch.ones(1, 2), torch.zeros(2, 1), 1.0)}
    assert reduced(zero, rank=1) == {}
