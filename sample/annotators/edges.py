"""Edges and straight lines, by OpenCV.

`canny` is the edge detector of Canny 1986 with the thresholds of the original ControlNet's demo; `hough`
finds straight lines among those edges (probabilistic Hough transform, Matas et al. 2000), `lsd` in the
gradients themselves (line segment detector, von Gioi et al. 2010, doi:10.1109/TPAMI.2008.300), without
thresholds.
"""

import math
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def canny(picture: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """Edges one pixel wide, white on black.

    low, high: gradients (Sobel, of the colour that changes most; 0..1020) at which an edge goes on, and at
    which it starts. Raises ValueError unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"canny: expected 0 <= low <= high, got low={low}, high={high}")
    return white_on_black(opencv().Canny(np.asarray(picture), low, high))


def hough(
    picture: Image.Image,
    low: int = 100,
    high: int = 200,
    votes: int = 0,
    length: float | int = 0.0,
    gap: float | int = 2.0,
) -> Image.Image:
    """Straight lines, one pixel wide, white on black.

    low, high: of `canny`. votes: edge pixels that a line must have; length: of the shortest line (0: both an
    eighth of the picture's shorter side, at least 8). gap: pixels that may be missing in between.
    """
    if not (votes >= 0 and 0 <= length < math.inf and 0 <= gap < math.inf):
        raise ValueError(
            f"hough: votes, length and gap must be numbers not below 0, got {votes}, {length}, {gap}"
        )
    edges = np.asarray(canny(picture, low, high))[..., 0]
    least = max(8, min(picture.size) // 8)
    found = opencv().HoughLinesP(
        edges, 1, math.pi / 180, votes or least, minLineLength=length or least, maxLineGap=gap
    )
    return drawn(found, picture.size)


def lsd(picture: Image.Image, length: float | int = 0.0) -> Image.Image:
    """Straight lines, one pixel wide, white on black; both sides of a stroke are lines.

    length: of the shortest line (0: an eighth of the picture's shorter side, at least 8).
    """
    if not 0 <= length < math.inf:
        raise ValueError(f"lsd: length must be a number not below 0, got {length}")
    least = length or max(8.0, min(picture.size) / 8)
    found = opencv().createLineSegmentDetector().detect(np.asarray(picture.convert("L")))[0]
    if found is not None:
        ends = found.reshape(-1, 4)
        found = ends[np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1]) >= least]
    return drawn(found, picture.size)


def drawn(segments: np.ndarray | None, size: tuple[int, int]) -> Image.Image:
    """Segments (N, 4) of x1, y1, x2, y2, or what OpenCV has for them, on a picture of this size (W, H)."""
    canvas = np.zeros((size[1], size[0]), dtype=np.uint8)
    for x1, y1, x2, y2 in np.rint([] if segments is None else segments).astype(int).reshape(-1, 4).tolist():
        opencv().line(canvas, (x1, y1), (x2, y2), 255, 1)
    return white_on_black(canvas)


def white_on_black(lines: UInt8[np.ndarray, "H W"]) -> Image.Image:
    """A grey drawing as the RGB that hints are."""
    return Image.fromarray(lines).convert("RGB")


def opencv() -> ModuleType:
    """OpenCV. Raises ValueError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise ValueError(
            "this annotator needs OpenCV: pip install 'latent-diffusion-from-scratch[annotate]' "
            "(or opencv-python-headless)"
        ) from None
    return cv2
