"""`ldm-sample evaluate --control MODEL`: do pictures follow a ControlNet's hints, and still their prompts?

Hints are made of pictures that no model learned from (split "heldout_image") and asked for with the captions
of these; then the hints of the samples are compared with them (`control_error.py`), at control scales 0, 0.5
and 1, and beside them the error of the pictures themselves through the autoencoder. Prompt fidelity is that
of `evaluate`, of the same training captions, without and with the hints of the captions' own pictures.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ldm.distributed import is_first, rows_of_all, share, together
from ldm.models.controlled import Control
from ldm.models.controlnet import ControlNet
from ldm.weights.controlnet import load_controlnet
from ldm.weights.folder import PART_FILES, weights_hash
from ldm.weights.io import read_header
from ldm.weights.reading import open_checkpoint
from sample.annotators import parse_annotator
from sample.control_error import control_errors, hints_of, reconstructed
from sample.evaluate import Real, Study, prepare, settings_of, write_results
from sample.images import grid, output_folder, save_new, to_pil
from sample.model import find_model
from sample.questions import pick

FILE = PART_FILES["control"][0]
SCALES = (0.0, 0.5, 1.0)
SHOWN = 16  # held-out hints in the sheet


@dataclass(frozen=True)
class Steered:
    """A ControlNet with the annotator that made the hints it learned from."""

    controlnet: ControlNet
    annotator: str
    weights: str


def run(args: argparse.Namespace) -> None:
    """Measure, print a short table, write `control.json` and a sheet: hint, then a picture by each scale.

    Several processes share out the pictures, as in `evaluate.run`.
    """
    with together():
        if args.hints < 1:
            raise ValueError(f"--hints must be at least 1, got {args.hints}")
        study = prepare(args)
        steered = load(args, study)
        real = Real(Path(args.data).expanduser(), study.rows, study.side)
        rows = pick(study.heldout, args.hints, args.seed)
        if not rows:
            raise ValueError(f'{args.data}: no row has the split "heldout_image", whose hints are asked for')
        own = share(len(rows), args.batch)
        images = real.of(rows, own)
        hints = hints_of(images, steered.annotator)
        errors = {
            "reconstructed": control_errors(hints, reconstructed(study.pipe, images), steered.annotator)
        }
        sheet, captions = [hints.float() / 127.5 - 1], [study.rows[i].text for i in rows]
        for scale in tqdm(SCALES, desc="scales", disable=None if is_first() else True, leave=False):
            made = sample(study, steered, captions, hints, own, scale, args)
            errors[f"{scale:g}"] = control_errors(hints, made, steered.annotator)
            sheet.append(made)
    results: dict[str, Any] = {
        "count": len(rows),
        "control": means(errors),
        "train": fidelity(study, steered, real, args),
    }
    shown = rows_of_all(torch.stack(sheet, dim=1))[:SHOWN]  # (N, 1 + scales, 3, H, W)
    if is_first():
        out = output_folder(args.out)
        settings = {
            **settings_of(args, study, None),
            "annotator": steered.annotator,
            "controlnet": steered.weights,
        }
        write_results(out / "control.json", results, settings)
        print(table(results))
        print(out / "control.json")
        pictures = to_pil(rearrange(shown, "n k c h w -> (n k) c h w"))
        print(save_new(grid(pictures, columns=4 * len(sheet)), out, "control-", 4, settings))


def load(args: argparse.Namespace, study: Study) -> Steered:
    """Raises ValueError or FileNotFoundError for a ControlNet that is missing or made for another model, and
    where nothing says which annotator its hints are from."""
    path = find_model(args.control, FILE, "ControlNet")
    source = open_checkpoint(path).require("control").source.path
    controlnet = load_controlnet(path, study.pipe.device, study.pipe.dtype, allow_nan=args.allow_nan)
    controlnet.config.check_fits(study.pipe.unet.config, study.pipe.autoencoder.factor)
    annotator = args.annotator or annotator_of(source)
    if annotator is None:
        raise ValueError(f"{source} does not say what its hints are made by; give --annotator, such as canny")
    parse_annotator(annotator)
    return Steered(controlnet, annotator, weights_hash([source]))


def annotator_of(path: Path) -> str | None:
    """The first annotator that a ControlNet of ours was trained with, from the header of its file."""
    about = read_header(path)[1].get("hints") if path.suffix == ".safetensors" else None
    names = about.get("annotators") if isinstance(about, dict) else None
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def sample(
    study: Study,
    steered: Steered,
    prompts: Sequence[str],
    hints: Tensor,
    own: range,
    scale: float,
    args: argparse.Namespace,
) -> Tensor:
    """This process's share `own` of a picture a prompt; hints (N, 3, H, W), uint8, are those of the share."""
    if not own:
        return torch.zeros(hints.shape)
    controls = (Control(steered.controlnet, hints.float() / 255, scale),)
    return study.pipe.txt2img(
        list(prompts[own.start : own.stop]),
        controls=controls,
        first=own.start,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        batch=args.batch,
    )


def means(errors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Over the pictures of all processes; in rank 0."""
    return {
        scale: {name: float(rows_of_all(values).mean()) for name, values in each.items()}
        for scale, each in errors.items()
    }


def fidelity(study: Study, steered: Steered, real: Real, args: argparse.Namespace) -> dict[str, Any]:
    """Prompt fidelity of the training captions by scale, with the hints of their own pictures; in rank 0."""
    question, found = study.questions[0], {}
    with together():
        own = share(len(question.queries), args.batch)
        hints = hints_of(real.of(question.queries, own), steered.annotator)
    for scale in (SCALES[0], SCALES[-1]):
        with together():
            captions = [study.rows[i].text for i in question.queries]
            made = sample(study, steered, captions, hints, own, scale, args)
        made = rows_of_all(made)
        if is_first():
            found[f"{scale:g}"] = asdict(question.measure(real.images, made)[0])
    return found


def table(results: dict[str, Any]) -> str:
    """The results for reading."""
    lines = [f"{'control scale':20}{'error, px':>12}{'difference':>12}{'captions right':>16}"]
    for scale, errors in results["control"].items():
        right = results["train"].get(scale)
        told = f"{right['right']:16.1%}" if right else ""
        lines.append(f"{scale:20}{errors['error']:12.2f}{errors['difference']:12.3f}{told}")
    return "\n".join(lines)
