"""Attention maps: probabilities, equal to diffusers', bit-equal outputs, which rows count, hooks that go again."""

import pytest
import torch
import torch.nn.functional as F
from networks import randomised
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.attention import Attention
from ldm.models.attention_maps import attention_map, record
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.diffusers import to_diffusers
from ldm.weights.diffusers_config import unet_json

pytestmark = pytest.mark.usefixtures("no_grad")
CONFIG = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, num_heads=2, context_dim=12,
    attention_resolutions=(1, 2),
)  # fmt: skip
T = 5


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(CONFIG), 2.0)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 12), torch.arange(batch) * 300, torch.randn(batch, T, 12)


def hooks(unet: UNet) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


def test_a_map_is_the_probabilities_that_attention_uses() -> None:
    """Of one head: map times values is the attention itself."""
    attention = randomised(Attention(12, 7, 1))
    x, context = torch.randn(2, 6, 12), torch.randn(2, T, 7)
    found = attention_map(attention, x, context)
    assert_close(found.sum(dim=-1), torch.ones(2, 6), rtol=0, atol=1e-6)
    expected = attention(x, context)
    assert_close(attention.to_out(found @ attention.to_v(context)), expected, rtol=0, atol=1e-5)


def test_heads_are_averaged() -> None:
    attention = randomised(Attention(12, 7, 3))
    x, context = torch.randn(2, 6, 12), torch.randn(2, T, 7)
    q, k = attention.to_q(x).split(4, dim=-1), attention.to_k(context).split(4, dim=-1)
    heads = [(a @ b.mT / 2).softmax(dim=-1) for a, b in zip(q, k, strict=True)]
    assert_close(attention_map(attention, x, context), sum(heads) / 3, rtol=0, atol=1e-6)


def test_the_output_is_bit_equal_and_the_hooks_go(unet: UNet) -> None:
    given = inputs()
    plain = unet(*given)
    with record(unet) as maps:
        assert torch.equal(unet(*given), plain)
        assert hooks(unet) > 0
    assert hooks(unet) == 0
    unet(*given)
    assert maps.count == 7
    with pytest.raises(RuntimeError, match="stop"), record(unet):
        raise RuntimeError("stop")
    assert hooks(unet) == 0


def test_maps_sum_to_one_at_the_size_of_the_latents(unet: UNet) -> None:
    with record(unet) as maps:
        for _ in range(3):
            unet(*inputs())
    assert maps.mean().shape == (2, T, 8, 12)
    assert_close(maps.mean().sum(dim=1), torch.ones(2, 8, 12), rtol=0, atol=1e-5)


def test_layers_and_steps_are_averaged(unet: UNet) -> None:
    """Against every map taken apart: each resized, all with the same weight."""
    calls = [inputs(), inputs()]
    taken = []

    def keep(module: Attention, given: tuple[Tensor, Tensor]) -> None:
        found = attention_map(module, *given).mT  # (B, T, N)
        fine = found.shape[2] == 96
        found = found.unflatten(2, (8, 12) if fine else (4, 6))
        taken.append(found if fine else F.interpolate(found, size=(8, 12), mode="bicubic"))

    handles = [
        module.register_forward_pre_hook(keep)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    with record(unet) as maps:
        for given in calls:
            unet(*given)
    for handle in handles:
        handle.remove()
    assert len(taken) == maps.count == 14
    assert_close(maps.mean(), torch.stack(taken).mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("factors", "count"), [((1,), 3), ((2,), 4), ((1, 2, 4), 7)])
def test_layers_are_chosen_by_resolution(unet: UNet, factors: tuple[int, ...], count: int) -> None:
    with record(unet, factors=factors) as maps:
        unet(*inputs())
    assert maps.count == count
    assert maps.mean().shape == (2, T, 8, 12)


def test_of_a_guided_batch_the_last_rows_count(unet: UNet) -> None:
    x, t, cond = inputs()
    uncond = torch.randn_like(cond)
    with record(unet) as alone:
        unet(x, t, cond)
    with record(unet, pictures=2) as guided:
        unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond, cond]))
    assert_close(guided.mean(), alone.mean(), rtol=0, atol=1e-5)


def test_the_rows_of_a_context_are_found(unet: UNet) -> None:
    """Wherever they stand: alone, first of the batch, beside a prompt of another length, or not at all."""
    x, t, cond = inputs()
    other, longer = torch.randn_like(cond), torch.randn(2, 2 * T, 12)
    with record(unet) as alone:
        unet(x, t, cond)
    with record(unet, context=cond) as maps:
        unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, other]))
        unet(x, t, other)
        unet(x, t, longer)
        unet(x, t, cond)
    assert maps.count == 14
    assert_close(maps.mean(), alone.mean(), rtol=0, atol=1e-5)


