"""Winograd's form of 3x3 convolutions: its identity, all sizes, the layers chosen, and models that stay as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.blocks import Upsample
from ldm.models.fast_conv import (
    POINTS,
    ConvShape,
    WinogradConv2d,
    conv_shapes,
    fast_convolutions,
    is_eligible,
    swapped,
    winograd_matrices,
)
from ldm.models.unet import UNet, UNetConfig


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.eval().requires_grad_(False)


def tiny_unet() -> tuple[UNet, tuple[Tensor, ...]]:
    config = UNetConfig(
        model_channels=16, channel_mult=(1, 2), context_dim=8, num_heads=2, norm_groups=4, sample_size=8
    )
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    return randomised(UNet(config)), inputs


# --- the identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [POINTS, (0.0, 1.0, -1.0, 2.0, -2.0), (3.0, 0.5, -1.0, 2.0, 0.0)])
def test_matrices_in_one_dimension(points: tuple[float, ...]) -> None:
    """y_k = sum_l d_{k+l} g_l for every d and g: on all pairs of unit vectors, so by bilinearity on all."""
    a, g, b = winograd_matrices(points)
    products = torch.einsum("kn,nl,nj->klj", a, g, b)
    expected = torch.zeros(4, 3, 6, dtype=torch.float64)
    for k in range(4):
        for tap in range(3):
            expected[k, tap, k + tap] = 1
    assert_close(products, expected, rtol=0, atol=1e-12)


def test_matrices_are_the_papers() -> None:
    """A^T of Lavin & Gray's F(4, 3), and their B^T; the order of the points and signs are free."""
    a, g, b = winograd_matrices((0.0, 1.0, -1.0, 2.0, -2.0))
    assert a.tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    assert b[0].tolist() == [4, 0, -5, 0, 1, 0]
    assert b[5].tolist() == [0, 4, 0, -5, 0, 1]
    assert_close(g[3], torch.tensor([1 / 24, 1 / 12, 1 / 6], dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 4, 4), (2, 1, 1), (3, 5, 9), (1, 7, 70), (2, 46, 50), (40, 8, 8)]
)
def test_is_the_convolution(
    batch: int, height: int, width: int, bias: bool, layout: torch.memory_format
) -> None:
    """To 1e-12 in float64, whether tiles are cut off, or too many for one part, in one picture or by pictures."""
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double().requires_grad_(False)
    x = torch.randn(batch, 3, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    result = WinogradConv2d(conv)(x)
    assert_close(result, conv(x), rtol=0, atol=1e-12)
    if height % 4 == width % 4 == 0:
        assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("inside", "outside"), [(64, 96), (320, 320)])
def test_error_in_float32(inside: int, outside: int) -> None:
    conv = nn.Conv2d(inside, outside, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, inside, 16, 16)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert relative(WinogradConv2d(conv)(x), exact) < 2.5e-6


def test_gradient_of_the_input() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((conv(x) * weights).sum(), x)
    (result,) = torch.autograd.grad((WinogradConv2d(conv)(x) * weights).sum(), x)
    assert_close(result, expected, rtol=0, atol=1e-12)


def test_swapped_is_a_transposition() -> None:
    x = torch.randn(2, 3, 5)
    assert torch.equal(swapped(x), x.transpose(1, 2))
    assert swapped(x).is_contiguous()


