"""Low-rank adaptation of a network: nothing at first, merged = unmerged, and gradient only where it is meant."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import randomised
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.fast_conv import fast_convolutions
from ldm.models.lora import LoRA, LoRAConfig, adaptable, add_lora, attach, targeted
from ldm.models.lora_math import Factors, delta
from ldm.models.unet import UNet, UNetConfig
from ldm.models.variants import sharing
from ldm.weights.kinds import find_kind
from ldm.weights.names import build_empty

SMALL = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), context_dim=12,
    num_heads=2, norm_groups=4,
)  # fmt: skip
ADM = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention="adm", context_dim=None, norm_groups=4,
    head_channels=8, resblock_updown=True, scale_shift_norm=True,
)  # fmt: skip
EVERY = LoRAConfig(rank=2, targets=("*",), alpha=3.0)


def run_unet(unet: nn.Module) -> Tensor:
    context = torch.linspace(-1, 1, 2 * 5 * 12).view(2, 5, 12) if unet.config.context_dim else None
    return unet(torch.linspace(-2, 2, 2 * 4 * 32 * 32).view(2, 4, 32, 32), torch.tensor([7, 500]), context)


def run_control(controlnet: nn.Module) -> Tensor:
    x, hint, context = (
        torch.ones(1, 4, 8, 8),
        torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64),
        torch.ones(1, 3, 12),
    )
    return torch.cat(
        [each.flatten() for each in controlnet(x, torch.tensor([5]), context, controlnet.encode_hint(hint))]
    )


def run_text(text: nn.Module) -> Tensor:
    return text(torch.arange(16).view(2, 8))


def run_autoencoder(autoencoder: nn.Module) -> Tensor:
    return autoencoder.decode(
        autoencoder.encode(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).mode()
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "unet": (lambda: UNet(SMALL), run_unet),
    "adm": (lambda: UNet(ADM), run_unet),
    "controlnet": (lambda: ControlNet(ControlNetConfig(SMALL)), run_control),
    "text": (
        lambda: TextEncoder(TextConfig(width=8, layers=2, heads=2, mlp_width=16, vocab_size=99)),
        run_text,
    ),
    "autoencoder": (
        lambda: AutoencoderKL(AutoencoderConfig(base_channels=8, channel_mult=(1, 2), norm_groups=4)),
        run_autoencoder,
    ),
}


def small() -> nn.Module:
    return randomised(UNet(SMALL))


def trained(lora: LoRA, size: float = 0.3) -> LoRA:
    """As after training: `up` is no longer zero."""
    with torch.no_grad():
        for adapter in lora.adapters.values():
            nn.init.normal_(adapter.up, std=size)
    return lora


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("kind", NETWORKS)
def test_zero_at_first_then_merged_as_unmerged_and_back(kind: str) -> None:
    """In every layer of every network, folded upsampling included."""
    build, run = NETWORKS[kind]
    module = randomised(build())
    before, names, types = run(module), list(module.state_dict()), [type(each) for each in module.modules()]
    lora = add_lora(module, EVERY)
    assert len(lora.adapters) == len(adaptable(module)) > 10
    assert torch.equal(run(module), before)
    adapted = run(trained(lora).module)
    assert (adapted - before).abs().max() > 0.1 * before.abs().max()
    weights = {name: parameter.clone() for name, parameter in module.state_dict().items()}
    assert list(weights) == names
    lora.merge()
    torch.testing.assert_close(run(module), adapted, atol=1e-5 * float(adapted.abs().max()), rtol=1e-5)
    assert [type(each) for each in module.modules()] == types  # plain again: as fast as before
    lora.unmerge()
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(module), adapted, atol=1e-5 * float(adapted.abs().max()), rtol=1e-5)


@pytest.mark.usefixtures("no_grad")
def test_removed_leaves_the_network_as_it_was() -> None:
    unet = small()
    before, types = run_unet(unet), [type(each) for each in unet.modules()]
    trained(add_lora(unet, EVERY)).remove()
    assert torch.equal(run_unet(unet), before) and [type(each) for each in unet.modules()] == types


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 7), nn.Conv2d(5, 7, 3, 2, 1), nn.Conv2d(5, 7, 1), nn.Conv1d(5, 7, 1)]
)
def test_the_formula(layer: nn.Module) -> None:
    """W x + b + scale alpha / rank up(down(x)), evaluated with the whole matrix."""
    net = nn.Sequential(copy.deepcopy(layer))
    lora = trained(add_lora(net, LoRAConfig(rank=2, alpha=6.0, targets=("*",))))
    lora.set_scale(0.5)
    factors = lora.weights["0"]
    change = 0.5 * 6 / 2 * torch.einsum("or,ri->oi", factors.up.flatten(1), factors.down.flatten(1))
    layer.weight += change.view_as(layer.weight)
    torch.testing.assert_close(0.5 * delta(factors), change.view_as(layer.weight))
    x = torch.randn(3, 5, *[8] * (layer.weight.ndim - 2))
    torch.testing.assert_close(net(x), layer(x))


@pytest.mark.usefixtures("no_grad")
def test_two_at_once_with_scales_that_change() -> None:
    unet = small()
    base = run_unet(unet)
    a = trained(add_lora(unet, LoRAConfig(), "a", seed=1))
    with_a = run_unet(unet)
    b = trained(add_lora(unet, LoRAConfig(targets=("transformer",)), "b", seed=2))
    both = run_unet(unet)
    b.set_scale(0)
    torch.testing.assert_close(run_unet(unet), with_a)
    a.set_scale(0)
    torch.testing.assert_close(run_unet(unet), base)
    a.set_scale(1)
    b.set_scale(1)
    assert torch.equal(run_unet(unet), both)
    a.merge()
    b.merge()
    torch.testing.assert_close(run_unet(unet), both, atol=1e-4, rtol=1e-4)
    a.unmerge()
    b.unmerge()
    a.remove()
    b.remove()
    torch.testing.assert_close(run_unet(unet), base, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_grad")
def test_forms_of_the_network_see_scales_change() -> None:
    """Weights shared with another structure, and convolutions in another form."""
    unet = small()
    lora = trained(add_lora(unet, EVERY))
    x, context = torch.zeros(2, 4, 32, 32), torch.zeros(2, 5, 12)
    forms = [sharing(unet), fast_convolutions(unet, 1.0, x, torch.zeros(2), context)[0]]
    for scale in (1.0, 0.3):
        lora.set_scale(scale)
        for form in forms:
            torch.testing.assert_close(run_unet(form), run_unet(unet))


def test_gradient_only_where_it_is_meant() -> None:
    unet = randomised(UNet(SMALL)).requires_grad_(True)
    lora = trained(add_lora(unet, LoRAConfig(targets=("*.attn2.to_k",))))
    run_unet(unet).square().mean().backward()
    with_gradient = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    layers = targeted(unet, ("*.attn2.to_k",))
    assert with_gradient == {f"{name}.adapters.0.{part}" for name in layers for part in ("down", "up")}
    assert all(parameter.grad.abs().max() > 0 for parameter in lora.parameters())
    assert {id(p) for p in lora.parameters()} == {id(p) for p in unet.parameters() if p.requires_grad}


def test_a_second_one_leaves_the_first_trainable_and_freezing_is_a_choice() -> None:
    unet = UNet(SMALL)
    whole = add_lora(unet, LoRAConfig(), "a", freeze=False)
    assert all(parameter.requires_grad for parameter in unet.parameters())
    add_lora(unet, LoRAConfig(), "b")
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert not unet.conv_in.weight.requires_grad


def test_dropout_is_of_training_alone() -> None:
    net = nn.Sequential(nn.Linear(50, 8)).train()
    lora = trained(add_lora(net, LoRAConfig(dropout=0.5, targets=("*",))))
    x = torch.randn(4, 50)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x), net[0].adapt(x @ net[0].weight.T + net[0].bias, x))
    assert lora.adapters["0"].dropout == 0.5


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_a_lora_in_float32_on_weights_in_half_precision(base: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(base)
    lora = trained(add_lora(net, LoRAConfig(targets=("*",)), dtype=torch.float32))
    x = torch.randn(2, 8, dtype=base)
    assert net(x).dtype == base
    net(x).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in lora.parameters())
    expected = net[0].weight.float() + delta(lora.weights["0"])
    lora.merge()
    assert torch.equal(net[0].weight, expected.to(base))  # computed in float32, rounded once


@pytest.mark.usefixtures("no_grad")
def test_attach_gives_the_same_function_without_gradient() -> None:
    unet, other = small(), small()
    other.load_state_dict(unet.state_dict())
    lora = trained(add_lora(unet, EVERY))
    lora.set_scale(0.7)
    attached = attach(other, lora.weights, "again", 0.7)
    assert torch.equal(run_unet(other), run_unet(unet))
    assert not any(parameter.requires_grad for parameter in attached.parameters())


def test_ranks_and_alphas_by_pattern() -> None:
    config = LoRAConfig(rank=2, alpha=1.0, ranks={"mid_block.*": 3, "*.to_k": 5}, alphas={"mid_block.*": 6.0})
    lora = add_lora(UNet(SMALL), config)
    weights = lora.weights
    assert {factors.rank for factors in weights.values()} == {2, 3, 5}
    middle = weights["mid_block.attention.blocks.0.attn1.to_q"]
    assert (middle.rank, middle.scale) == (3, 2.0)
    assert weights["mid_block.attention.blocks.0.attn1.to_k"].rank == 5  # the last that fits
    assert weights["down_blocks.0.attentions.0.blocks.0.attn1.to_q"].scale == 0.5


def test_the_seed_decides_the_start() -> None:
    first, same, other = (
        [p.clone() for p in add_lora(UNet(SMALL), LoRAConfig(init="gaussian"), seed=seed).parameters()]
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def test_targets_are_the_layers_of_other_tools() -> None:
    """Counts of kohya's and diffusers' files for Stable Diffusion 1."""
    config = find_kind("sd15").config
    unet, text = build_empty(config.unet), build_empty(config.text)
    counts = {name: len(targeted(unet, (name,))) for name in ("attention", "transformer")}
    assert counts == {"attention": 16 * 8, "transformer": 192}
    assert (len(targeted(text, ("transformer",))), len(targeted(text, ("attention",)))) == (72, 48)
    locon = targeted(unet, ("convolutions",))
    # 22 residual blocks of 2 convolutions and a projection, 14 shortcuts, 3 each way of resampling
    assert len(locon) == 22 * 3 + 14 + 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"ranks": {"*.to_k": 0}}, "rank of \\*.to_k must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alphas": {"a": float("inf")}}, "alpha of a must be above 0, got inf"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": ()}, "must name layers: attention, transformer"),
        ({"init": "zeros"}, "must be kaiming or gaussian"),
    ],
)
def test_config_is_checked(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)


def test_errors() -> None:
    unet = UNet(SMALL)
    with pytest.raises(ValueError, match="'to_x' is no layer of UNet; .*known: attention"):
        add_lora(unet, LoRAConfig(targets=("to_x",)))
    with pytest.raises(ValueError, match="rank 40 of .* more than its weight"):
        add_lora(unet, LoRAConfig(rank=40))
    lora = add_lora(unet, LoRAConfig())
    with pytest.raises(ValueError, match="is not merged"):
        lora.unmerge()
    with pytest.raises(ValueError, match="finite"):
        lora.set_scale(float("nan"))
    lora.merge()
    with pytest.raises(ValueError, match="merged already; a second time would double it"):
        lora.merge()
    with pytest.raises(ValueError, match="unmerge it first"):
        lora.set_scale(0.5)
    with pytest.raises(ValueError, match="unmerge it first"):
        lora.remove()


def test_weights_of_another_network_are_counted() -> None:
    weights = add_lora(UNet(SMALL), LoRAConfig()).weights
    wrong = {**weights, "nowhere.to_q": next(iter(weights.values()))}
    name = "mid_block.attention.blocks.0.attn2.to_k"
    wrong[name] = Factors(torch.ones(4, 99), weights[name].up, 4)
    with pytest.raises(
        ValueError, match=rf"matched {len(weights) - 1} of {len(weights) + 1} layers; 1 unknown: nowhere"
    ):
        attach(UNet(SMALL), wrong)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((0, 3), (3, 0), "rank 0"),
        ((2, 3), (3, 4), "down has rank 2, up 4"),
        ((2, 3, 3, 3), (3, 2), "no factors of a layer"),
        ((2, 3, 3, 3), (3, 2, 3, 3), "no factors of a layer"),
    ],
)
def test_factors_are_checked(down: tuple[int, ...], up: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Factors(torch.zeros(down), torch.zeros(up), 1.0)
