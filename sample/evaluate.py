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
`--real DIR --fake DIR` does the same for two folders of pictures, without a model. `--control MODEL` asks
whether hints are followed (`control_study.py`). `--lora` and `--embedding` ask all this of an adapted model.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.device import pick_device
from ldm.distributed import is_first, rows_of_all, share, together
from ldm.metrics import psnr
from ldm.weights.folder import weights_hash
from ldm.weights.io import write_atomically
from sample.cli import load_pipeline
from sample.embeddings import use
from sample.features import NAMES, Extractor, find_pictures, load_extractor, read_all
from sample.images import grid, output_folder, read_rgb, save_new, to_pil
from sample.loras import call
from sample.metrics import require_enough, require_torchmetrics
from sample.pipeline import Pipeline
from sample.questions import Picture, Question, concepts_of, pick, read_images, read_rows
from sample.recording import versions
from sample.sets import Pictures, Reference, sheet
from sample.sets import table as table_of_sets

SHOWN = 64  # pictures in the grid, each beside its nearest neighbour


@dataclass(frozen=True)
class Study:
    """All that is known before anything is made. taught, heldout: rows that the model learned from, and that
    no model did. adapters: what to record of LoRAs and embeddings."""

    pipe: Pipeline
    rows: list[Picture]
    side: int
    taught: list[int]
    heldout: list[int]
    questions: list[Question]
    extractor: Extractor | None
    adapters: dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Measure, print a short table, write `evaluation.json` and a grid.

    Several processes (`ldm/distributed.py`) share out the pictures to be made and those to be looked at, in
    the batches that one would form; the rest is rank 0's.
    """
    if args.real is not None or args.fake is not None:
        return compare_folders(args)
    if args.control is not None:
        from sample.control_study import run as follow_hints  # which is built on this module

        return follow_hints(args)
    with together():
        study = prepare(args)
        real = Real(Path(args.data).expanduser(), study.rows, study.side)
        psnrs = autoencoder_psnr(study.pipe, real.of(study.heldout, share(len(study.heldout), 16)))
    psnrs, reference = rows_of_all(psnrs), None
    if study.extractor is not None:
        taught, heldout = (real.pictures(rows) for rows in (study.taught, study.heldout))
        reference = Reference.of(study.extractor, taught, heldout, args.batch, study.pipe.device)
    results: dict[str, Any] = {"heldout_psnr": float(psnrs.mean()) if len(psnrs) else None}
    shown: list[Image.Image] = []
    sheets: dict[str, Image.Image] = {}
    for question in study.questions:
        if not question.queries:
            results[question.name] = None
            continue
        samples, features = answers(study, question, reference, args)
        if not is_first():
            continue
        fidelity, nearest = question.measure(real.images, samples)
        results[question.name] = asdict(fidelity)
        for picture, neighbour in zip(samples[:SHOWN], real.images[nearest[:SHOWN]], strict=True):
            shown += to_pil(torch.stack([picture, neighbour]))
        if reference is not None:
            if question is study.questions[0]:
                results["distribution"] = reference.compare(features, args.seed)
            repeated, pairs = reference.repeated(features)
            results.setdefault("memorisation", {})[question.name] = asdict(repeated)
            near = [torch.stack([samples[i], real.images[study.taught[j]]]) for i, j in pairs]
            sheets[f"nearest-{question.name}-"] = sheet([(a, b) for a, b in map(to_pil, near)])
    if is_first():
        sheets = {"evaluation-": grid(shown, columns=16), **sheets}
        write(args, results, settings_of(args, study, reference), reference, sheets)


def prepare(args: argparse.Namespace) -> Study:
    """Check the options, load the model, read the set's table: all that can fail before any work is done."""
    if args.features is None and args.feature_size is not None:
        raise ValueError(f"--feature-size needs --features {NAMES}")
    if args.data is None:
        raise ValueError("evaluate needs --data DIR, or --real DIR and --fake DIR")
    for option in ("captions", "batch"):
        if (value := vars(args)[option]) < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    output_folder(args.out)
    rows = read_rows(Path(args.data).expanduser())
    pipe = load_pipeline(args)
    adapters = adapt(pipe, args, [row.text for row in rows])
    side = pipe.latent_shape()[1] * pipe.autoencoder.factor
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
    extractor = None
    if args.features is not None:
        require_torchmetrics()
        require_enough(len(taught), len(questions[0].queries))
        extractor = load_extractor(args.features, args.feature_size, pipe.device)
    return Study(pipe, rows, side, taught, heldout, questions, extractor, adapters)


def adapt(pipe: Pipeline, args: argparse.Namespace, captions: list[str]) -> dict[str, Any]:
    """Give the model the LoRAs and words of the options; returns what to record, a hash of each.

    Raises FileNotFoundError, and ValueError as `loras.call` and `embeddings.use`.
    """
    words, called = use([pipe], args, captions), call(pipe, args, [("", "")])
    called.start([""])  # all captions the same
    return {**words, **called.record}


