"""Samples against a reference set of real pictures, seen through one extractor: the part of `evaluate` that
does not ask what a picture shows. Measures: `metrics.py`; features: `features.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sample.features import Extractor
from sample.images import grid, square_rgb
from sample.metrics import Memorisation, compare, doubts, ideal, memorisation

PAIRS = 32  # in the sheet of the nearest ones
LARGEST = 256  # pixels of a picture in it


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
        pictures: Iterable[Image.Image],
        heldout: Iterable[Image.Image] = (),
        batch: int = 16,
        device: torch.device | str = "cpu",
    ) -> "Reference":
        """Looks at every picture once; `heldout` are real ones that no model was trained on."""
        with tqdm(desc="reference", unit="picture", disable=None) as bar:
            features, sha256 = extractor.look(pictures, batch, device, bar.update)
            other, _ = extractor.look(heldout, batch, device, bar.update)
        return cls(extractor, features, sha256, other if len(other) else None, batch, device)

    def look(self, pictures: Iterable[Image.Image]) -> tuple[Float[Tensor, "M D"], str]:
        """Features and hash of samples."""
        with tqdm(desc="samples", unit="picture", disable=None) as bar:
            return self.extractor.look(pictures, self.batch, self.device, bar.update)

    def about(self) -> dict[str, Any]:
        """What the numbers were measured with and against, for the result file."""
        extractor = self.extractor
        return {
            "features": {"name": extractor.name, "what": extractor.title, "width": extractor.width},
            "resize": f"Pillow bicubic, 8 bit, antialiased, to {extractor.side}x{extractor.side}",
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
