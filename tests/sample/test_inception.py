"""The network of published FIDs on equal random weights: beside torchvision's with its known differences, and as
torch-fidelity itself reads the file; and what a wrong file gets to hear.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sample import inception
from sample.__main__ import main
from sample.features import load_extractor

pytest.importorskip("torch_fidelity")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """As published, with its names and shapes, but random; as large as keeps the signal through the depth."""
    state = inception.build().state_dict()
    torch.manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.8, 1.2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.1)
    return state


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save({name: t for name, t in weights.items() if not name.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def extractor(file):
    return load_extractor(f"inception:{file}")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)[:height, :width])


def test_features_equal_torchvision_with_the_known_differences(weights, extractor, monkeypatch):
    """Written apart from torch-fidelity: average poolings that leave out the padding, and a maximum in the last
    block's; the input is (x - 128) / 128."""
    torchvision = pytest.importorskip("torchvision")
    functional = torchvision.models.inception.F
    network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    network.load_state_dict(weights)
    network.fc = torch.nn.Identity()
    average = functional.avg_pool2d
    poolings = 0

    def pool(x, **how):
        nonlocal poolings
        poolings += 1
        if poolings == 9:  # in Mixed_7c
            return functional.max_pool2d(x, **how)
        return average(x, **how, count_include_pad=False)

    picture = noise(299, 299)
    found, _ = extractor.look([picture])
    monkeypatch.setattr(functional, "avg_pool2d", pool)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = network((pixels - 128) / 128).double()
    assert poolings == 9
    assert expected.std() > 0.1  # the signal did not die on its way
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_equal_torch_fidelity_reading_the_file(weights, extractor, tmp_path):
    """Pictures of several sizes in a batch, in their order, each resized as that package does it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(weights, tmp_path / "all.pth")
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=tmp_path / "all.pth")
    pictures = [noise(64, 48, 1), noise(64, 48, 2), noise(350, 310, 3), noise(64, 48, 4)]
    found, _ = extractor.look(pictures, batch=3)
    for picture, row in zip(pictures, found, strict=True):
        (expected,) = theirs(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
        assert_close(row, expected[0].double(), rtol=1e-4, atol=1e-5)


def test_the_resize_is_that_of_tensorflow_1(extractor):
    """Corner on corner, no antialiasing: of a picture twice as large every second pixel is seen, the others are
    not. What is called antialiased or half-pixel would mix them."""
    small, other = np.array(noise(299, 299, 5)), np.array(noise(299, 299, 6))
    large = other.repeat(2, 0).repeat(2, 1)
    large[::2, ::2] = small
    found, _ = extractor.look([Image.fromarray(large), Image.fromarray(small)])
    assert torch.equal(found[0], found[1])
    assert "TensorFlow 1" in extractor.resize and "299x299" in extractor.resize


def test_the_title_says_whether_these_are_the_published_weights(file, extractor, monkeypatch):
    assert "pt_inception.pth" in extractor.title and "not those of published" in extractor.title
    monkeypatch.setattr(inception, "PUBLISHED", extractor.title[-16:][:8])
    assert "as in published FIDs" in load_extractor(f"inception:{file}").title


def test_two_folders_through_the_command(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sample.metrics.frechet_distance", lambda real, fake: 1.5)  # 10 s for 2048 numbers
    for name, count in (("real", 11), ("fake", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            noise(16, 16, i + 1000 * len(name)).save(tmp_path / name / f"{i}.png")
    folders = ["--real", str(tmp_path / "real"), "--fake", str(tmp_path / "fake"), "--device", "cpu"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["evaluate", *folders, "--features", f"inception:{file}", *out]) == 0
    said = capsys.readouterr().out
    assert "Inception-v3" in said and "Fréchet distance" in said
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["settings"]["features"]["width"] == 2048
    assert "TensorFlow 1" in found["settings"]["resize"]
    assert found["results"]["distribution"]["samples"]["frechet"] == 1.5


# --- wrong files --------------------------------------------------------------------------------------------


def others(tmp_path: Path, weights: dict[str, torch.Tensor], kind: str) -> str:
    path = tmp_path / f"{kind}.pth"
    if kind == "vgg":
        torch.save({"features.0.weight": torch.zeros(3)}, path)
    elif kind == "torchvision":
        torch.save(
            {**weights, "fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(9)}, path
        )
    elif kind == "program":
        torch.save({"a": torch.nn.Identity()}, path)
    elif kind == "text":
        path.write_text("hello")
    return str(path)


@pytest.mark.parametrize(("kind", "message"), [
    ("none", r"none\.pth does not exist"),
    ("text", r"text\.pth is a text"),
    ("vgg", r"vgg\.pth does not fit Inception: .* missing: .*; 1 unexpected: features\.0\.weight; expected pt_incep"),
    ("torchvision", r"1 unexpected: AuxLogits\.fc\.bias; 1 wrong shape: fc\.weight \(1000, 2048\) for \(1008, 2048\)"),
    ("program", r"program\.pth needs the global torch\.nn\.modules\.linear\.Identity"),
])  # fmt: skip
def test_other_files_are_refused(weights, tmp_path, kind, message):
    """A program in a pickle is not run: the package would have run it."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_extractor(f"inception:{others(tmp_path, weights, kind)}")
    assert "\n" not in str(error.value)


def test_another_size_is_refused_and_no_file_is_named():
    with pytest.raises(ValueError, match="--feature-size of inception is always 299, got 64"):
        load_extractor("inception:x.pth", 64)
    with pytest.raises(
        ValueError, match="--features 'inception' is not known; hed, hed:FILE, inception:FILE"
    ):
        load_extractor("inception")


def test_a_missing_package_is_named(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install torch-fidelity .*\[eval\]"):
        load_extractor(f"inception:{file}")