class Real:
    """The real pictures of a set: rank 0 holds them all, any other process reads those of its share."""

    def __init__(self, folder: Path, rows: list[Picture], side: int) -> None:
        self.folder, self.rows, self.side = folder, rows, side
        self.images = read_images(folder, rows if is_first() else [], side)

    def of(self, rows: list[int], numbers: range) -> Tensor:
        """Images (N, 3, side, side) of `rows[i]` for each of the numbers i."""
        wanted = rows[numbers.start : numbers.stop]
        if is_first():
            return self.images[wanted]
        return read_images(self.folder, [self.rows[i] for i in wanted], self.side)

    def pictures(self, rows: list[int]) -> Pictures:
        return Pictures(len(rows), lambda numbers: to_pil(self.of(rows, numbers)))


def answers(
    study: Study, question: Question, reference: Reference | None, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """A picture a query (N, 3, H, W), and their features where there is a reference; in rank 0."""
    with together():
        made = sample(study.pipe, [study.rows[i].text for i in question.queries], args)
        own = to_pil(made) if reference is not None else []
    features = torch.empty(0)
    if reference is not None:
        features, _ = reference.look(Pictures(len(question.queries), lambda numbers: own))
    return rows_of_all(made), features


def settings_of(args: argparse.Namespace, study: Study, reference: Reference | None) -> dict[str, Any]:
    checkpoint = study.pipe.checkpoint
    return {
        **asked(args),
        "sampler": "ddim",
        "device": study.pipe.device.type,
        "size": [study.side, study.side],
        "weights": weights_hash(checkpoint.files) if checkpoint else "",
        "versions": versions(),
        **study.adapters,
        **(reference.about() if reference is not None else {}),
    }


def write(
    args: argparse.Namespace,
    results: dict[str, Any],
    settings: dict[str, Any],
    reference: Reference | None,
    sheets: dict[str, Image.Image],
) -> None:
    """`evaluation.json` and the sheets, each under its name's first free number; all is told."""
    out = output_folder(args.out)
    write_results(out / "evaluation.json", results, settings)
    print(table(results))
    if reference is not None:
        print(f"seen by {reference.extractor.title}\n{table_of_sets(results)}")
    print(out / "evaluation.json")
    for name, pictures in sheets.items():
        print(save_new(pictures, out, name, 4, settings))


def compare_folders(args: argparse.Namespace) -> None:
    """`--real DIR --fake DIR`: the two as sets, without a model; writes `comparison.json` and a sheet of the
    nearest pairs."""
    with together():
        if args.real is None or args.fake is None or args.data is not None:
            raise ValueError("--real DIR and --fake DIR go together, and without --data")
        if args.lora or args.embedding:
            raise ValueError("--lora and --embedding change a model; --real and --fake compare without one")
        if args.features is None:
            raise ValueError(f"--real and --fake need --features {NAMES}")
        if args.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {args.batch}")
        out = output_folder(args.out)
        real, fake = (find_pictures(Path(folder).expanduser()) for folder in (args.real, args.fake))
        require_torchmetrics()
        require_enough(len(real), len(fake))
        device = pick_device(args.device)
        extractor = load_extractor(args.features, args.feature_size, device)
    reference = Reference.of(extractor, files(real), None, args.batch, device)
    features, sha256 = reference.look(files(fake))
    if not is_first():
        return
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


def files(paths: list[Path]) -> Pictures:
    return Pictures(len(paths), lambda numbers: read_all(paths[numbers.start : numbers.stop]))


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The options, without those of other ways to evaluate that were not given."""
    left_out = {"command", "debug", "out"}
    if args.control is None:
        left_out |= {"control", "annotator", "hints"}
    others = ("real", "fake", "features", "feature_size", "lora", "embedding")
    left_out |= {key for key in others if vars(args)[key] is None}
    return {key: value for key, value in vars(args).items() if key not in left_out}


def write_results(path: Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    write_atomically(path, json.dumps({"results": results, "settings": settings}, indent=2) + "\n")


def sample(pipe: Pipeline, prompts: list[str], args: argparse.Namespace) -> Tensor:
    """This process's share of a picture a prompt (N, 3, H, W), with a progress bar.

    Noise is a function of (seed, number) and the batches are those of one process: so are the pictures, to
    the bit where both compute with equally many threads.
    """
    own = share(len(prompts), args.batch)
    if not own:
        return torch.empty(0, 3, *[side * pipe.autoencoder.factor for side in pipe.latent_shape()[1:]])
    with tqdm(unit="step", disable=None if is_first() else True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipe.txt2img(
            prompts[own.start : own.stop],
            first=own.start,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            batch=args.batch,
            progress=progress,
        )


@torch.no_grad()
def autoencoder_psnr(pipe: Pipeline, images: Tensor) -> Tensor:
    """PSNR in dB of encoding each picture to the posterior's mode and decoding."""
    weight = pipe.autoencoder.post_quant_conv.weight
    values = [torch.empty(0)]
    for part in images.split(16) if len(images) else ():
        decoded = pipe.autoencoder.decode(pipe.autoencoder.encode(part.to(weight)).mode())
        values.append(psnr(part, decoded.cpu()))
    return torch.cat(values)


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
