"""`--control MODEL:HINT[:SCALE]` and the options beside it: from command line and files to `Control`.

    asked_controls   what the options say, checked before anything is read
    read_hints       the pictures, before the model
    read_controls    the ControlNets, once the model is there that they have to fit

A hint is white on black by custom, so what is transparent counts as black.
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ldm.models.controlled import Control, acts, check_influence
from ldm.weights.controlnet import load_controlnet
from ldm.weights.folder import PART_FILES, weights_hash
from ldm.weights.reading import open_checkpoint
from sample.control import check
from sample.images import decoded, to_rgb
from sample.model import find_model
from sample.parts import Parts
from sample.recording import source

FILE = PART_FILES["control"][0]
RECORD = "control_files"  # in the text chunk


class Asked(NamedTuple):
    """One control as the command line has it."""

    text: str
    model: str
    hint: Path
    scale: float
    start: float
    end: float
    guess: str | None


class Hinted(NamedTuple):
    asked: Asked
    hint: Float[Tensor, "1 3 H W"]


def asked_controls(args: argparse.Namespace) -> list[Asked]:
    """All `--control` of a command. Raises ValueError, which names the option, for what no file is needed to
    see."""
    texts, ranges = args.control or [], args.control_range or []
    if not texts and (ranges or args.guess_mode):
        raise ValueError(f"{'--control-range' if ranges else '--guess-mode'} has no effect without --control")
    if texts and args.deep_cache is not None:
        raise ValueError("--deep-cache leaves out the layers that --control steers; use one of the two")
    if len(ranges) not in (0, 1, len(texts)):
        raise ValueError(
            f"--control-range is given {len(ranges)} times for {len(texts)} --control; give one for all, or "
            "one each"
        )
    each = [parse_range(text) for text in ranges] or [(0.0, 1.0)]
    each = each * len(texts) if len(each) == 1 else each
    found = []
    for text, (start, end) in zip(texts, each, strict=True):
        model, hint, scale = parse_control(text)
        try:
            check_influence(scale, start, end, args.guess_mode)
        except ValueError as error:
            raise ValueError(f"--control {text}: {error}") from None
        found.append(Asked(text, model, Path(hint).expanduser(), scale, start, end, args.guess_mode))
    return found


def parse_control(text: str) -> tuple[str, str, float]:
    """MODEL:HINT[:SCALE] as its parts. The last part is the scale if it is a number and two are left; where
    paths hold colons, MODEL and HINT part at the first that leaves two things that exist.

    Raises ValueError for text without a model or a hint.
    """
    head, scale = text, 1.0
    with contextlib.suppress(ValueError):
        before, _, last = text.rpartition(":")
        number = float(last)
        if ":" in before:
            head, scale = before, number
    colons = [i for i, sign in enumerate(head) if sign == ":"]
    splits = [(head[:i], head[i + 1 :]) for i in colons if head[:i] and head[i + 1 :]]
    if not splits:
        raise ValueError(
            f"--control must be like emoji_edges:hint.png or emoji_edges:hint.png:0.8, got {text!r}"
        )
    there = [(model, hint) for model, hint in splits if Path(hint).expanduser().is_file() and exists(model)]
    return *(there or splits)[0], scale


def exists(model: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        find_model(model, FILE)
        return True
    return False


def parse_range(text: str) -> tuple[float, float]:
    """START:END; a side left out is open. Raises ValueError for other text."""
    start, colon, end = text.partition(":")
    with contextlib.suppress(ValueError):
        if colon:
            return float(start or 0), float(end or 1)
    raise ValueError(f"--control-range must be like 0:0.6, shares of the steps, got {text!r}")


def read_hints(args: argparse.Namespace) -> list[Hinted]:
    """The pictures of all `--control`; one that shows nothing is told on stderr. Raises ValueError for a file
    that is missing or no picture."""
    found = [Hinted(asked, read_hint(asked.hint)) for asked in asked_controls(args)]
    for asked, hint in found:
        if bool((hint.amin((2, 3)) == hint.amax((2, 3))).all()):
            print(
                f"ldm-sample: warning: {asked.hint}: an empty hint, all of one colour (transparent is black)",
                file=sys.stderr,
            )
        if not any(acts(step, args.steps, asked.start, asked.end) for step in range(args.steps)):
            print(
                f"ldm-sample: warning: --control {asked.text} acts in none of {args.steps} steps, by its "
                f"range {asked.start:g}:{asked.end:g}",
                file=sys.stderr,
            )
    return found


def read_hint(path: Path) -> Float[Tensor, "1 3 H W"]:
    """Any picture file in [0, 1], upright, 16 bits scaled to 8, transparency on black."""
    picture = decoded(path, partial(to_rgb, ground=(0, 0, 0)), "hint")
    return rearrange(torch.from_numpy(np.array(picture)).float() / 255, "h w c -> 1 c h w")


def read_controls(
    hinted: Sequence[Hinted], pipe: Parts, allow_nan: bool = False
) -> tuple[list[Control], list[dict[str, str]]]:
    """The controls, and what the text chunk says of their files. A ControlNet is read once for a model.

    Raises ValueError or FileNotFoundError, in one line, where a ControlNet is missing, damaged or made for
    another model.
    """
    controls, record = [], []
    for asked, hint in hinted:
        path = find_model(asked.model, FILE, "ControlNet")
        if path not in pipe.controlnets:
            part = open_checkpoint(path).require("control")
            network = load_controlnet(path, pipe.device, pipe.dtype, allow_nan=allow_nan)
            pipe.controlnets[path] = (network, weights_hash([part.source.path]))
        controlnet, weights = pipe.controlnets[path]
        control = Control(controlnet, hint, asked.scale, asked.start, asked.end, asked.guess)
        try:
            check(pipe, [control])
        except ValueError as error:
            raise ValueError(f"--control {asked.text}: {error}") from None
        controls.append(control)
        record.append({"control": asked.text, "weights": weights, **source(str(asked.hint), "hint")})
    return controls, record


def tell_sizes(hinted: Sequence[Hinted], sizes: Sequence[tuple[int, int] | None]) -> None:
    """Say on stderr which hints are not of the pictures' size, of each pass; `stream` resizes them."""
    for asked, hint in hinted:
        height, width = hint.shape[2:]
        for size in dict.fromkeys(sizes):
            if size not in (None, (width, height)):
                assert size is not None
                print(
                    f"ldm-sample: warning: {asked.hint}: hint cut and resized (bicubic) from "
                    f"{width}x{height} to the pictures' {size[0]}x{size[1]}",
                    file=sys.stderr,
                )


def require_same(recorded: Mapping[str, Any], now: Sequence[Mapping[str, str]]) -> None:
    """For `again`: the hints of a picture must be those that it was made with, where they are asked for in
    the same words; other weights are told on stderr. Raises ValueError for another hint."""
    listed = recorded.get(RECORD)
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    for each in now:
        was = next((entry for entry in entries if entry.get("control") == each["control"]), each)
        if was.get("hint_hash") != each["hint_hash"]:
            raise ValueError(
                f"{each['hint']}: not the hint that the picture was made with: its hash was "
                f"{was.get('hint_hash')}, now {each['hint_hash']}"
            )
        if was.get("weights") != each["weights"]:
            print(
                f"ldm-sample: warning: weights of --control {each['control']} differ: the picture was made "
                f"with {was.get('weights')}, now {each['weights']}",
                file=sys.stderr,
            )