INELIGIBLE = [
    nn.Conv2d(4, 4, 3, stride=2, padding=1),
    nn.Conv2d(4, 4, 1),
    nn.Conv2d(4, 4, 3),
    nn.Conv2d(4, 4, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose2d(4, 4, 3, padding=1),
]


@pytest.mark.parametrize("layer", INELIGIBLE, ids=str)
def test_other_layers_are_refused_and_left_alone(layer: nn.Module) -> None:
    assert not is_eligible(layer)
    module = nn.Sequential(layer, nn.Conv2d(4, 4, 3, padding=1))
    fast, report = fast_convolutions(module, 100.0, torch.randn(1, 4, 16, 16), least=0.0)
    assert type(fast[0]) is type(layer)
    assert list(report.replaced) == ["1"]
    if isinstance(layer, nn.Conv2d):
        with pytest.raises(ValueError, match="stride 1 and padding 1, not of Conv2d"):
            WinogradConv2d(layer)


# --- whole models -------------------------------------------------------------------------------------------


def test_unet() -> None:
    unet, inputs = tiny_unet()
    expected, before = unet(*inputs), {name: value.clone() for name, value in unet.state_dict().items()}
    fast, report = fast_convolutions(unet, 100.0, *inputs, least=0.0)
    plain = [name for name, layer in unet.named_modules() if is_eligible(layer)]
    assert sorted(report.replaced) == sorted(report.eligible) == sorted(plain)
    assert relative(fast(*inputs), expected) < 1e-5
    assert not torch.equal(fast(*inputs), expected)  # it did take the other way

    assert not any(isinstance(layer, WinogradConv2d) for layer in unet.modules())
    assert not any(layer._forward_pre_hooks for layer in (*unet.modules(), *fast.modules()))
    assert torch.equal(unet(*inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    own = {id(parameter) for parameter in unet.parameters()}
    assert all(id(parameter) in own for parameter in fast.parameters())
    assert fast.config is not None and type(fast) is UNet and not fast.training


def test_decoder() -> None:
    autoencoder = AutoencoderKL(
        AutoencoderConfig(base_channels=16, channel_mult=(1, 2), norm_groups=4, num_res_blocks=1)
    )
    randomised(autoencoder)
    z = torch.randn(2, 4, 16, 16)
    hidden = autoencoder.post_quant_conv(z)
    fast, report = fast_convolutions(autoencoder.decoder, 100.0, hidden, least=0.0)
    assert "up_blocks.0.resample.conv" in report.replaced
    assert report.replaced["up_blocks.0.resample.conv"].height == 32
    with torch.no_grad():
        assert relative(fast(hidden), autoencoder.decode(z)) < 1e-5
        assert relative(fast(hidden[:, :, :11, :7]), autoencoder.decode(z[:, :, :11, :7])) < 1e-5


def test_budget() -> None:
    """Nothing for 0 GB, never more than allowed, and those layers first that save most time per byte."""
    unet, inputs = tiny_unet()
    fast, none = fast_convolutions(unet, 0.0, *inputs, least=0.0)
    assert not none.replaced and none.bytes == 0 and none.gain == 1
    assert torch.equal(fast(*inputs), unet(*inputs))
    everything = fast_convolutions(unet, 100.0, *inputs, least=0.0)[1]
    chosen: list[set[str]] = []
    for part in (0.2, 0.5, 1.0):
        budget = part * everything.bytes / 1e9
        fast, report = fast_convolutions(unet, budget, *inputs, least=0.0)
        kernels = [layer.weight for layer in fast.modules() if isinstance(layer, WinogradConv2d)]
        assert sum(kernel.numel() * kernel.element_size() for kernel in kernels) == report.bytes
        assert 0 < report.bytes <= budget * 1e9 + 1e-3
        chosen.append(set(report.replaced))
    assert len(chosen[0]) < len(chosen[1]) < len(chosen[2]) == len(everything.eligible)


def test_worth() -> None:
    """Many channels are replaced, few on a large picture not; the upsampler is compared with its own short form."""
    assert ConvShape(640, 640, 2, 32, 32).gain > 2
    assert ConvShape(64, 64, 1, 256, 256).gain < 1
    assert ConvShape(512, 512, 1, 128, 128, folded=True).gain < 1.2 < ConvShape(512, 512, 1, 128, 128).gain
    module = nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1), Upsample(256))
    with torch.no_grad():
        _, report = fast_convolutions(module, 1.0, torch.zeros(2, 8, 32, 32))
    assert list(report.replaced) == ["1"]
    assert list(report.eligible) == ["0", "1", "2.conv"]
    assert report.eligible["2.conv"] == ConvShape(256, 256, 2, 64, 64, folded=True)
    assert str(report).startswith("1 of 3 3x3 convolutions in Winograd's form, 0.01 GB, together 1.")


def test_other_dtypes_are_left_alone() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).to(torch.bfloat16)
    assert conv_shapes(module, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)) == {}
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).to("meta")
    assert conv_shapes(mixed, torch.zeros(1, 4, 8, 8)) == {}


@pytest.mark.parametrize("gigabytes", [-1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none(gigabytes: float) -> None:
    with pytest.raises(ValueError, match="must be 0 GB or more, got"):
        fast_convolutions(nn.Sequential(), gigabytes)


# --- upsampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_folded_upsampling(layout: torch.memory_format, dtype: torch.dtype, error: float) -> None:
    layer = Upsample(6).to(dtype)
    x = torch.randn(2, 6, 16, 17, dtype=dtype).contiguous(memory_format=layout)
    expected = layer(x)  # with gradients: the plain form
    assert expected.requires_grad
    with torch.no_grad():
        assert layer.folds(x)
        result = layer(x)
        assert relative(result, expected) < error
        assert result.is_contiguous(memory_format=layout)
        assert torch.equal(result, layer.folded(x))
        assert not torch.equal(result, expected)


def test_upsampling_in_its_plain_form() -> None:
    """With gradients, in half precision, under autocast, of few pixels, and with another module as convolution."""
    layer, x = Upsample(4), torch.randn(2, 4, 16, 16)
    assert not layer.folds(x)
    with torch.no_grad():
        assert layer.folds(x)
        assert not layer.folds(x.bfloat16())
        assert not layer.folds(x[:1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not layer.folds(x)
        expected = layer(x)
        layer.conv = WinogradConv2d(layer.conv)
        assert not layer.folds(x)
        assert relative(layer(x), expected) < 1e-5
