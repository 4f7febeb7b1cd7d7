"""Means over seeds and how sure they are: confidence intervals of Student's t, also of paired differences.

Arms of an ablation share their seeds, and with a seed the initialisation, the order of the data and the
noise. What the seed does to both arms cancels in the difference of a pair, so the interval of the mean
difference is much the narrower one. Used by `ablate.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t distribution with 1, 2, ..., 30 degrees of freedom
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
MOST = len(T_QUANTILES) + 1  # values, of which the interval of the mean is known


@dataclass(frozen=True)
class Estimate:
    """The mean of `count` values; with 95 % confidence the true one is within `half` of it.

    half is None where a single value says nothing of that.
    """

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of n values, and t(n - 1) s / sqrt(n), s being their standard deviation (over n - 1).

    Raises ValueError for no value and for more than `MOST`.
    """
    count = len(values)
    if not 1 <= count <= MOST:
        raise ValueError(f"an interval needs 1 to {MOST} values, got {count}")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, T_QUANTILES[count - 2] * math.sqrt(variance / count), count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Mean of `values - baseline` over the seeds that both have; None where there is no such seed."""
    both = [seed for seed in values if seed in baseline]
    return estimate([values[seed] - baseline[seed] for seed in both]) if both else None
