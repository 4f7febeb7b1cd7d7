"""`ldm-sample evaluate`: do pictures show what their prompts say, and what does the autoencoder lose?

A prompt names a concept and a style. Its picture and all training pictures are averaged down to 16x16 RGB;
the picture is right where the nearest training picture shows the concept. Three numbers:

    training captions    some training captions, nearest among the training pictures of the caption's style
    held-out pairs       every concept-style pair kept from training (split "heldout_pair"), nearest among the
                         training pictures of the other styles: nothing there was ever called by this caption
    autoencoder PSNR     of the pictures kept from training (split "heldout_image"), from the posterior's mode

A model that was trained on some concepts alone (`data.concepts` of its training config) is asked for those;
what its pictures are compared with stays the whole set. Beside the share of right ones stand `chance`, that
of a picture drawn blindly, and `real`, that of the caption's real picture: what the measure would say of a
model that is never wrong.

With `--features` the samples of training captions are also compared with the training pictures as two sets
(`metrics.py`), and all samples with the training pictures nearest to them. A faithful model draws what a
training caption says, and that is near to its training picture: of repetition speak the held-out pairs.
`--real DIR --fake DIR` does the same for two folders of pictures, without a model.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.config import find_config
from ldm.device import pick_device
from ldm.metrics import distances, nearest_ranks, psnr, thumbnails
from ldm.seeding import generator
from ldm.weights.folder import weights_hash
from ldm.weights.io import write_atomically
from sample.cli import load_pipeline
from sample.features import find_pictures, load_extractor, read_all
from sample.images import grid, output_folder, read_rgb, save_new, to_pil, to_tensor
from sample.metrics import require_enough, require_torchmetrics
from sample.pipeline import Pipeline
from sample.recording import versions
from sample.sets import Reference, sheet
from sample.sets import table as table_of_sets

COLUMNS = ("file_name", "text", "concept", "style", "split")
SHOWN = 64  # pictures in the grid, each beside its nearest neighbour


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


def run(args: argparse.Namespace) -> None:
    """Measure, print a short table, write `evaluation.json` and a grid."""
    if args.real is not None or args.fake is not None:
        return compare_folders(args)
    if args.features is None and args.feature_size is not None:
        raise ValueError("--feature-size needs --features hed, hed:FILE or thumbnails")
    if args.data is None:
        raise ValueError("evaluate needs --data DIR, or --real DIR and --fake DIR")
    if args.captions < 1:
        raise ValueError(f"--captions must be at least 1, got {args.captions}")
    out = output_folder(args.out)
    rows = read_rows(Path(args.data).expanduser())
    pipe = load_pipeline(args)
    side = pipe.latent_shape()[1] * pipe.autoencoder.factor
    images = read_images(Path(args.data).expanduser(), rows, side)
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    known = concepts_of(args.config) or {row.concept for row in rows}
    taught = [i for i in train if rows[i].concept in known]
    if not taught:
        raise ValueError(f"{args.config}: {args.data} has no training picture of its data.concepts")
    pairs = [i for i, row in enumerate(rows) if row.split == "heldout_pair" and row.concept in known]
    heldout = [i for i, row in enumerate(rows) if row.split == "heldout_image"]
    questions = [
        Question.ask("train", rows, train, pick(taught, args.captions, args.seed), same_style=True),
        Question.ask("heldout_pair", rows, train, pairs, same_style=False),
    ]
    reference = None
    if args.features is not None:
        require_torchmetrics()
        require_enough(len(taught), len(questions[0].queries))
        extractor = load_extractor(args.features, args.feature_size, pipe.device)
        others = to_pil(images[heldout]) if heldout else []
        reference = Reference.of(extractor, to_pil(images[taught]), others, args.batch, pipe.device)
    results: dict[str, Any] = {"heldout_psnr": autoencoder_psnr(pipe, images[heldout]) if heldout else None}
    shown: list[Image.Image] = []
    nearest_pairs: dict[str, Image.Image] = {}
    for question in questions:
        if not question.queries:
            results[question.name] = None
            continue
        samples = sample(pipe, [rows[i].text for i in question.queries], args)
        fidelity, nearest = question.measure(images, samples)
        results[question.name] = asdict(fidelity)
        for picture, neighbour in zip(samples[:SHOWN], images[nearest[:SHOWN]], strict=True):
            shown += to_pil(torch.stack([picture, neighbour]))
        if reference is not None:
            pictures = to_pil(samples)
            features, _ = reference.look(pictures)
            if question is questions[0]:
                results["distribution"] = reference.compare(features, args.seed)
            repeated, pairs_found = reference.repeated(features)
            results.setdefault("memorisation", {})[question.name] = asdict(repeated)
            nearest_pairs[question.name] = sheet(
                [(pictures[i], to_pil(images[taught[j]][None])[0]) for i, j in pairs_found]
            )
    settings = {
        **asked(args),
        "sampler": "ddim",
        "device": pipe.device.type,
        "size": [side, side],
        "weights": weights_hash(pipe.checkpoint.files) if pipe.checkpoint else "",
        "versions": versions(),
        **(reference.about() if reference is not None else {}),
    }
    write_results(out / "evaluation.json", results, settings)
    print(table(results))
    if reference is not None:
        print(f"seen by {reference.extractor.title}\n{table_of_sets(results)}")
    print(out / "evaluation.json")
    print(save_new(grid(shown, columns=16), out, "evaluation-", 4, settings))
    for name, pairs_sheet in nearest_pairs.items():
        print(save_new(pairs_sheet, out, f"nearest-{name}-", 4, settings))


def compare_folders(args: argparse.Namespace) -> None:
    """`--real DIR --fake DIR`: the two as sets, without a model; writes `comparison.json` and a sheet of the
    nearest pairs."""
    if args.real is None or args.fake is None or args.data is not None:
        raise ValueError("--real DIR and --fake DIR go together, and without --data")
    if args.features is None:
        raise ValueError("--real and --fake need --features hed, hed:FILE or thumbnails")
    out = output_folder(args.out)
    real, fake = (find_pictures(Path(folder).expanduser()) for folder in (args.real, args.fake))
    require_torchmetrics()
    require_enough(len(real), len(fake))
    device = pick_device(args.device)
    extractor = load_extractor(args.features, args.feature_size, device)
    reference = Reference.of(extractor, read_all(real), (), args.batch, device)
    features, sha256 = reference.look(read_all(fake))
    repeated, pairs = reference.repeated(features)
    results = {
        "distribution": reference.compare(features, args.seed),
        "memorisation": {"samples": asdict(repeated)},
    }
    own = ("real", "fake", "features", "feature_size", "seed", "batch")
    settings = {
        **{key: vars(args)[key] for key in own if vars(args)[key] is not None},
        "device": device.type,
        "versions": versions(),
        **reference.about(),
        "samples": {"count": len(fake), "sha256": sha256},
    }
    write_results(out / "comparison.json", results, settings)
    print(f"seen by {extractor.title}\n{table_of_sets(results)}")
    print(out / "comparison.json")
    told = sheet([(read_rgb(fake[i]), read_rgb(real[j])) for i, j in pairs])
    print(save_new(told, out, "nearest-", 4, settings))


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The options, without those of other ways to evaluate that were not given."""
    left_out = {"command", "debug", "out"}
    left_out |= {key for key in ("real", "fake", "features", "feature_size") if vars(args)[key] is None}
    return {key: value for key, value in vars(args).items() if key not in left_out}


