"""A network trained by others loads strictly into our UNet and gives the outputs of its own runtime."""

import pytest
import terrain
import torch
from formula import named_input
from torch.testing import assert_close

from ldm.models.unet import UNet
from ldm.weights.compvis import to_ours
from ldm.weights.io import load_strict

pytestmark = pytest.mark.terrain


@pytest.fixture(scope="module")
def network() -> bytes:
    pytest.importorskip("onnx")
    network = terrain.find_network()
    if network is None:
        pytest.skip(
            "LDM_TERRAIN_WHEEL is not set and adaptive-terrain-diffusion is not installed (tests/terrain.py)"
        )
    return network


@pytest.fixture(scope="module")
def unet(network: bytes) -> UNet:
    unet = UNet(terrain.CONFIG).eval().requires_grad_(False)
    load_strict(unet, to_ours(terrain.extract_weights(network), terrain.CONFIG), "the ONNX graph")
    return unet


def test_it_has_every_weight(unet: UNet) -> None:
    assert len(unet.state_dict()) == 788
    assert sum(parameter.numel() for parameter in unet.parameters()) == 10_456_545


@pytest.fixture(scope="module")
def session(network: bytes):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("sigma", "difficulty"), [(80.0, 0.1), (2.0, 0.9), (0.1, 0.5)])
def test_outputs_equal_those_of_onnxruntime(session, unet: UNet, sigma: float, difficulty: float) -> None:
    x, y = sigma * named_input("terrain", 1, 1, 128, 128), torch.tensor([difficulty])
    feeds = {"noisy": x.numpy(), "sigma": torch.tensor([sigma]).numpy(), "difficulty": y.numpy()}
    expected = torch.from_numpy(session.run(["denoised"], feeds)[0])
    assert float(expected.std()) > 0.01  # a picture, not a constant
    assert_close(terrain.denoise(unet, x, sigma, y), expected, rtol=0, atol=1e-4)
