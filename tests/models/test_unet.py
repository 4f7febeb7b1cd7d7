"""The UNet's behaviour: zero output at the start, control residuals, batches, half precision, errors with the numbers."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.unet import UNet, UNetConfig

SMALL = {"model_channels": 16, "channel_mult": (1, 2, 2), "norm_groups": 8, "num_heads": 2, "context_dim": 12}
CONFIG = UNetConfig(**SMALL)


def randomised(model: nn.Module) -> nn.Module:
    """Also the layers that start at zero get values, so that everything counts."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(CONFIG))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 12), torch.arange(batch) * 300, torch.randn(batch, 5, 12)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        UNetConfig(
            **{**SMALL, "context_dim": None}, attention="adm", scale_shift_norm=True, resblock_updown=True
        ),
    ],
    ids=["transformer", "adm"],
)
def test_output_is_zero_at_the_start(config: UNetConfig) -> None:
    x, t, context = inputs()
    output = UNet(config)(x, t, context if config.context_dim else None)
    assert output.shape == x.shape
    assert int(output.count_nonzero()) == 0


def residuals(unet: UNet, x: Tensor) -> list[Tensor]:
    """What a ControlNet hands over: a tensor like every skip and one like the middle block's output, here zero."""
    sides = [(x.shape[2] >> level, x.shape[3] >> level) for level in range(3)]
    widths = [16, 32, 32]
    shapes = [(16, *sides[0])]
    for level in range(3):
        shapes += [(widths[level], *sides[level])] * CONFIG.num_res_blocks
        shapes += [(widths[level], *sides[level + 1])] if level < 2 else []
    shapes.append((32, *sides[2]))
    return [torch.zeros(len(x), *shape) for shape in shapes]


def test_zero_control_residuals_change_nothing(unet: UNet) -> None:
    x, t, context = inputs()
    assert torch.equal(unet(x, t, context, control=residuals(unet, x)), unet(x, t, context))


def test_every_control_residual_counts(unet: UNet) -> None:
    x, t, context = inputs(1)
    plain = unet(x, t, context)
    for i in range(len(residuals(unet, x))):
        control = residuals(unet, x)
        control[i] += 0.1 * torch.randn_like(control[i])
        assert not torch.allclose(unet(x, t, context, control=control), plain, atol=1e-4), f"residual {i}"


def test_a_sample_does_not_depend_on_its_batch(unet: UNet) -> None:
    x, t, context = inputs(3)
    together = unet(x, t, context)
    for i in range(3):
        alone = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_two_calls_are_bit_equal(unet: UNet) -> None:
    x, t, context = inputs()
    assert torch.equal(unet(x, t, context), unet(x, t, context))


def test_everything_counts(unet: UNet) -> None:
    x, t, context = inputs()
    plain = unet(x, t, context)
    for changed in (unet(x + 0.1, t, context), unet(x, t + 1, context), unet(x, t, context + 0.1)):
        assert not torch.allclose(changed, plain, atol=1e-4)


def test_fractional_timesteps_lie_between(unet: UNet) -> None:
    x, _, context = inputs(1)
    low, middle, high = (unet(x, torch.tensor([t]), context) for t in (500.0, 500.5, 501.0))
    assert torch.equal(low, unet(x, torch.tensor([500]), context))
    assert 0 < float((middle - (low + high) / 2).norm()) < 0.5 * float((high - low).norm())


def test_bfloat16_stays_near_float32(unet: UNet) -> None:
    x, t, context = inputs()
    half = UNet(CONFIG).eval().requires_grad_(False)
    half.load_state_dict(unet.state_dict())
    output = half.bfloat16()(x.bfloat16(), t, context.bfloat16())
    expected = unet(x, t, context)
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).norm() / expected.norm()) < 0.05


def test_every_parameter_gets_a_gradient() -> None:
    model = randomised(UNet(UNetConfig(**SMALL, num_classes=3))).requires_grad_(True)
    x, t, context = inputs()
    model(x, t, context, torch.tensor([0, 2])).square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if not bool(parameter.grad.any())]
    assert silent == []


def test_class_and_vector_conditioning() -> None:
    x, t, context = inputs()
    classes = randomised(UNet(UNetConfig(**SMALL, num_classes=3)))
    first, second = (classes(x, t, context, torch.tensor(y)) for y in ([0, 1], [0, 2]))
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1], atol=1e-4)
    vectors = randomised(UNet(UNetConfig(**SMALL, vector_dim=6)))
    first, second = (vectors(x, t, context, y) for y in (torch.zeros(2, 6), torch.ones(2, 6)))
    assert not torch.allclose(first, second, atol=1e-4)


def test_pooled_context_is_the_last_token_as_a_vector() -> None:
    pooled = randomised(UNet(UNetConfig(**SMALL, pooled_context=True)))
    vector = UNet(UNetConfig(**SMALL, vector_dim=12)).eval()
    vector.load_state_dict(pooled.state_dict())
    x, t, context = inputs()
    assert_close(pooled(x, t, context), vector(x, t, context, context[:, -1]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes no class or vector"):
        pooled(x, t, context, context[:, -1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(1, 3, 8, 8)}, "takes 4 channels, got 3"),
        ({"x": torch.zeros(1, 4, 8, 10)}, "multiples of 4, got 10x8"),
        ({"context": torch.zeros(1, 5, 13)}, "width 12, got 13"),
        ({"context": None}, "width 12, got None"),
        ({"y": torch.tensor([1])}, "takes no class or vector"),
    ],
)
def test_errors_of_a_call(unet: UNet, changed: dict, message: str) -> None:
    right = {"x": torch.zeros(1, 4, 8, 8), "t": torch.tensor([1]), "context": torch.zeros(1, 5, 12)}
    with pytest.raises(ValueError, match=message):
        unet(**{**right, **changed})


def test_a_class_is_needed() -> None:
    model = UNet(UNetConfig(**SMALL, num_classes=3))
    with pytest.raises(ValueError, match="needs a class or vector y .num_classes 3"):
        model(*inputs())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "linear"}, "'transformer' or 'adm', got 'linear'"),
        ({"qkv_order": "last"}, "heads_first or qkv_first, got 'last'"),
        ({"num_classes": 3, "vector_dim": 4}, "only one of"),
        ({"num_classes": 3, "pooled_context": True}, "only one of"),
        ({"context_dim": None, "pooled_context": True}, "pooled_context needs a context"),
        ({"model_channels": 20}, r"\[20, 40, 40\] must be multiples of norm_groups 8"),
        ({"channel_mult": ()}, r"\[\] must be multiples"),
        ({"num_heads": 3}, "16 must be a multiple of num_heads 3"),
        ({"head_channels": 12}, "16 must be a multiple of head_channels 12"),
        ({"head_channels": 0}, "16 must be a multiple of head_channels 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"attention": "adm"}, "takes no context: context_dim 12 must be null"),
    ],
)
def test_errors_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**SMALL, **values})
