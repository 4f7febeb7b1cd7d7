"""How near two sets of pictures are, and how near samples come to what was trained on: `ldm-sample evaluate`.

Of features of the pictures (`features.py`), with real r and fake f:

    Fréchet distance    |m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)), means m and covariances C
                        (Heusel et al. 2017, arXiv:1706.08500, eq. 6), by torchmetrics
    KID                 squared maximum mean discrepancy under k(x, y) = (x y / s + 1)^3, unbiased, mean and
                        deviation over subsets (Binkowski et al. 2018, arXiv:1801.01401), by torchmetrics.
                        There s = D, as Inception's features have squares of about 1; those of others are
                        much larger and would leave the cube of a few outliers, so s is the mean of |r|^2
    precision, recall   shares of each set in the other's neighbourhoods (`ldm.metrics.precision_recall`)
    memorisation        distance of each sample to the nearest training picture, beside that of real pictures
                        that were never trained on

Every number has company: `ideal` is the same measure for as many real pictures in the samples' place, drawn
from the reference, which loses them. A perfect model would score so; the finite number of pictures does.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.metrics import distances, precision_recall
from ldm.seeding import derive, generator

FEWEST = 10  # pictures of a set that anything is said about
NEIGHBOURS = 3  # k of precision and recall, as in the paper
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID; a subset is at most half of the smaller set
ASKED = 1000  # training pictures whose nearest others are looked for, where nothing is held out
ALONE: dict[str, Any] = {"sync_on_compute": False}  # torchmetrics would wait for the other processes
QUANTILE = 0.05  # of the real pictures' distances: below it a sample counts as suspiciously near


def require_torchmetrics() -> None:
    """Raises ModuleNotFoundError; does not import it, which takes seconds."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise ModuleNotFoundError(
            "Fréchet distance and KID need the package torchmetrics: pip install torchmetrics (or the extra "
            "[eval] of this package)"
        )


def require_enough(real: int, fake: int) -> None:
    """Raises ValueError for sets of too few pictures for these measures."""
    for count, what in ((real, "real pictures"), (fake, "samples")):
        if count < FEWEST:
            raise ValueError(f"{count} {what} are too few to compare two sets; at least {FEWEST}")


class Ready(nn.Module):
    """The extractor that torchmetrics is given: the features were made before, once for all measures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return features


def frechet_distance(real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"]) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(measured(FrechetInceptionDistance(Ready(real.shape[1]), **ALONE), real, fake))


def kid(
    real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"], subset_size: int, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets, a function of the seed."""
    size = max(float(real.double().square().sum(dim=1).mean()), 1e-12)
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps the features
        metric = KernelInceptionDistance(
            Ready(real.shape[1]), subsets=SUBSETS, subset_size=subset_size, gamma=1 / size, **ALONE
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "kid"))
        mean, deviation = measured(metric, real, fake)
    return float(mean), float(deviation)


def measured(metric: Any, real: Tensor, fake: Tensor) -> Any:
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute()


@dataclass(frozen=True)
class Comparison:
    """Two sets of features side by side. `counts` are real and fake; `kid_subset` pictures were in each of
    KID's subsets, `pr_count` of each set were compared for precision and recall (equally many of both)."""

    counts: tuple[int, int]
    frechet: float
    kid: float
    kid_std: float
    kid_subset: int
    precision: float
    recall: float
    pr_count: int


def compare(real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"], seed: int = 0) -> Comparison:
    """All measures of two sets. Raises ValueError for too few pictures."""
    require_enough(len(real), len(fake))
    count = min(len(real), len(fake))
    subset = min(SUBSET_SIZE, count // 2)
    mean, deviation = kid(real, fake, subset, seed)
    alike = [draw(len(features), count, seed) for features in (real, fake)]
    precision, recall = precision_recall(real[alike[0]], fake[alike[1]], NEIGHBOURS)
    return Comparison(
        counts=(len(real), len(fake)),
        frechet=frechet_distance(real, fake),
        kid=mean,
        kid_std=deviation,
        kid_subset=subset,
        precision=precision,
        recall=recall,
        pr_count=count,
    )


def draw(count: int, wanted: int, seed: int) -> Tensor:
    """Places of `wanted` of `count`, at random and without replacement, all in their order if so many."""
    if wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, "compared"))[:wanted]


def ideal(real: Float[Tensor, "N D"], count: int, seed: int = 0) -> Comparison | None:
    """`count` real pictures in the place of samples, against the rest; None where the rest would be fewer."""
    if len(real) < 2 * count:
        return None
    order = torch.randperm(len(real), generator=generator(seed, "ideal"))
    return compare(real[order[count:]], real[order[:count]], seed)


def doubts(width: int, real: int, fake: int) -> list[str]:
    """What is wrong with the numbers of so few pictures, in sentences; nothing where there are enough."""
    few = min(real, fake)
    if few <= width:
        which = "samples" if fake <= real else "real pictures"
        return [
            f"{few} {which} for {width} features: their covariance is singular and the Fréchet distance far "
            f"too large; at least {width + 1}, better {10 * width}; compare it with the ideal alone, or see "
            "KID, which has no such bias"
        ]
    if few < 10 * width:
        return [
            f"{few} pictures for {width} features: the Fréchet distance is too large by a bias that falls "
            "with their number; compare equal numbers alone"
        ]
    return []


# --- memorisation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest training picture (root mean square over the features): the smallest, the
    middle one, and the share at most as far as `Memorisation.threshold`."""

    count: int
    smallest: float
    median: float
    below: float


@dataclass(frozen=True)
class Memorisation:
    """Do samples come nearer to training pictures than real ones that were not trained on?

    threshold: the 5 % quantile of the real pictures' distances, so that about 5 % of them are `below` by
    construction, and many more of the samples of a model that repeats its training set. against: what the
    real pictures are.
    """

    samples: Nearness
    real: Nearness
    threshold: float
    against: str


def memorisation(
    samples: Float[Tensor, "M D"],
    train: Float[Tensor, "N D"],
    heldout: Float[Tensor, "K D"] | None = None,
) -> tuple[Memorisation, Float[Tensor, " M"], list[int]]:
    """The measure; distance and place of the training picture nearest to each sample.

    Without `heldout` pictures (or with fewer than ten) the real ones are those of the training set, up to a
    thousand of them, each measured against the others.
    """
    nearest = distances(samples, train).min(dim=1)
    if heldout is not None and len(heldout) >= FEWEST:
        real, against = distances(heldout, train).amin(dim=1), "held-out pictures"
    else:
        some = train[draw(len(train), ASKED, 0)]
        real = distances(some, train).kthvalue(2, dim=1).values  # the nearest is itself
        against = "training pictures, each against the others"
    threshold = float(real.quantile(QUANTILE))

    def of(values: Tensor) -> Nearness:
        below = float((values <= threshold).double().mean())
        return Nearness(len(values), float(values.min()), float(values.median()), below)

    found = Memorisation(of(nearest.values), of(real), threshold, against)
    return found, nearest.values, nearest.indices.tolist()
