"""The patch discriminator, the hinge loss and the adaptive weight, against numbers computed by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.losses.adversarial import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
)


def test_hinge_of_the_discriminator():
    real = torch.tensor([2.0, 0.5, -1.0])  # costs 0, 0.5, 2
    fake = torch.tensor([-3.0, -0.5, 1.0, 0.0])  # costs 0, 0.5, 2, 1
    assert discriminator_hinge(real, fake[:3]).item() == pytest.approx(0.5 * (2.5 / 3 + 2.5 / 3))
    assert discriminator_hinge(real.view(1, 1, 3), fake[1:].view(1, 1, 3)).item() == pytest.approx(
        0.5 * (2.5 / 3 + 3.5 / 3)
    )


def test_a_sure_discriminator_has_no_gradient():
    real, fake = torch.tensor([1.5], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    loss = discriminator_hinge(real, fake)
    loss.backward()
    assert loss.item() == 0
    assert (real.grad.item(), fake.grad.item()) == (0, 0)


def test_hinge_of_the_generator():
    assert generator_hinge(torch.tensor([[2.0, -1.0], [4.0, -3.0]])).item() == -0.5


def test_hinge_in_half_precision_is_float32():
    logits = torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16)
    assert discriminator_hinge(logits, logits).dtype == torch.float32
    assert generator_hinge(logits).dtype == torch.float32


def test_adaptive_weight_by_hand():
    last_layer = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (2 * last_layer).sum()  # gradient (2, 2), norm 2 sqrt(2)
    adversarial = last_layer.square().sum() / 2  # gradient (3, 4), norm 5
    factor = adaptive_weight(reconstruction, adversarial, last_layer)
    assert factor.item() == pytest.approx(2 * math.sqrt(2) / (5 + 1e-4), rel=1e-6)
    assert not factor.requires_grad

    # Both graphs are alive, and the factor is a constant to the backward pass.
    (reconstruction + factor * adversarial).backward()
    assert_close(last_layer.grad, 2 + factor * torch.tensor([3.0, 4.0]))


def test_adaptive_weight_is_limited():
    last_layer = torch.ones(1, requires_grad=True)
    assert adaptive_weight(7 * last_layer.sum(), 0 * last_layer.sum(), last_layer).item() == 1e4
    assert adaptive_weight(7 * last_layer.sum(), last_layer.sum(), last_layer, limit=0.5).item() == 0.5
    assert adaptive_weight(0 * last_layer.sum(), last_layer.sum(), last_layer).item() == 0


@pytest.mark.parametrize(
    ("layers", "height", "width", "out"),
    [
        (3, 256, 256, (30, 30)),
        (3, 64, 64, (6, 6)),
        (2, 64, 48, (14, 10)),
        (1, 16, 16, (6, 6)),
        (3, 24, 31, (1, 1)),
    ],
)
def test_output_shapes(layers, height, width, out):
    network = PatchDiscriminator(DiscriminatorConfig(layers=layers, features=4))
    assert network(torch.zeros(2, 3, height, width)).shape == (2, 1, *out)
    assert out == (height // 2**layers - 2, width // 2**layers - 2)  # as the docstring says


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_receptive_field(layers):
    """The pixels that move one output in the middle are a square of 9 * 2**layers - 2."""
    network = PatchDiscriminator(DiscriminatorConfig(layers=layers, features=2)).double().eval()
    side = 3 * (9 * 2**layers - 2)
    image = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    touched = image.grad.abs().sum(dim=(0, 1)) > 0  # (H, W)
    for rows in (touched.any(dim=1), touched.any(dim=0)):
        positions = rows.nonzero().flatten()
        assert positions[-1] - positions[0] + 1 == len(positions) == 9 * 2**layers - 2


def test_layers_and_parameters_of_the_original():
    network = PatchDiscriminator(DiscriminatorConfig())
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert [c.bias is not None for c in convolutions] == [True, False, False, False, True]
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1  # with the two biases
    norms = 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in network.parameters()) == weights + norms == 2_765_633


def test_widths_stop_at_eight_times_the_first():
    network = PatchDiscriminator(DiscriminatorConfig(layers=5, features=2))
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [2, 4, 8, 16, 16, 16, 1]


def test_initial_weights():
    network = PatchDiscriminator(DiscriminatorConfig())
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert abs(module.weight.mean().item()) < 2e-4
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.bias.abs().max() == 0


def test_images_too_small_are_refused():
    network = PatchDiscriminator(DiscriminatorConfig(layers=3, features=2))
    with pytest.raises(ValueError, match=r"32x16 are too small .* 3 layers, which needs 24 px"):
        network(torch.zeros(2, 3, 16, 32))


def test_it_learns_to_tell_upright_from_level_stripes():
    network = PatchDiscriminator(DiscriminatorConfig(layers=1, features=4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        real = torch.randn(8, 3, 1, 16).expand(8, 3, 16, 16)
        fake = torch.randn(8, 3, 16, 1).expand(8, 3, 16, 16)
        loss = discriminator_hinge(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # 1 at the start
