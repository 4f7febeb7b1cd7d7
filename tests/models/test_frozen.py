"""Frozen layers in their lean form: the same outputs and gradients, less kept for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomised
from torch import Tensor, nn

from ldm.models.frozen import FrozenConv2d, LeanResBlock, lean
from ldm.models.lora import LoRA, LoRAConfig, add_lora
from ldm.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), context_dim=12,
    num_heads=2, norm_groups=4,
)  # fmt: skip
SCALED = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention="adm", context_dim=None, norm_groups=4,
    head_channels=8, resblock_updown=True, scale_shift_norm=True,
)  # fmt: skip


def adapted(config: UNetConfig = CONFIG, targets: tuple[str, ...] = ("transformer",)) -> tuple[UNet, LoRA]:
    torch.manual_seed(0)
    unet = randomised(UNet(config)).train()
    lora = add_lora(unet, LoRAConfig(targets=targets))
    for adapter in lora.adapters.values():
        nn.init.normal_(adapter.up, std=0.1)
    return unet, lora


def run(unet: UNet, x: Tensor) -> Tensor:
    return unet(x, torch.tensor([7, 500]), torch.ones(2, 5, 12) if unet.config.context_dim else None)


def gradients(unet: UNet, lora: LoRA, mixed: bool = False) -> list[Tensor]:
    """The output, the gradient of the input and that of each parameter."""
    x = torch.linspace(-2, 2, 2 * 4 * 16 * 16).view(2, 4, 16, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y = run(unet, x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in lora.parameters())]


@pytest.mark.parametrize("targets", [("transformer",), ("transformer", "convolutions")])
@pytest.mark.parametrize("config", [CONFIG, SCALED])
@pytest.mark.parametrize("mixed", [False, True])
def test_same_outputs_and_gradients(config: UNetConfig, targets: tuple[str, ...], mixed: bool) -> None:
    targets = ("*",) if config is SCALED else targets
    expected = gradients(*adapted(config, targets), mixed)
    unet, lora = adapted(config, targets)
    found = gradients(lean(unet), lora, mixed)
    assert any(isinstance(layer, FrozenConv2d | LeanResBlock) for layer in unet.modules())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max()) if not mixed else 1e-2, rtol=1e-5)


def test_without_gradient_it_is_the_same_to_the_bit() -> None:
    unet, _ = adapted()
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        before, names = run(unet, x), list(unet.state_dict())
        assert torch.equal(run(lean(unet), x), before)
    assert list(unet.state_dict()) == names


def kept(module: nn.Module, evaluate: Callable[[], object]) -> int:
    """Bytes that wait for the way back, without the parameters."""
    found, own = {}, {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        evaluate()
    return sum(size for pointer, (size, _) in found.items() if pointer not in own)


def test_less_is_kept() -> None:
    x, (unet, _), (other, _) = torch.randn(2, 4, 16, 16), adapted(), adapted()
    before = kept(unet, lambda: run(unet, x))
    assert kept(lean(other), lambda: run(other, x)) < 0.8 * before


class Fused(torch.autograd.Function):
    """What fused attention keeps, without values: the device "meta" has but the form with whole maps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out


def test_memory_of_a_step_at_the_size_of_stable_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against diffusers with peft, the same LoRA of rank 4: 0.9 of the memory with the float32 weights (which
    are four fifths of it at one picture of 512 px), 0.7 of what a step adds to them."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: Fused.apply(q, k, v))
    with torch.device("meta"):
        ours = UNet(UNetConfig())
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        theirs.requires_grad_(False).add_adapter(
            peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        lora = add_lora(ours, LoRAConfig(rank=4))
        inputs = torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.long), torch.empty(1, 77, 768)
    trained = [parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(trained) == sum(parameter.numel() for parameter in lora.parameters()) == 797_184
    a, b = kept(lean(ours), lambda: ours(*inputs)), kept(theirs, lambda: theirs(*inputs))
    weights = 4 * sum(parameter.numel() for parameter in theirs.parameters())
    assert a < 0.7 * b
    assert weights + a < 0.9 * (weights + b)


def test_trained_layers_are_left_alone() -> None:
    unet = lean(UNet(CONFIG))
    assert not any(isinstance(layer, FrozenConv2d | LeanResBlock) for layer in unet.modules())
    run(unet, torch.randn(2, 4, 16, 16)).sum().backward()
    assert unet.conv_in.weight.grad is not None
