"""Samples against a reference set of real pictures, seen through one extractor: the part of `evaluate` that
does not ask what a picture shows. Measures: `metrics.py`; features: `features.py`.

Several processes look at a share of the pictures each; the features are rank 0's, and so are the measures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import collect, is_first, rows_of_all, share, together
from sample.features import Extractor, digest, digest_of_all
from sample.images import grid, square_rgb
from sample.metrics import Memorisation, compare, doubts, ideal, memorisation

PAIRS = 32  # in the sheet of the nearest ones
LARGEST = 256  # pixels of a picture in it


@dataclass(frozen=True)
class Pictures:
    """A set of `count` pictures; `of` reads those of some numbers: each process asks for its share alone."""

    count: int
    of: Callable[[range], Iterable[Image.Image]]


@dataclass(frozen=True)
class Reference:
    """The real pictures as features; `sha256` is a hash of their pixels, whatever their names and order."""

    extractor: Extractor
    features: Float[Tensor, "N D"]
    sha256: str
    heldout: Float[Tensor, "K D"] | None = None
    batch: int = 16
    device: torch.device | str = "cpu"

    @classmethod
    def of(
        cls,
        extractor: Extractor,
        pictures: Pictures,
        heldout: Pictures | None = None,
        batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> "Reference":
        """Looks at every picture once; `heldout` are real ones that no model was trained on."""
        features, sha256 = look(extractor, pictures, batch, device, "reference")
        other = look(extractor, heldout, batch, device, "held out")[0] if heldout else None
        return cls(extractor, features, sha256, other, batch, device)

    def look(self, pictures: Pictures) -> tuple[Float[Tensor, "M D"], str]:
        """Features and hash of samples."""
        return look(self.extractor, pictures, self.batch, self.device, "samples")

    def about(self) -> dict[str, Any]:
        """What the numbers were measured with and against, for the result file."""
        extractor = self.extractor
        return {
            "features": {"name": extractor.name, "what": extractor.title, "width": extractor.width},
            "resize": extractor.resize,
            "reference": {"count": len(self.features), "sha256": self.sha256},
        }

    def compare(self, samples: Float[Tensor, "M D"], seed: int) -> dict[str, Any]:
        """Of the samples and of as many real pictures in their place, with what is doubtful in it."""
        best = ideal(self.features, len(samples), seed)
        return {
            "samples": asdict(compare(self.features, samples, seed)),
            "ideal": asdict(best) if best else None,
            "doubts": doubts(self.extractor.width, len(self.features), len(samples)),
        }

    def repeated(self, samples: Float[Tensor, "M D"]) -> tuple[Memorisation, list[tuple[int, int]]]:
        """How near they come to the reference; (sample, reference picture) of the nearest pairs, in order."""
        found, distance, places = memorisation(samples, self.features, self.heldout)
        order = distance.argsort(stable=True).tolist()
        return found, [(i, places[i]) for i in order[:PAIRS]]


def look(
    extractor: Extractor, pictures: Pictures, batch: int, device: torch.device | str, what: str
) -> tuple[Float[Tensor, "N D"], str]:
    """Features and hash of all pictures, in rank 0; in the others of none. In the batches of one process."""
    digests: list[bytes] = []

    def noted(some: Iterable[Image.Image]) -> Iterator[Image.Image]:
        for picture in some:
            digests.append(digest(picture))
            yield picture

    with together(), tqdm(desc=what, unit="picture", disable=None if is_first() else True) as bar:
        own = noted(pictures.of(share(pictures.count, batch)))
        features, _ = extractor.look(own, batch, device, bar.update)
    return rows_of_all(features), digest_of_all(collect(digests))


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Samples, each with its nearest picture at its right, nearest pair first; four pairs a row."""
    side = min(LARGEST, *(max(picture.size) for pair in pairs for picture in pair))
    return grid([square_rgb(picture, side) for pair in pairs for picture in pair], columns=8)


def table(results: dict[str, Any]) -> str:
    """`distribution` and `memorisation` of the results, for reading."""
    compared, lines = results["distribution"], []
    samples, best = compared["samples"], compared["ideal"]
    lines.append(f"{'':20}{'samples':>12}{'ideal':>12}")
    for key, title in TITLES.items():
        ours, theirs = (f"{row[key]:.4g}" if row else "-" for row in (samples, best))
        lines.append(f"{title:20}{ours:>12}{theirs:>12}")
    lines.append(f"{'pictures':20}{samples['counts'][1]:12}{best['counts'][1] if best else '-':>12}")
    lines += [f"  {doubt}" for doubt in compared["doubts"]]
    lines.append(f"{'nearest reference':20}{'median':>12}{'smallest':>12}{'suspicious':>12}")
    for name, row in results["memorisation"].items():
        for which, title in (("samples", name), ("real", "  real ones")):
            value = row[which]
            lines.append(f"{title:20}{value['median']:12.4g}{value['smallest']:12.4g}{value['below']:12.1%}")
        lines.append(f"  suspicious: at most {row['threshold']:.4g}, as 5 % of {row['against']}")
    return "\n".join(lines)


TITLES = {
    "frechet": "Fréchet distance",
    "kid": "KID",
    "kid_std": "  its deviation",
    "precision": "precision",
    "recall": "recall",
}
