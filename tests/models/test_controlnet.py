"""ControlNet: nothing changes before training, who learns when, parity with diffusers, names' counts, errors."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formula import filled, named_input
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.config import from_dict, to_dict
from ldm.models.controlnet import ControlNet, ControlNetConfig, add_residuals, scale_residuals
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import diffusers
from ldm.weights.compvis import CONTROL_PREFIX
from ldm.weights.io import load_strict, load_weights, save_weights
from ldm.weights.names import shapes

SMALL = {"model_channels": 16, "channel_mult": (1, 2, 2), "norm_groups": 8, "num_heads": 2, "context_dim": 12}
BASE = UNetConfig(**SMALL)
CONFIG = ControlNetConfig(BASE, hint_widths=(4, 6, 8))  # for an autoencoder with factor 4
UNETS = {
    "text": {},
    "classes": {"num_classes": 3},
    "vector": {"vector_dim": 5},
    "pooled context": {"pooled_context": True, "scale_shift_norm": True},
    "adm": {"context_dim": None, "attention": "adm", "resblock_updown": True},
}


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """Random values in every parameter, of a size that keeps activations near one; evaluation mode."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return module.eval().requires_grad_(False)


def inputs(config: UNetConfig = BASE, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, t, context, y; the hint is 4 times as large as x."""
    context = None if config.context_dim is None else torch.randn(batch, 5, config.context_dim)
    y = None
    if config.num_classes is not None:
        y = torch.arange(batch)
    elif config.vector_dim is not None:
        y = torch.randn(batch, config.vector_dim)
    return torch.randn(batch, 4, 8, 12), torch.arange(batch) * 300, context, y


def run(controlnet: ControlNet, hint: Tensor, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None):
    return controlnet(x, t, context, controlnet.encode_hint(hint), y)


@pytest.mark.parametrize("kind", UNETS)
def test_before_training_the_unet_is_unchanged_to_the_bit(kind: str) -> None:
    unet = randomised(UNet(UNetConfig(**{**SMALL, **UNETS[kind]})))
    controlnet = ControlNet.from_unet(unet, hint_widths=CONFIG.hint_widths)
    x, t, context, y = inputs(unet.config)
    control = run(controlnet, torch.rand(2, 3, 32, 48), x, t, context, y)
    assert len(control) == len(unet.config.skip_channels) + 1
    assert all(not bool(residual.any()) for residual in control)
    assert torch.equal(unet(x, t, context, y, control), unet(x, t, context, y))


def test_the_copy_is_of_the_way_down_and_can_be_trained() -> None:
    unet = randomised(UNet(BASE)).to(torch.bfloat16)
    controlnet = ControlNet.from_unet(unet, hint_channels=1)
    assert controlnet.config == ControlNetConfig(BASE, hint_channels=1)
    own, base = controlnet.state_dict(), unet.state_dict()
    shared = set(own) & set(base)
    assert {name for name in own if not name.startswith(("hint_encoder.", "zero_convs."))} == shared
    assert {name for name in base if not name.startswith(("up_blocks.", "norm_out.", "conv_out."))} == shared
    assert all(torch.equal(own[name], base[name]) for name in shared)
    assert all(own[name].data_ptr() != base[name].data_ptr() for name in shared)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in controlnet.parameters())


def learning(controlnet: ControlNet) -> set[str]:
    """The parts of which every parameter has a gradient that is not all zero; no part has both kinds."""
    with_gradient, without = set(), set()
    for name, parameter in controlnet.named_parameters():
        parts = name.split(".")
        part = ".".join(parts[:3]) if parts[0] == "hint_encoder" else parts[0]
        (with_gradient if bool(parameter.grad.any()) else without).add(part)
    assert not with_gradient & without
    return with_gradient


def test_zero_convolutions_learn_first_then_the_rest() -> None:
    """Everything before a zero convolution gets its gradient through it, so only once that has made a step."""
    unet = randomised(UNet(BASE))
    controlnet = ControlNet.from_unet(unet, hint_widths=CONFIG.hint_widths)
    optimiser = torch.optim.SGD(controlnet.parameters(), lr=0.1)
    batch, hint, target = inputs(), torch.rand(2, 3, 32, 48), torch.randn(2, 4, 8, 12)
    rest = {"time_embedding", "conv_in", "down_blocks", "mid_block"}
    last = f"hint_encoder.convs.{2 * len(CONFIG.hint_widths) - 1}"
    learnt = []
    for _ in range(3):
        optimiser.zero_grad()
        output = unet(*batch, control=run(controlnet, hint, *batch))
        (output - target).square().mean().backward()
        learnt.append(learning(controlnet))
        optimiser.step()
    hints = {f"hint_encoder.convs.{i}" for i in range(2 * len(CONFIG.hint_widths))}
    assert learnt[0] == {"zero_convs"}
    assert learnt[1] == {"zero_convs", *rest, last}
    assert learnt[2] == {"zero_convs", *rest, *hints}


@pytest.fixture(scope="module")
def controlnet() -> ControlNet:
    torch.manual_seed(0)
    return randomised(ControlNet(CONFIG))


def test_the_hint_counts_everywhere_and_can_be_shared(controlnet: ControlNet) -> None:
    batch, hint = inputs(), torch.rand(1, 3, 32, 48)
    control = run(controlnet, hint, *batch)
    for residual, same, other in zip(
        control,
        run(controlnet, hint.expand(2, -1, -1, -1), *batch),
        run(controlnet, 1 - hint, *batch),
        strict=True,
    ):
        assert largest_error(residual, same) < 1e-5
        assert not torch.allclose(residual, other, atol=1e-3)


def test_residuals_fit_every_skip(controlnet: ControlNet) -> None:
    unet = randomised(UNet(BASE))
    batch = inputs()
    control = run(controlnet, torch.rand(2, 3, 32, 48), *batch)
    middle, skips, _ = unet.encode(*batch)
    assert [residual.shape for residual in control] == [h.shape for h in [*skips, middle]]
    assert [residual.shape[1] for residual in control[:-1]] == BASE.skip_channels
    unet(*batch, control=control)


def test_residuals_are_those_of_the_formula(controlnet: ControlNet) -> None:
    """Z(F(x + hint features)), with F a UNet's way down, whose first convolution gets the features by a hook."""
    unet, own, batch = UNet(BASE).eval().requires_grad_(False), controlnet.state_dict(), inputs()
    unet.load_state_dict({name: own.get(name, tensor) for name, tensor in unet.state_dict().items()})
    features = torch.randn(2, 16, 8, 12)
    unet.conv_in.register_forward_hook(lambda module, args, output: output + features)
    middle, skips, _ = unet.encode(*batch)
    control = controlnet(*batch[:3], features)
    for i, h in enumerate([*skips, middle]):
        conv = controlnet.zero_convs[i]
        expected = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], h) + conv.bias[:, None, None]
        assert_close(control[i], expected, rtol=0, atol=1e-5)


