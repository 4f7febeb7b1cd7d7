"""Building blocks: formulas evaluated by hand, zero initialisation, norms' epsilons, both layouts of the fused projection."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.models.attention import PIECE, Attention, FeedForward, SelfAttentionBlock, SpatialTransformer
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.blocks import (
    LARGEST_KERNEL,
    Downsample,
    ResBlock,
    Upsample,
    add,
    convolve,
    repeat_rows,
    silu,
    timestep_embedding,
)
from ldm.models.unet import UNet, UNetConfig


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dim", [6, 7])
def test_timestep_embedding(dim: int) -> None:
    """[cos(t f_i), sin(t f_i)], f_i = 10000^(-i / half); an odd width ends in a zero."""
    t = torch.tensor([0, 1, 500, 999])
    expected = [
        [math.cos(float(s) * 10_000 ** (-i / 3)) for i in range(3)]
        + [math.sin(float(s) * 10_000 ** (-i / 3)) for i in range(3)]
        + [0.0] * (dim - 6)
        for s in t
    ]
    assert_close(timestep_embedding(t, dim), torch.tensor(expected), rtol=0, atol=1e-4)
    assert_close(timestep_embedding(t.double() + 0.5, dim), timestep_embedding(t + 0.5, dim))


def test_asymmetric_downsample_looks_right_and_down() -> None:
    """Output pixel (i, j) sees input rows 2i..2i+2, the ones beyond the edge being zero; the UNet's sees 2i-1..2i+1."""
    x = torch.randn(1, 1, 6, 4)
    for asymmetric, first in ((True, 0), (False, -1)):
        layer = randomised(Downsample(1, asymmetric=asymmetric))
        padded = torch.zeros(1, 1, 9, 7)
        padded[:, :, 1:7, 1:5] = x
        expected = torch.stack(
            [
                torch.stack(
                    [
                        (
                            padded[0, 0, 2 * i + first + 1 :][:3, 2 * j + first + 1 :][:, :3]
                            * layer.conv.weight
                        ).sum()
                        for j in range(2)
                    ]
                )
                for i in range(3)
            ]
        )
        assert_close(layer(x)[0, 0], expected + layer.conv.bias)


def test_upsample_repeats_pixels() -> None:
    layer = Upsample(2).requires_grad_(False)
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    x = torch.randn(1, 2, 3, 5)
    assert_close(layer(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_feed_forward_is_geglu() -> None:
    """proj_out(value * gate * Phi(gate)), with the exact normal distribution function."""
    layer = randomised(FeedForward(4))
    x = torch.randn(2, 3, 4)
    value, gate = layer.proj_in(x).chunk(2, dim=-1)
    expected = layer.proj_out(value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2)
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_by_hand() -> None:
    """Each head: softmax(q k^T / sqrt(d)) v."""
    layer = randomised(Attention(6, 5, heads=2))
    x, context = torch.randn(2, 4, 6), torch.randn(2, 3, 5)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(3)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    assert_close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)), rtol=1e-5, atol=1e-5)
    assert all(getattr(layer, name).bias is None for name in ("to_q", "to_k", "to_v"))


@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
def test_layout_of_the_fused_projection(order: str) -> None:
    """heads_first: q k v of head 0, then of head 1; qkv_first: q of all heads, then k, then v."""
    channels, heads, size = 8, 2, 4
    block = randomised(SelfAttentionBlock(channels, heads, groups=2, qkv_order=order))
    x = torch.randn(2, channels, 3, 3)
    fused = block.qkv(block.norm(x).flatten(2))  # (B, 3C, N)
    outputs = []
    for head in range(heads):
        starts = [
            (3 * head + i) * size if order == "heads_first" else i * channels + head * size for i in range(3)
        ]
        q, k, v = (fused[:, start : start + size] for start in starts)
        weights = torch.einsum("bdn,bdm->bnm", q, k).div(math.sqrt(size)).softmax(dim=-1)
        outputs.append(torch.einsum("bnm,bdm->bdn", weights, v))
    expected = x + block.proj_out(torch.cat(outputs, dim=1)).view_as(x)
    assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "block",
    [
        ResBlock(4, 4, 8, groups=2),
        SelfAttentionBlock(4, 2, groups=2),
        SpatialTransformer(4, 5, 2, groups=2),
        SpatialTransformer(4, 5, 2, groups=2, linear_projection=True),
    ],
    ids=["residual", "adm attention", "transformer", "transformer with linear projection"],
)
def test_a_new_block_is_the_identity(block: nn.Module) -> None:
    x = torch.randn(2, 4, 4, 4)
    second = torch.randn(2, 8) if isinstance(block, ResBlock) else None
    if isinstance(block, SpatialTransformer):
        second = torch.randn(2, 3, 5)
    assert torch.equal(block(x, second), x)


