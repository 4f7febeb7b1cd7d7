"""Depth, normals, meaning, poses and wire frames: by networks of others, from weights on your disk.

`depth`, `normal` and `semantic` read a folder as `transformers` writes it, `pose` and `mlsd` one with the
files that `controlnet_aux` names (OpenPose's are for non-commercial use only). Nothing is ever downloaded.
Both packages are in the extra `annotate`.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from sample.annotators.ade20k import ADE20K

EXTRA = "pip install 'latent-diffusion-from-scratch[annotators]'"
DISTANCES = ("glpn", "zoedepth")  # networks that tell how far, where others tell how near
POSE_FILES = ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")
MLSD_FILES = ("mlsd_large_512_fp32.pth",)


def depth(picture: Image.Image, weights: str = "") -> Image.Image:
    """How near each pixel is: white is nearest, black farthest in this picture.

    weights: folder of DPT, Depth Anything or another depth network of `transformers`.
    """
    return Image.fromarray((nearness(picture, "depth", weights) * 255).round().astype(np.uint8)).convert(
        "RGB"
    )


def normal(
    picture: Image.Image, weights: str = "", relief: float | int = 1.0, background: float | int = 0.1
) -> Image.Image:
    """Which way surfaces face, from their depth, with the signs of the original ControlNet's annotator: red
    grows where the picture comes nearer to the right, green where it does downwards, blue faces the viewer.

    weights: as of `depth`. relief: from the nearest to the farthest pixel, in shorter sides of the picture.
    background: what is less near than this share of the nearest faces the viewer.
    """
    if not (math.isfinite(relief) and relief > 0 and 0 <= background <= 1):
        raise ValueError(
            f"normal: expected relief above 0 and background in 0..1, got {relief}, {background}"
        )
    near = nearness(picture, "normal", weights)
    return Image.fromarray(np.rint((normals(near, relief, background) + 1) * 127.5).astype(np.uint8))


def normals(
    near: Float[np.ndarray, "H W"], relief: float | int = 1.0, background: float | int = 0.1
) -> Float[np.ndarray, "H W 3"]:
    """Unit vectors across a relief, given how near it is, 0 to 1; see `normal`."""
    height = near * (relief * min(near.shape))  # pixels
    slopes = [
        np.gradient(height, axis=axis) if near.shape[axis] > 1 else np.zeros_like(near) for axis in (1, 0)
    ]
    flat = near < background
    right, down = (np.where(flat, 0.0, slope) for slope in slopes)
    vectors = np.stack([right, down, np.ones_like(near)], axis=-1)  # (H, W, 3)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@torch.no_grad()
def nearness(picture: Image.Image, kind: str, weights: str) -> Float[np.ndarray, "H W"]:
    """0 for the farthest, 1 for the nearest pixel of this picture."""
    processor, model = pretrained(kind, weights, "AutoModelForDepthEstimation")
    outputs = model(**processor(images=picture, return_tensors="pt"))
    size = [(picture.height, picture.width)]
    more = {"source_sizes": size} if model.config.model_type == "zoedepth" else {}
    found = processor.post_process_depth_estimation(outputs, target_sizes=size, **more)[0]["predicted_depth"]
    values = found.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{weights}: its depth of this picture is not finite; damaged weights?")
    metric = getattr(model.config, "depth_estimation_type", "relative") == "metric"
    if metric or model.config.model_type in DISTANCES:
        values = -values
    least, most = values.min(), values.max()
    return (values - least) / (most - least) if most > least else np.zeros_like(values)


@torch.no_grad()
def semantic(picture: Image.Image, weights: str = "") -> Image.Image:
    """What each pixel shows, as a colour for each class: ADE20K's where the network knows its 150 classes, as
    ControlNet was trained with, else those of Pascal VOC's rule.

    weights: folder of SegFormer, UperNet or another network of `transformers` for semantic segmentation.
    """
    processor, model = pretrained("semantic", weights, "AutoModelForSemanticSegmentation")
    outputs = model(**processor(images=picture, return_tensors="pt"))
    size = [(picture.height, picture.width)]
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0].cpu().numpy()
    known = model.config.num_labels == len(ADE20K)
    return Image.fromarray((ADE20K if known else voc_colours(model.config.num_labels))[classes])


def voc_colours(count: int) -> UInt8[np.ndarray, "K 3"]:
    """The bits of a class, least first, go in turn to the highest free bit of red, green and blue."""
    colours = np.zeros((count, 3), dtype=np.uint8)
    for index in range(count):
        for bit in range(24):
            colours[index, bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return colours


def pose(picture: Image.Image, weights: str = "", hands: int = 0, face: int = 0) -> Image.Image:
    """The limbs of each person as coloured sticks, as OpenPose draws them.

    weights: folder with body_pose_model.pth, hand_pose_model.pth and facenet.pth. hands, face: 1 to draw
    them too.
    """
    detector = auxiliary("pose", weights, "OpenposeDetector", POSE_FILES)
    return fitted(detector(picture, include_hand=bool(hands), include_face=bool(face)), picture)


def mlsd(
    picture: Image.Image, weights: str = "", score: float | int = 0.1, distance: float | int = 0.1
) -> Image.Image:
    """Straight lines, white on black, by M-LSD (Gu et al. 2021, arXiv:2106.00186).

    weights: folder with mlsd_large_512_fp32.pth. score, distance: the least that a line must have.
    """
    detector = auxiliary("mlsd", weights, "MLSDdetector", MLSD_FILES)
    return fitted(detector(picture, thr_v=score, thr_d=distance), picture)


def fitted(hint: Image.Image, picture: Image.Image) -> Image.Image:
    """What a detector drew at its own size, at the picture's."""
    return hint.convert("RGB").resize(picture.size, Image.Resampling.BILINEAR)


# --- weights ------------------------------------------------------------------------------------------------


def folder_of(kind: str, weights: str, what: str) -> Path:
    """The folder of weights. Raises ValueError where none is given, or there is none."""
    if not weights:
        raise ValueError(
            f"{kind} needs a network whose weights you have: {kind}:weights=FOLDER ({what}); nothing is "
            "downloaded"
        )
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{kind}: {folder}: no such folder; expected {what}")
    return folder


def pretrained(kind: str, weights: str, model: str) -> tuple[Any, Any]:
    """Image processor and network of a folder, by this class of `transformers`. Raises ValueError."""
    folder = folder_of(kind, weights, "a folder as transformers writes it, with config.json")
    return load_pretrained(kind, str(folder), model)


@lru_cache(maxsize=1)
def load_pretrained(kind: str, folder: str, model: str) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{kind} needs the package transformers: {EXTRA}") from None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network = getattr(transformers, model).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged folder raises whatever its reader stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{kind}: {folder}: no {model} in it ({reason:.140})") from None
    return processor, network.requires_grad_(False).eval()


def auxiliary(kind: str, weights: str, detector: str, files: tuple[str, ...]) -> Callable[..., Image.Image]:
    """A detector of `controlnet_aux` with the weights in a folder. Raises ValueError."""
    folder = folder_of(kind, weights, f"a folder with {', '.join(files)}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{kind}: {folder} has no {', '.join(missing)}")
    return load_auxiliary(kind, str(folder), detector)


@lru_cache(maxsize=1)
def load_auxiliary(kind: str, folder: str, detector: str) -> Callable[..., Image.Image]:
    try:
        import controlnet_aux
    except ImportError:
        raise ValueError(f"{kind} needs the package controlnet_aux: {EXTRA}") from None
    try:
        return getattr(controlnet_aux, detector).from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{kind}: {folder}: not the weights of {detector} ({reason:.140})") from None