def test_scaled_and_added_residuals(controlnet: ControlNet) -> None:
    batch = inputs()
    first, second = (run(controlnet, torch.rand(2, 3, 32, 48), *batch) for _ in range(2))
    assert_close(scale_residuals(first, 1), first, rtol=0, atol=0)
    assert all(a is b for a, b in zip(scale_residuals(first, 1.0), first, strict=True)), "no copies"
    assert all(not bool(residual.any()) for residual in scale_residuals(first, 0.0))
    total = add_residuals([first, scale_residuals(second, -0.5), second])
    assert_close(total, [a + 0.5 * b for a, b in zip(first, second, strict=True)], rtol=0, atol=1e-6)
    assert_close(add_residuals([first]), first, rtol=0, atol=0)


def test_residuals_of_different_controlnets_do_not_add() -> None:
    first, second = [torch.zeros(1, 4, 8, 8)] * 2, [torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4, 4)]
    with pytest.raises(ValueError, match=r"2 and 2 residuals \(\(1, 4, 8, 8\), \(1, 8, 4, 4\)\)"):
        add_residuals([first, second])
    with pytest.raises(ValueError, match="2 and 1 residuals"):
        add_residuals([first, first, first[:1]])
    with pytest.raises(ValueError, match="finite number, got nan"):
        scale_residuals(first, float("nan"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hint": torch.zeros(1, 1, 32, 32)}, "hint of 3 channels, got 1"),
        ({"hint": torch.zeros(1, 3, 32, 34)}, "sides that are multiples of 4, got 34x32"),
        ({"hint": torch.zeros(1, 3, 32, 48)}, "hint is 48x32 pixels; latents of 8x8 take 32x32, 4 times"),
        ({"hint": torch.zeros(3, 3, 32, 32)}, "of each sample or one for all, got 3 for 1"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "ControlNet takes 4 channels, got 3"),
        ({"x": torch.zeros(1, 4, 10, 8), "hint": torch.zeros(1, 3, 40, 32)}, "multiples of 4, got 8x10"),
        ({"context": torch.zeros(1, 5, 13)}, "ControlNet takes a context of width 12, got 13"),
        ({"context": None}, "width 12, got None"),
        ({"y": torch.tensor([1])}, "this ControlNet takes no class or vector"),
    ],
)
def test_errors_of_a_call(controlnet: ControlNet, changed: dict, message: str) -> None:
    right = {
        "x": torch.zeros(1, 4, 8, 8),
        "t": torch.tensor([1]),
        "context": torch.zeros(1, 5, 12),
        "y": None,
    }
    with pytest.raises(ValueError, match=message):
        run(controlnet, **{**right, "hint": torch.zeros(1, 3, 32, 32), **changed})


