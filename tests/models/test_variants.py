"""Variants that share weights: no memory, the base untouched, the identity as attention map, names of layers."""

import pytest
import torch
import torch.nn.functional as F
from networks import randomised
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.attention import Attention, SelfAttentionBlock
from ldm.models.attention_maps import record
from ldm.models.token_merging import merging
from ldm.models.unet import UNet, UNetConfig
from ldm.models.variants import (
    IdentityAttention,
    IdentityAttentionBlock,
    attention_places,
    chosen,
    perturbed,
    sharing,
)

pytestmark = pytest.mark.usefixtures("no_grad")
SMALL = {
    "model_channels": 16,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "norm_groups": 8,
    "num_heads": 2,
}
CONFIG = UNetConfig(**SMALL, attention_resolutions=(1, 2), context_dim=12)
ADM = UNetConfig(
    **SMALL, attention_resolutions=(2,), context_dim=None, attention="adm", qkv_order="qkv_first"
)


@pytest.fixture(scope="module", params=[CONFIG, ADM], ids=["transformer", "adm"])
def unet(request: pytest.FixtureRequest) -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(request.param))


def inputs(unet: UNet, side: int = 8) -> tuple[Tensor, Tensor, Tensor | None]:
    context = torch.randn(2, 5, 12) if unet.config.context_dim else None
    return torch.randn(2, 4, side, side), torch.tensor([10.0, 700.0]), context


def storage(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}


def test_a_copy_has_the_same_tensors_in_other_modules(unet: UNet) -> None:
    copy = sharing(unet)
    assert storage(copy) == storage(unet)
    assert list(copy.state_dict()) == list(unet.state_dict())
    assert not {id(module) for module in copy.modules()} & {id(module) for module in unet.modules()}
    assert torch.equal(copy(*(given := inputs(unet))), unet(*given))
    norm = sharing(nn.BatchNorm2d(3))  # with buffers
    assert {*map(id, sharing(norm).buffers())} == {*map(id, norm.buffers())}


def test_who_listens_to_the_base_does_not_hear_a_variant() -> None:
    unet = randomised(UNet(CONFIG))
    given = inputs(unet)
    with record(unet) as maps:
        merging(perturbed(unet), 0.5)(*given)
        assert maps.count == 0
        unet(*given)
    assert maps.count == 7
    with record(variant := merging(unet, 0.5)) as maps:
        variant(*given)
    assert maps.count == 7


def test_what_is_learned_in_one_is_in_the_other() -> None:
    layer = nn.Linear(3, 3)
    copy = sharing(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert int(copy.weight.count_nonzero()) == 0


def test_perturbing_shares_the_weights_and_leaves_the_base(unet: UNet) -> None:
    given = inputs(unet)
    before = unet(*given)
    weak = perturbed(unet, "all")
    assert storage(weak) == storage(unet)
    assert not torch.allclose(weak(*given), before, atol=1e-3)
    assert torch.equal(unet(*given), before)


def test_a_position_gets_what_it_would_get_alone() -> None:
    """The softmax over one position is 1."""
    attention = randomised(Attention(12, None, 3))
    x = torch.randn(2, 5, 12)
    alone = torch.cat([attention(x[:, i : i + 1]) for i in range(5)], dim=1)
    assert_close(IdentityAttention(attention)(x), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
def test_the_adm_block_keeps_its_norm_and_residual(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = randomised(SelfAttentionBlock(12, 3, groups=4, qkv_order=order))
    x = torch.randn(2, 12, 3, 4)
    weak = IdentityAttentionBlock(block)(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: v)
    assert torch.equal(weak, block(x))


def test_a_middle_of_one_position_has_nothing_to_perturb(unet: UNet) -> None:
    given = inputs(unet, side=4)
    assert_close(perturbed(unet, "mid")(*given), unet(*given), rtol=0, atol=1e-6)
    assert not torch.allclose(perturbed(unet, "up")(*given), unet(*given), atol=1e-3)


def test_several_contexts_of_one_x() -> None:
    """What stands before the first cross-attention is computed once, in variants too."""
    unet = randomised(UNet(CONFIG))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0]), torch.randn(4, 5, 12)
    for variant in (perturbed(unet, "all"), merging(perturbed(unet, "mid"), 0.5, 2)):
        expected = variant(torch.cat([x, x]), torch.cat([t, t]), context)
        assert_close(variant(x, t, context), expected, rtol=0, atol=1e-5)


def test_places_are_named_in_running_order() -> None:
    places = attention_places(UNet(CONFIG))
    assert {name: place.factor for name, place in places.items()} == {
        "down.0.0": 1, "down.1.0": 2, "mid": 4, "up.1.0": 2, "up.1.1": 2, "up.2.0": 1, "up.2.1": 1,
    }  # fmt: skip
    assert places["up.1.1"].path == "up_blocks.1.attentions.1"


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        ("mid", ["mid_block.attention"]),
        ("down", ["down_blocks.0.attentions.0", "down_blocks.1.attentions.0"]),
        ("up.1, mid", ["mid_block.attention", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        ("up.1,up.1.0", ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        ("up.2.1", ["up_blocks.2.attentions.1"]),
    ],
)
def test_layers_are_chosen_by_name(layers: str, paths: list[str]) -> None:
    unet = UNet(CONFIG)
    assert [place.path for place in chosen(unet, layers)] == paths
    changed = {
        name.removesuffix(".blocks.0.attn1")
        for name, module in perturbed(unet, layers).named_modules()
        if isinstance(module, IdentityAttention)
    }
    assert changed == set(paths)


def test_all_layers() -> None:
    assert len(chosen(UNet(CONFIG), "all")) == 7


@pytest.mark.parametrize("layers", ["", "middle", "up.0", "up.10", "mid,down.7", "down,", "attn1"])
def test_unknown_layers_are_refused_with_what_there_is(layers: str) -> None:
    with pytest.raises(
        ValueError, match=r"no attention '.*' here; there are all, down, down\.0, down\.0\.0,"
    ):
        perturbed(UNet(CONFIG), layers)
