"""What `ldm-sample evaluate` asks of pictures: does the nearest training picture show the concept?

A set is a folder with `metadata.jsonl`; every row names a file, its caption, concept, style and split.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.config import find_config
from ldm.metrics import distances, nearest_ranks, thumbnails
from ldm.seeding import generator
from sample.images import read_rgb, to_tensor

COLUMNS = ("file_name", "text", "concept", "style", "split")


@dataclass(frozen=True)
class Picture:
    """A row of metadata.jsonl."""

    file_name: str
    text: str
    concept: str
    style: str
    split: str


@dataclass(frozen=True)
class Fidelity:
    """How many pictures show what their prompt says; `right`, `chance` and `real` are shares in 0..1.

    median_rank: how many training pictures, in the middle case, are nearer than the nearest right one.
    """

    count: int
    right: float
    chance: float
    real: float
    median_rank: float


@dataclass(frozen=True)
class Question:
    """Rows to sample, `queries`; and which of the training rows are right, which allowed as the nearest."""

    name: str
    train: list[int]
    queries: list[int]
    right: Tensor  # (queries, train), bool: shows the concept
    allowed: Tensor  # likewise: has the style, or one of the others

    @classmethod
    def ask(
        cls, name: str, rows: list[Picture], train: list[int], queries: list[int], *, same_style: bool
    ) -> "Question":
        """Raises ValueError for a row whose concept none of the allowed training rows shows."""
        shape = (len(queries), len(train))
        right = torch.tensor([rows[i].concept == rows[q].concept for q in queries for i in train])
        style = torch.tensor([rows[i].style == rows[q].style for q in queries for i in train])
        right, allowed = right.reshape(shape).bool(), style.reshape(shape).bool() == same_style
        for query, answerable in zip(queries, (right & allowed).any(dim=1), strict=True):
            if not answerable:
                raise ValueError(
                    f"{rows[query].file_name}: no training picture of its concept {rows[query].concept!r} "
                    "to compare with"
                )
        return cls(name, train, queries, right, allowed)

    def measure(self, images: Tensor, samples: Tensor) -> tuple[Fidelity, list[int]]:
        """How many of `samples`, one a query, are right; and the row nearest to each. images: of all rows."""
        candidates = thumbnails(images[self.train])
        distance = distances(thumbnails(samples), candidates)
        ranks = nearest_ranks(distance, self.allowed, self.right)
        real = nearest_ranks(
            distances(thumbnails(images[self.queries]), candidates), self.allowed, self.right
        )
        fidelity = Fidelity(
            count=len(self.queries),
            right=float((ranks == 0).float().mean()),
            chance=float(((self.right & self.allowed).sum(dim=1) / self.allowed.sum(dim=1)).mean()),
            real=float((real == 0).float().mean()),
            median_rank=float(ranks.float().median()),
        )
        nearest = distance.masked_fill(~self.allowed, torch.inf).argmin(dim=1)
        return fidelity, [self.train[i] for i in nearest.tolist()]


def concepts_of(config: str | None) -> set[str]:
    """`data.concepts` of a training config; empty where it names none, or where there is no config."""
    if config is None:
        return set()
    concepts = OmegaConf.select(OmegaConf.load(find_config(config)), "data.concepts")
    return set(concepts or ())


def read_rows(folder: Path) -> list[Picture]:
    """The rows of `folder/metadata.jsonl`. Raises FileNotFoundError, or ValueError with the line's number."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --data is a folder that `ldm-train prepare` made")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [row[column] for column in COLUMNS]
        except (ValueError, KeyError, TypeError):
            values = []
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{path} line {number}: expected a JSON object with the texts {', '.join(COLUMNS)}"
            )
        rows.append(Picture(*values))
    if not any(row.split == "train" for row in rows):
        raise ValueError(f'{path}: no row has the split "train"')
    return rows


def read_images(folder: Path, rows: list[Picture], side: int) -> Tensor:
    """The pictures (N, 3, side, side) in [-1, 1], cut to their centre squares as in training."""
    images = [to_tensor(read_rgb(folder / row.file_name, side)) for row in rows]
    return torch.stack(images) if images else torch.empty(0, 3, side, side)


def pick(rows: list[int], count: int, seed: int) -> list[int]:
    """`count` of `rows` (all, where there are fewer), drawn without replacement, in a random order."""
    order = torch.randperm(len(rows), generator=generator(seed, "captions"))
    return [rows[i] for i in order[:count].tolist()]