def test_a_hint_that_was_not_encoded_is_refused(controlnet: ControlNet) -> None:
    with pytest.raises(ValueError, match="hint features of 16 channels, as encode_hint gives them, got 3"):
        controlnet(*inputs()[:3], torch.zeros(2, 3, 32, 48))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hint_channels": 0}, "hint_channels must be at least 1, got 0"),
        ({"hint_widths": ()}, r"one or more positive widths, got \[\]"),
        ({"hint_widths": (16, 0)}, r"one or more positive widths, got \[16, 0\]"),
    ],
)
def test_errors_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlNetConfig(**values)


def test_which_models_it_fits() -> None:
    assert (CONFIG.stride, ControlNetConfig().stride) == (4, 8)
    CONFIG.check_fits(replace(BASE, in_channels=9), 4)  # one inpainting, given the latents alone
    with pytest.raises(ValueError, match="3 hint_widths is for an autoencoder with factor 4, this one has 8"):
        CONFIG.check_fits(BASE, 8)
    with pytest.raises(ValueError, match=r"another UNet: model_channels 16 .the UNet's 32., context_dim 12"):
        CONFIG.check_fits(replace(BASE, model_channels=32, context_dim=24), 4)


def test_config_and_weights_survive_a_file(controlnet: ControlNet, tmp_path: Path) -> None:
    assert from_dict(ControlNetConfig, to_dict(CONFIG)) == CONFIG
    save_weights(tmp_path / "controlnet.safetensors", controlnet.state_dict(), {"config": to_dict(CONFIG)})
    tensors, header = load_weights(tmp_path / "controlnet.safetensors")
    assert from_dict(ControlNetConfig, header["config"]) == CONFIG
    loaded = ControlNet(CONFIG)
    load_strict(loaded, tensors, "the file")
    assert_close(loaded.state_dict(), controlnet.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"unknown key unet.chanels"):
        from_dict(ControlNetConfig, {"unet": {"chanels": 3}})


def test_parameters_of_the_real_ones() -> None:
    second = UNetConfig(context_dim=1024, head_channels=64, linear_projection=True)
    for unet, count in ((UNetConfig(), 361_279_120), (second, 364_228_240)):
        sizes = shapes(ControlNetConfig(unet))
        assert (len(sizes), sum(shape.numel() for shape in sizes.values())) == (340, count)


PARITY = {
    "Stable Diffusion 1": ({"num_heads": 2}, {"attention_head_dim": 2}, (4, 6, 8, 10)),
    "Stable Diffusion 2": (
        {"head_channels": 8, "linear_projection": True},
        {"attention_head_dim": (2, 4, 6), "use_linear_projection": True},
        (4, 6, 8, 10),
    ),
    "two deep, factor 4": (
        {"num_heads": 2, "transformer_depth": 2},
        {"attention_head_dim": 2, "transformer_layers_per_block": 2},
        (3, 5, 4),
    ),
    "classes, factor 1": (
        {"num_heads": 2, "num_classes": 7},
        {"attention_head_dim": 2, "num_class_embeds": 7},
        (4,),
    ),
}
LEVELS = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "in_channels": 4,
    "cross_attention_dim": 24,
}