def test_linear_projection_is_the_same_function() -> None:
    convolution = randomised(SpatialTransformer(8, 5, 2, groups=2))
    linear = SpatialTransformer(8, 5, 2, groups=2, linear_projection=True).requires_grad_(False)
    shapes = linear.state_dict()
    linear.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in convolution.state_dict().items()})
    x, context = torch.randn(2, 8, 4, 6), torch.randn(2, 3, 5)
    assert_close(linear(x, context), convolution(x, context), rtol=1e-5, atol=1e-5)


def test_scale_shift_norm() -> None:
    """norm2(h) (1 + scale) + shift instead of norm2(h + projection)."""
    block = randomised(ResBlock(4, 6, 8, groups=2, scale_shift=True))
    x, emb = torch.randn(2, 4, 4, 4), torch.randn(2, 8)
    silu = nn.functional.silu
    scale, shift = block.time_proj(silu(emb))[..., None, None].chunk(2, dim=1)
    h = block.norm2(block.conv1(silu(block.norm1(x)))) * (1 + scale) + shift
    assert_close(block(x, emb), block.shortcut(x) + block.conv2(silu(h)))


@pytest.mark.parametrize(("way", "size"), [("up", 8), ("down", 2)])
def test_resampling_inside_a_block(way: str, size: int) -> None:
    """Branch and shortcut are both resampled: nearest neighbours up, means of 2x2 down; a new block does just that."""
    block = ResBlock(4, 4, 8, groups=2, resample=way)
    x = torch.randn(2, 4, 4, 4)
    expected = (
        x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if way == "up"
        else x.unfold(2, 2, 2).unfold(3, 2, 2)
    )
    expected = expected if way == "up" else expected.mean(dim=(-1, -2))
    result = block(x, torch.randn(2, 8))
    assert result.shape == (2, 4, size, size)
    assert_close(result, expected)


def test_epsilons_of_the_norms() -> None:
    """1e-5 in the UNet's residual blocks, ADM attention and output; 1e-6 in spatial transformers and the autoencoder."""
    small = {"model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4, "num_heads": 2}
    for config in (
        UNetConfig(**small, context_dim=6),
        UNetConfig(**small, context_dim=None, attention="adm", attention_resolutions=(1, 2)),
    ):
        model = UNet(config)
        within = {id(m.norm) for m in model.modules() if isinstance(m, SpatialTransformer)}
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                assert module.eps == (1e-6 if id(module) in within else 1e-5)
            elif isinstance(module, nn.LayerNorm):
                assert module.eps == 1e-5
    autoencoder = AutoencoderKL(AutoencoderConfig(base_channels=8, norm_groups=4, attention_levels=(1,)))
    epsilons = {module.eps for module in autoencoder.modules() if isinstance(module, nn.GroupNorm)}
    assert epsilons == {1e-6}


def test_rows_repeat_as_the_whole_batch_again() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(repeat_rows(x, 6), torch.cat([x] * 3))
    assert torch.equal(repeat_rows(x[:1], 3), torch.cat([x[:1]] * 3))
    assert repeat_rows(x, 2) is x
    assert repeat_rows(x[:1], 3).data_ptr() == x.data_ptr()  # of one row a view
    with pytest.raises(ValueError, match="batch of 2 cannot be repeated to 5"):
        repeat_rows(x, 5)


def test_in_place_only_where_no_gradient_is_recorded() -> None:
    """And never into another number format, as under autocast."""
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            branch = y.clone()
            result = add(branch, x)
            assert torch.equal(result, y + x)
            assert (result is branch) is not recorded
            own = x.clone()
            assert torch.equal(silu(own), torch.nn.functional.silu(x))
            assert torch.equal(own, x) is recorded
            assert add(y.bfloat16(), x).dtype == torch.float32


def test_feed_forward_in_pieces() -> None:
    """Without gradients the tokens go through in pieces, the last one shorter; each is computed by itself."""
    layer = randomised(FeedForward(4))
    x = torch.randn(3, PIECE // 2 + 1, 4)
    whole = layer(x)
    sizes = []
    layer.proj_in.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        assert_close(layer(x), whole, rtol=0, atol=1e-5)
    assert sizes == [PIECE, PIECE // 2 + 3]


@pytest.mark.parametrize("bias", [True, False])
def test_large_kernels_in_pieces(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; with a gradient, on another device or of another module the plain call."""
    layer, x = nn.Conv2d(8, 6, 3, padding=1, bias=bias), torch.randn(2, 8, 5, 4)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    expected = layer(x)
    monkeypatch.setattr("ldm.models.blocks.LARGEST_KERNEL", layer.weight.nbytes // 4)
    with torch.no_grad():
        assert_close(convolve(layer, x), expected, rtol=0, atol=1e-6)
        assert len(calls) == 1
        assert torch.equal(convolve(nn.Identity(), x), x)
        layer.to("meta")(x.to("meta"))
    assert len(calls) == 2
    assert LARGEST_KERNEL < 2**25
    with torch.enable_grad():
        assert convolve(nn.Conv2d(8, 6, 3), x).requires_grad
