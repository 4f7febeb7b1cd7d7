"""Annotators by networks of others: tiny random ones on disk, and closed forms of what is made of their outputs."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sample.annotators import annotate, networks
from sample.annotators.ade20k import ADE20K


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(4).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPT of 32 px, as `transformers` writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dpt é")
    network = transformers.DPTForDepthEstimation(config)
    with torch.no_grad():
        network.head.head[-2].weight.abs_().mul_(1e4)  # between two ReLUs: above 0, and of some size
    network.save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def semantic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=150, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("segformer")
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def fake(monkeypatch: pytest.MonkeyPatch, predicted: torch.Tensor, **config: Any) -> None:
    """A network that sees this depth in every picture."""
    processor = SimpleNamespace(
        post_process_depth_estimation=lambda outputs, target_sizes: [{"predicted_depth": outputs}],
    )
    call = type("Processor", (), {"__call__": lambda self, images, return_tensors: {}, **vars(processor)})
    call.post_process_depth_estimation = staticmethod(processor.post_process_depth_estimation)
    model = type("Model", (), {"__call__": lambda self: predicted})()
    model.config = SimpleNamespace(**{"model_type": "dpt", **config})
    monkeypatch.setattr(networks, "pretrained", lambda *_: (call(), model))


# --- depth and normals --------------------------------------------------------------------------------------


@torch.no_grad()
def test_depth_is_what_the_network_says(depth_folder: Path) -> None:
    """Its output, stretched to the picture's size and from black to white."""
    import transformers

    picture = noise(50, 40)
    hint = np.asarray(annotate(picture, "depth", weights=str(depth_folder)))
    network = transformers.DPTForDepthEstimation.from_pretrained(depth_folder)
    pixels = transformers.DPTImageProcessor.from_pretrained(depth_folder)(images=picture, return_tensors="pt")
    found = network(**pixels).predicted_depth[None]
    large = F.interpolate(found, (40, 50), mode="bicubic", align_corners=False)[0, 0]
    expected = (large - large.min()) / (large.max() - large.min()) * 255
    assert hint.shape == (40, 50, 3) and (hint == hint[..., :1]).all() and len(np.unique(hint)) > 50
    assert abs(hint[..., 0] - expected.numpy()).max() <= 1
    np.testing.assert_array_equal(annotate(picture, "depth", weights=str(depth_folder)), hint)