def oracle_pair(kind: str) -> tuple[ControlNet, nn.Module, UNet, nn.Module]:
    """ControlNet and UNet, ours and diffusers', with equal random weights."""
    library = pytest.importorskip("diffusers")
    ours, theirs, widths = PARITY[kind]
    base = UNetConfig(
        model_channels=16,
        channel_mult=(1, 2, 3),
        norm_groups=8,
        attention_resolutions=(1, 2),
        context_dim=24,
        **ours,
    )
    their_net = library.ControlNetModel(**LEVELS, **theirs, conditioning_embedding_out_channels=widths)
    ups = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    their_unet = library.UNet2DConditionModel(**LEVELS, **theirs, up_block_types=ups, out_channels=4)
    config = ControlNetConfig(base, hint_widths=widths)
    net, unet = ControlNet(config), UNet(base)
    for own, their, tensors in ((net, their_net, config), (unet, their_unet, base)):
        load_strict(own, diffusers.to_ours(randomised(their).state_dict(), tensors), "diffusers")
        own.eval().requires_grad_(False)
    return net, their_net, unet, their_unet


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", PARITY)
def test_residuals_and_the_steered_unet_are_those_of_diffusers(kind: str) -> None:
    net, their_net, unet, their_unet = oracle_pair(kind)
    y = torch.tensor([0, 6]) if net.config.unet.num_classes else None
    for height, width in ((8, 8), (12, 4)):
        x, t, context = torch.randn(2, 4, height, width), torch.tensor([3, 977]), torch.randn(2, 7, 24)
        hint = torch.rand(2, 3, height * net.config.stride, width * net.config.stride)
        control = run(net, hint, x, t, context, y)
        down, middle = their_net(x, t, context, hint, class_labels=y, return_dict=False)
        for residual, expected in zip(control, [*down, middle], strict=True):
            assert_close(residual, expected, rtol=0, atol=2e-5)
        steered = unet(x, t, context, y, scale_residuals(control, 0.7))
        expected = their_unet(
            x,
            t,
            context,
            class_labels=y,
            down_block_additional_residuals=[0.7 * residual for residual in down],
            mid_block_additional_residual=0.7 * middle,
        ).sample
        assert largest_error(steered, expected) < 1e-5
        assert largest_error(unet(x, t, context, y), expected) > 1e-2


def test_residuals_pooled_over_the_picture_are_those_of_diffusers() -> None:
    """The "shuffle" ControlNet: one value a channel and place of the UNet."""
    net, their_net, unet, _ = oracle_pair("Stable Diffusion 1")
    their_net.register_to_config(global_pool_conditions=True)
    net.config = replace(net.config, global_pool=True)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 977]), torch.randn(2, 7, 24)
    picture = torch.rand(2, 3, 64, 64)
    control = run(net, picture, x, t, context, None)
    down, middle = their_net(x, t, context, picture, return_dict=False)
    for residual, expected in zip(control, [*down, middle], strict=True):
        assert_close(residual, expected.expand_as(residual), rtol=0, atol=2e-5)
    unet(x, t, context, control=control)


@pytest.mark.slow
@torch.inference_mode()
def test_full_size_is_that_of_diffusers() -> None:
    """Stable Diffusion 1's, filled by the formula: half a minute and 3 GB."""
    library = pytest.importorskip("diffusers")
    config = ControlNetConfig()
    start = time.perf_counter()
    weights = filled(config, CONTROL_PREFIX)
    with torch.device("meta"):
        ours = ControlNet(config)
        theirs = library.ControlNetModel(cross_attention_dim=768)
    ours.load_state_dict(weights, assign=True)
    theirs.load_state_dict(diffusers.to_diffusers(weights, config), assign=True)
    x, t, context = named_input("x", 1, 4, 32, 32), torch.tensor([981]), named_input("context", 1, 77, 768)
    hint = named_input("hint", 1, 3, 256, 256).sigmoid()
    control = run(ours.eval(), hint, x, t, context, None)
    down, middle = theirs.eval()(x, t, context, hint, return_dict=False)
    errors = [largest_error(a, b) for a, b in zip(control, [*down, middle], strict=True)]
    print(f"largest error {max(errors):.1e} in {time.perf_counter() - start:.0f} s")
    assert max(errors) < 1e-4
