"""Our LPIPS against the package `lpips` on equal weights, and the file the weights come in."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ldm.losses.perceptual import SMALLEST_IMAGE, load_lpips, write_lpips
from ldm.weights.io import load_weights, read_metadata, save_weights


@pytest.fixture(scope="module")
def oracle():
    """The package's network: its trained heads on a VGG16 trunk with random weights."""
    lpips = pytest.importorskip("lpips")
    vgg = pytest.importorskip("torchvision.models.vgg")

    def random_trunk(**_):  # torchvision's, without the classifier's 124 million numbers
        torch.manual_seed(1)
        return SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"]))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(lpips.pretrained_networks.tv, "vgg16", random_trunk)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():  # biases too, and no layer that dies out
            fan_in = parameter[0].numel()
            parameter.normal_(0, 0.1 if name.endswith("bias") else (2 / fan_in) ** 0.5)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def published(oracle):
    """The state dicts that users have: torchvision's VGG16 and the package's file of heads."""
    import lpips

    vgg = {f"features.{name.split('.', 1)[1]}": value for name, value in oracle.net.state_dict().items()}
    vgg["classifier.0.weight"] = torch.zeros(2, 2)  # must be left out
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", "cpu", weights_only=True)
    return vgg, heads


@pytest.fixture(scope="module")
def file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    write_lpips(path, *published, trunk="random numbers")
    return path


@pytest.fixture(scope="module")
def ours(file):
    return load_lpips(file)


def pairs(height=40, width=33):
    images = torch.rand(3, 3, height, width) * 2 - 1
    return images, (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)


def test_equals_the_package(ours, oracle):
    images, others = pairs()
    expected = oracle(images, others).flatten()
    assert expected.min() > 1e-3
    assert_close(ours(images, others), expected, atol=1e-5, rtol=1e-5)


def test_gradient_equals_the_packages(ours, oracle):
    images, others = pairs(32, 32)
    gradients = []
    for network in (ours, oracle):
        x = others.clone().requires_grad_()
        network(images, x).sum().backward()
        gradients.append(x.grad)
    assert gradients[1].abs().max() > 1e-5
    assert_close(*gradients, atol=1e-7, rtol=1e-3)


def test_each_depth_equals_the_packages(ours, oracle):
    """Every tap counts: with one head at a time the distances still agree."""
    images, others = pairs(32, 32)
    _, depths = oracle(images, others, retPerLayer=True)
    saved = [head.detach().clone() for head in ours.heads]
    for i, depth in enumerate(depths):
        with torch.no_grad():
            for j, head in enumerate(ours.heads):
                head.copy_(saved[j] if i == j else torch.zeros_like(head))
        distance = ours(images, others)
        for head, value in zip(ours.heads, saved, strict=True):
            head.copy_(value)
        assert_close(distance, depth.flatten(), atol=1e-6, rtol=1e-5)


def test_equal_pictures_are_at_distance_zero(ours):
    images, others = pairs(16, 16)
    assert torch.equal(ours(images, images), torch.zeros(3))
    assert_close(ours(images, others), ours(others, images))


def test_dead_positions_have_a_finite_gradient(ours):
    """Where every channel of a tap is 0 the length is 0, whose square root has no derivative."""
    last = ours.blocks[-1][-1]
    bias = last.bias.clone()
    last.bias.fill_(-1e6)  # the deepest tap is 0 everywhere
    images, others = pairs(16, 16)
    others.requires_grad_()
    ours(images, others).sum().backward()
    last.bias.copy_(bias)
    assert torch.isfinite(others.grad).all()
    assert others.grad.abs().max() > 0


def test_it_is_frozen(ours):
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_small_images_are_refused(ours):
    with pytest.raises(ValueError, match=f"15x20 are too small for LPIPS, which needs {SMALLEST_IMAGE} px"):
        ours(torch.zeros(1, 3, 20, 15), torch.zeros(1, 3, 20, 15))


def test_the_file_says_what_it_is(file):
    assert read_metadata(file)["lpips"] == {"version": "0.1", "network": "vgg16", "trunk": "random numbers"}


def test_bad_files_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_lpips(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"torn.safetensors is truncated or not a safetensors file"):
        load_lpips(tmp_path / "torn.safetensors")
    tensors, _ = load_weights(file)
    del tensors["heads.2"]
    save_weights(tmp_path / "partial.safetensors", tensors)
    with pytest.raises(ValueError, match=r"does not fit LPIPS: 1 missing: heads\.2"):
        load_lpips(tmp_path / "partial.safetensors")


def test_foreign_state_dicts_are_refused(published, tmp_path):
    vgg, heads = published
    with pytest.raises(ValueError, match=r"no tensor 'features\.10\.weight'"):
        write_lpips(tmp_path / "x", {k: v for k, v in vgg.items() if k != "features.10.weight"}, heads, "")
    with pytest.raises(ValueError, match=r"wrong shape: blocks\.0\.0\.weight \(64, 1, 3, 3\)"):
        write_lpips(tmp_path / "x", {**vgg, "features.0.weight": torch.zeros(64, 1, 3, 3)}, heads, "")
    assert not (tmp_path / "x").exists()
