"""The UNet's behaviour: zero output at the start, control residuals, batches, half precision, errors with the numbers."""

import pytest
import torch
from networks import randomised
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.editing import concatenated
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.schedule import DiffusionConfig, Schedule
from ldm.models.unet import UNet, UNetConfig

SMALL = {"model_channels": 16, "channel_mult": (1, 2, 2), "norm_groups": 8, "num_heads": 2, "context_dim": 12}
CONFIG = UNetConfig(**SMALL)


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


# --- several contexts for one x -----------------------------------------------------------------------------


def several(config: UNetConfig, copies: int, batch: int = 2) -> tuple[UNet, Tensor, Tensor, Tensor]:
    """A network, x and t (B, ...), contexts (R B, ...)."""
    x, t, _ = inputs(batch)
    return randomised(UNet(config)), x, t, torch.randn(copies * batch, 5, 12)


def again(x: Tensor, copies: int) -> Tensor:
    return torch.cat([x] * copies)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_depth": 2, "linear_projection": True},
        {"attention_resolutions": (2,)},  # the first cross-attention comes later
        {"attention_resolutions": ()},  # only in the middle
        {"scale_shift_norm": True, "resblock_updown": True},
        {"pooled_context": True},  # the embedding reads the context: nothing is shared
    ],
)
@pytest.mark.parametrize(("copies", "batch"), [(2, 1), (2, 2), (3, 2)])
def test_several_contexts_of_one_x_are_those_of_x_repeated(changes: dict, copies: int, batch: int) -> None:
    unet, x, t, context = several(UNetConfig(**{**SMALL, **changes}), copies, batch)
    expected = unet(again(x, copies), again(t, copies), context)
    shared = unet(x, t, context)
    assert float((shared - expected).norm() / expected.norm()) < 1e-5
    with torch.no_grad():  # in place
        assert float((unet(x, t, context) - expected).norm() / expected.norm()) < 1e-5


def test_what_does_not_read_the_context_runs_once() -> None:
    unet, x, t, context = several(CONFIG, 3)
    rows = []
    transformer = unet.down_blocks[0].attentions[0]
    for module in (
        unet.down_blocks[0].resnets[0],
        transformer.blocks[0].attn1,
        unet.down_blocks[0].resnets[1],
    ):
        module.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    unet(x, t, context)
    assert rows == [2, 2, 6]


@pytest.mark.parametrize("of_y", [1, 2])
def test_classes_with_several_contexts(of_y: int) -> None:
    """One class for each x, or one for each context: then everything differs."""
    unet, x, t, context = several(UNetConfig(**SMALL, num_classes=3), 2)
    y = torch.tensor([0, 2, 1, 1])[: 2 * of_y]
    expected = unet(again(x, 2), again(t, 2), context, again(y, 2 // of_y))
    assert_close(unet(x, t, context, y), expected, rtol=0, atol=1e-5)


def test_several_classes_of_one_x_without_a_context() -> None:
    config = UNetConfig(**{**SMALL, "context_dim": None}, attention="adm", num_classes=3)
    unet, x, t, _ = several(config, 2)
    y = torch.tensor([0, 2, 1, 1])
    assert_close(unet(x, t, y=y), unet(again(x, 2), again(t, 2), y=y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 4])
def test_control_with_several_contexts(rows: int) -> None:
    unet, x, t, context = several(CONFIG, 2)
    control = [torch.randn_like(each) for each in residuals(unet, again(x, rows // 2))]
    expected = unet(again(x, 2), again(t, 2), context, control=[again(each, 4 // rows) for each in control])
    assert_close(unet(x, t, context, control=control), expected, rtol=0, atol=1e-5)


def test_contexts_must_be_a_multiple() -> None:
    unet, x, t, _ = several(CONFIG, 2)
    with pytest.raises(ValueError, match="one or several contexts for each of 2 x, got 3"):
        unet(x, t, torch.randn(3, 5, 12))


@pytest.mark.parametrize("channels", [0, 5])
def test_guided_denoiser_shares_what_it_can(channels: int) -> None:
    """Through Denoiser and guidance, with an inpainting model's channels too."""
    config = UNetConfig(**SMALL, in_channels=4 + channels)
    unet, x, _, context = several(config, 2)
    batches = []
    unet.conv_in.register_forward_hook(lambda _, inputs, output: batches.append(len(output)))
    extra = {"channels": torch.randn(2, 5, 8, 12)} if channels else {}
    denoise = Denoiser(concatenated(unet) if channels else unet, Schedule(DiffusionConfig()))
    uncond, cond = ({"context": part, **extra} for part in context.chunk(2))
    apart = [denoise(x, 3.0, **each) for each in (uncond, cond)]
    guided = classifier_free(denoise, cond, uncond, 7.5)(x, 3.0)
    assert_close(guided, apart[0] + 7.5 * (apart[1] - apart[0]), rtol=1e-5, atol=1e-4)
    assert batches == [2, 2, 2]


def test_no_grad_changes_nothing_but_memory(unet: UNet) -> None:
    """What works in place there leaves its inputs alone."""
    x, t, context = inputs()
    control = [torch.randn_like(each) for each in residuals(unet, x)]
    before = [each.clone() for each in (x, context, *control)]
    expected = unet(x, t, context, control=control)
    with torch.no_grad():
        assert_close(unet(x, t, context, control=control), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, context, *control), strict=True))