def test_rows_of_x_may_be_fewer_than_of_the_context(unet: UNet) -> None:
    """Where the network repeats x for [uncond, cond] itself, before or after the place of the hook."""
    attention = unet.mid_block.attention.blocks[0].attn2
    x, context = torch.randn(2, 24, 32), torch.randn(4, T, 12)
    with record(unet, pictures=2) as maps:
        maps._enter(2, attention, (torch.empty(2, 32, 4, 6),))
        maps._attend(attention, (x, context), {})
        maps._attend(attention, (torch.cat([x, x]),), {"context": context})
    expected = attention_map(attention, x, context[2:]).mT.unflatten(2, (4, 6))
    expected = F.interpolate(expected, size=(8, 12), mode="bicubic")
    assert_close(maps.mean(), expected, rtol=0, atol=1e-6)


def test_several_contexts_of_one_x(unet: UNet) -> None:
    """[uncond, cond] with the rows of x once: the network repeats them on its way."""
    x, t, cond = inputs()
    context = torch.cat([torch.randn_like(cond), cond])
    with record(unet, pictures=2) as once:
        unet(x, t, context)
    with record(unet, pictures=2) as twice:
        unet(torch.cat([x, x]), torch.cat([t, t]), context)
    assert_close(once.mean(), twice.mean(), rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_steps(unet: UNet) -> None:
    with record(unet) as maps:
        unet(*inputs())
        total = maps.total
        unet(*inputs())
    assert maps.total is total


def test_a_second_pass_of_another_size_is_added(unet: UNet) -> None:
    x, t, context = inputs()
    with record(unet) as maps:
        unet(x, t, context)
        unet(torch.randn(2, 4, 16, 24), t, context)
    assert maps.mean().shape == (2, T, 8, 12)
    assert maps.count == 14


def test_half_precision_is_added_up_in_float32() -> None:
    model = randomised(UNet(CONFIG), 2.0).bfloat16()
    x, t, context = inputs()
    with record(model) as maps:
        model(x.bfloat16(), t, context.bfloat16())
    assert maps.mean().dtype == torch.float32


def test_equals_diffusers() -> None:
    """The attention probabilities of each layer of diffusers' UNet with equal weights."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor

    ours = randomised(UNet(CONFIG), 2.0)
    theirs = diffusers.UNet2DConditionModel.from_config(unet_json(CONFIG)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), CONFIG), strict=True)
    theirs.set_attn_processor(AttnProcessor())
    probabilities = []

    def listening(attention: nn.Module) -> None:
        scores = attention.get_attention_scores

        def get_attention_scores(*args: Tensor | None) -> Tensor:
            probabilities.append(scores(*args))
            return probabilities[-1]

        attention.get_attention_scores = get_attention_scores

    for name, module in theirs.named_modules():
        if name.endswith("attn2"):
            listening(module)
    x, t, context = inputs()
    theirs(x, t, encoder_hidden_states=context)
    expected = [each.unflatten(0, (2, 2)).mean(dim=1).mT for each in probabilities]  # heads; (B, T, N)
    for factor, size in ((1, (8, 12)), (2, (4, 6))):
        with record(ours, factors=(factor,)) as maps:
            ours(x, t, context)
        of_size = [each for each in expected if each.shape[2] == size[0] * size[1]]
        assert len(of_size) == maps.count == 2 + factor
        mean = torch.stack(of_size).mean(dim=0).unflatten(2, size)
        mean = mean if factor == 1 else F.interpolate(mean, size=(8, 12), mode="bicubic")
        assert_close(maps.mean(), mean, rtol=0, atol=1e-5)


def test_what_cannot_be_recorded_is_refused(unet: UNet) -> None:
    x, t, context = inputs()
    unconditional = UNet(UNetConfig(model_channels=16, channel_mult=(1,), norm_groups=8, context_dim=None))
    with pytest.raises(ValueError, match="reads no context"), record(unconditional):
        pass
    with (
        pytest.raises(ValueError, match=r"downsampling factors 1, 2, none of \(8,\)"),
        record(unet, factors=(8,)),
    ):
        pass
    with record(unet) as maps, pytest.raises(ValueError, match="no attention was recorded"):
        maps.mean()
    with (
        record(unet, pictures=3),
        pytest.raises(ValueError, match="of 3 pictures asked for, the batch has 2"),
    ):
        unet(x, t, context)
    with record(unet):
        unet(x, t, context)
        with pytest.raises(ValueError, match=r"\(2, 5\) pictures and tokens was recorded, then of \(2, 7\)"):
            unet(x, t, torch.randn(2, 7, 12))
    assert hooks(unet) == 0