def write_results(path: Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    write_atomically(path, json.dumps({"results": results, "settings": settings}, indent=2) + "\n")


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
    return torch.stack([to_tensor(read_rgb(folder / row.file_name, side)) for row in rows])


def pick(rows: list[int], count: int, seed: int) -> list[int]:
    """`count` of `rows` (all, where there are fewer), drawn without replacement, in a random order."""
    order = torch.randperm(len(rows), generator=generator(seed, "captions"))
    return [rows[i] for i in order[:count].tolist()]


def sample(pipe: Pipeline, prompts: list[str], args: argparse.Namespace) -> Tensor:
    """A picture a prompt (N, 3, H, W), with a progress bar."""
    with tqdm(unit="step", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipe.txt2img(
            prompts,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            batch=args.batch,
            progress=progress,
        )


@torch.no_grad()
def autoencoder_psnr(pipe: Pipeline, images: Tensor) -> float:
    """PSNR in dB of encoding to the posterior's mode and decoding, mean over the pictures."""
    weight = pipe.autoencoder.post_quant_conv.weight
    values = []
    for part in images.split(16):
        decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(part.to(weight)).mode())
        values.append(psnr(part, decoded.cpu()))
    return float(torch.cat(values).mean())


def table(results: dict[str, Any]) -> str:
    """The results for reading."""
    lines = [f"{'':20}{'right':>8}{'chance':>9}{'real':>8}{'pictures':>10}{'median rank':>13}"]
    for name, title in (("train", "training captions"), ("heldout_pair", "held-out pairs")):
        if (value := results[name]) is None:
            lines.append(f"{title:20}{'none in the data':>24}")
            continue
        lines.append(
            f"{title:20}{value['right']:8.1%}{value['chance']:9.2%}{value['real']:8.1%}"
            f"{value['count']:10}{value['median_rank']:13.0f}"
        )
    value = results["heldout_psnr"]
    lines.append(f"{'autoencoder PSNR':20}{'none in the data' if value is None else f'{value:.2f} dB':>24}")
    return "\n".join(lines)