def test_near_is_white(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a network tells how near or how far."""
    picture, ramp = Image.new("RGB", (52, 3)), torch.arange(52.0).expand(3, 52) * 7 + 3
    rising = np.arange(52) * 5
    fake(monkeypatch, ramp)
    np.testing.assert_array_equal(np.asarray(annotate(picture, "depth"))[1, :, 0], rising)
    for config in ({"model_type": "glpn"}, {"depth_estimation_type": "metric"}):
        fake(monkeypatch, ramp, **config)
        np.testing.assert_array_equal(np.asarray(annotate(picture, "depth"))[1, :, 0], rising[::-1])
    fake(monkeypatch, torch.ones(3, 52))
    assert not np.asarray(annotate(picture, "depth")).any()
    fake(monkeypatch, torch.full((3, 52), float("nan")))
    with pytest.raises(ValueError, match="not finite; damaged weights"):
        annotate(picture, "depth")


def test_the_normals_of_a_plane_are_the_same_everywhere() -> None:
    """A slope of one pixel a pixel to the right, and of a half downwards; on a flat picture they face the viewer."""
    rows, columns = np.mgrid[:41, :41] / 40
    slope = networks.normals(columns, relief=40 / 41, background=0)
    np.testing.assert_allclose(slope, np.broadcast_to([0.5**0.5, 0, 0.5**0.5], slope.shape), atol=1e-12)
    slope = networks.normals(rows, relief=20 / 41, background=0)
    np.testing.assert_allclose(slope, np.broadcast_to([0, 0.2**0.5, 0.8**0.5], slope.shape), atol=1e-12)
    assert (networks.normals(np.full((5, 6), 0.7)) == [0, 0, 1]).all()
    assert networks.normals(np.zeros((1, 1))).tolist() == [[[0, 0, 1]]]


def test_normals_of_a_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a half ball with the picture's width the vectors are those from the middle, with the signs of nearness."""
    rows, columns = np.mgrid[:101, :101] - 50.0
    high = np.sqrt(np.maximum(50.0**2 - rows**2 - columns**2, 0))
    inside = np.hypot(rows, columns) < 40
    vectors = networks.normals(high / 50, relief=50 / 101)
    expected = np.stack([-columns, -rows, high], axis=-1) / 50
    np.testing.assert_allclose(vectors[inside], expected[inside], atol=0.02)
    assert (vectors[np.hypot(rows, columns) > 52] == [0, 0, 1]).all()
    fake(monkeypatch, torch.from_numpy(high))
    hint = annotate(Image.new("RGB", (101, 101)), "normal", relief=50 / 101)
    assert hint.getpixel((0, 0)) == (128, 128, 255) == hint.getpixel((50, 50))
    red, green, blue = hint.getpixel((25, 50))  # it comes nearer to the right
    assert (
        red == pytest.approx(127.5 * 1.5, abs=2)
        and green == 128
        and blue == pytest.approx(127.5 * (1 + 0.75**0.5), abs=2)
    )


# --- meaning ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_semantic_colours_the_classes(semantic_folder: Path) -> None:
    import transformers

    picture = noise(48, 32)
    hint = np.asarray(annotate(picture, "semantic", weights=str(semantic_folder)))
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(semantic_folder)
    pixels = transformers.SegformerImageProcessor.from_pretrained(semantic_folder)(
        images=picture, return_tensors="pt"
    )
    logits = F.interpolate(network(**pixels).logits, (32, 48), mode="bilinear", align_corners=False)
    classes = logits[0].argmax(dim=0).numpy()
    assert len(np.unique(classes)) > 3
    np.testing.assert_array_equal(hint, ADE20K[classes])


def test_the_tables_of_colours() -> None:
    assert ADE20K.shape == (150, 3) and ADE20K.dtype == np.uint8
    for index, colour in {0: (120, 120, 120), 2: (6, 230, 230), 12: (150, 5, 61), 149: (92, 0, 255)}.items():
        assert tuple(ADE20K[index]) == colour  # wall, sky, person, flag
    assert (
        len(np.unique(ADE20K, axis=0)) == 149 and (ADE20K[6] == ADE20K[48]).all()
    )  # road and skyscraper, as published
    voc = networks.voc_colours(21)
    for index, colour in {
        0: (0, 0, 0),
        1: (128, 0, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }.items():
        assert tuple(voc[index]) == colour  # background, aeroplane, cat, person, monitor
    assert len(np.unique(networks.voc_colours(400), axis=0)) == 400


# --- poses and wire frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "detector", "files", "asked"),
    [
        ({"kind": "pose", "hands": 1}, "OpenposeDetector", networks.POSE_FILES, {"include_hand": True, "include_face": False}),
        ({"kind": "mlsd", "score": 0.3}, "MLSDdetector", networks.MLSD_FILES, {"thr_v": 0.3, "thr_d": 0.1}),
    ],
)  # fmt: skip
def test_what_controlnet_aux_is_asked(
    spec: dict[str, Any], detector: str, files: tuple[str, ...], asked: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The package is not needed for this: a stand-in draws what it is asked for, at its own size."""
    calls: list[Any] = []

    class Detector:
        @classmethod
        def from_pretrained(cls, folder: str) -> "Detector":
            calls.append(folder)
            return cls()

        def __call__(self, picture: Image.Image, **options: Any) -> Image.Image:
            calls.append((picture.size, options))
            return Image.new("L", (512, 576), 77)

    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(**{detector: Detector}))
    networks.load_auxiliary.cache_clear()
    for name in files:
        (tmp_path / name).touch()
    hint = annotate(noise(30, 40), **spec, weights=str(tmp_path))
    assert hint.size == (30, 40) and hint.getcolors() == [(1200, (77, 77, 77))]
    assert calls == [str(tmp_path), ((30, 40), asked)]
    networks.load_auxiliary.cache_clear()


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["depth", "normal", "semantic", "pose", "mlsd"])
def test_without_weights(kind: str, tmp_path: Path) -> None:
    picture = noise(8, 8)
    with pytest.raises(
        ValueError,
        match=rf"^{kind} needs a network whose weights you have: {kind}:weights=FOLDER .* nothing is downloaded$",
    ):
        annotate(picture, kind)
    with pytest.raises(ValueError, match=rf"^{kind}: {tmp_path}/none: no such folder; expected a folder "):
        annotate(picture, kind, weights=f"{tmp_path}/none")
    with pytest.raises(
        ValueError, match=rf"^{kind}: {tmp_path}(: no AutoModelFor| has no (body|mlsd))"
    ) as raised:
        annotate(picture, kind, weights=str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "package"), [("depth", "transformers"), ("pose", "controlnet_aux")])
def test_without_the_package(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in networks.POSE_FILES:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"^{kind} needs the package {package}: pip install 'latent-"):
        annotate(noise(8, 8), kind, weights=str(tmp_path))


def test_weights_of_something_else(
    depth_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another task, a file cut short, and a detector that cannot read what it finds."""
    with pytest.raises(ValueError, match="semantic: .*: no AutoModelForSemanticSegmentation in it"):
        annotate(noise(8, 8), "semantic", weights=str(depth_folder))
    for path in depth_folder.iterdir():
        (tmp_path / path.name).write_bytes(
            path.read_bytes()[: 900 if path.suffix == ".safetensors" else None]
        )
    with pytest.raises(ValueError, match=r"depth: .*: no AutoModelForDepthEstimation in it \("):
        annotate(noise(8, 8), "depth", weights=str(tmp_path))
    (tmp_path / networks.MLSD_FILES[0]).touch()

    def broken(folder: str) -> None:
        raise RuntimeError("what\nis this")

    detector = SimpleNamespace(MLSDdetector=SimpleNamespace(from_pretrained=broken))
    monkeypatch.setitem(sys.modules, "controlnet_aux", detector)
    with pytest.raises(ValueError, match=r"mlsd: .*: not the weights of MLSDdetector \(what is this\)$"):
        annotate(noise(8, 8), "mlsd", weights=str(tmp_path))


@pytest.mark.parametrize("bad", [{"relief": 0.0}, {"relief": float("nan")}, {"background": 1.5}])
def test_bad_values_of_normals(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="normal: expected relief above 0 and background in 0..1"):
        annotate(noise(8, 8), "normal", **bad)
