"""Token merging: exact where tokens repeat, the merges one by one, bit-equal at ratio 0, error with the ratio."""

import pytest
import torch
from networks import randomised
from torch import Tensor
from torch.testing import assert_close

from ldm.models.attention import Attention
from ldm.models.token_merging import Merge, MergedAttention, is_destination, merging
from ldm.models.unet import UNet, UNetConfig
from ldm.models.variants import perturbed
from sample.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("no_grad")
CONFIG = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, num_heads=2, context_dim=12,
    attention_resolutions=(1, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(CONFIG))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 6, 8), torch.arange(batch) * 300, torch.randn(batch, 5, 12)


def test_destinations_are_the_upper_left_of_each_square() -> None:
    grid = is_destination(3, 5, torch.device("cpu")).reshape(3, 5)
    assert grid.nonzero().tolist() == [[0, 0], [0, 2], [0, 4], [2, 0], [2, 2], [2, 4]]


def test_merging_equal_tokens_is_exact() -> None:
    """Squares of four equal tokens: each left over stands for four, so the softmax is the same."""
    attention = randomised(Attention(12, None, 3))
    x = torch.randn(2, 12, 3, 4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (2, 12, 6, 8)
    x = x.flatten(2).transpose(1, 2)  # (2, 48, 12)
    merged = MergedAttention(attention, 0.75)
    merged.height = 6
    assert Merge.of(x, 6, 0.75)(x).shape == (2, 12, 12)
    assert_close(merged(x), attention(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_each_merge_by_hand(size: tuple[int, int], ratio: float) -> None:
    """Written with loops: the likest sources into their likest destinations, and back."""
    height, width = size
    x = torch.randn(1, height * width, 8, dtype=torch.float64)
    merge = Merge.of(x, height, ratio)
    places = [(i, j) for i in range(height) for j in range(width)]
    destinations = [n for n, (i, j) in enumerate(places) if i % 2 == j % 2 == 0]
    sources = [n for n in range(len(places)) if n not in destinations]
    likeness = {
        s: max((float(torch.cosine_similarity(x[0, s], x[0, d], dim=0)), d) for d in destinations)
        for s in sources
    }
    count = min(int(ratio * len(places)), len(sources))
    gone = sorted(sources, key=lambda s: -likeness[s][0])[:count]
    expected = x.clone()
    for d in destinations:
        group = [d, *(s for s in gone if likeness[s][1] == d)]
        expected[0, group] = x[0, group].mean(dim=0)
    assert merge(x).shape[1] == len(places) - count
    assert_close(merge.undo(merge(x)), expected, rtol=0, atol=1e-12)


def test_ratio_zero_is_bit_equal(unet: UNet) -> None:
    x, t, context = inputs()
    assert torch.equal(merging(unet, 0)(x, t, context), unet(x, t, context))
    x = torch.randn(2, 12, 8)
    merge = Merge.of(x, 3, 0)
    assert torch.equal(merge.undo(merge(x)), x)


def test_it_shares_the_weights_and_leaves_the_base(unet: UNet) -> None:
    x, t, context = inputs()
    before = unet(x, t, context)
    merged = merging(unet, 0.5)
    assert {p.data_ptr() for p in merged.parameters()} == {p.data_ptr() for p in unet.parameters()}
    assert not torch.equal(merged(x, t, context), before)
    assert torch.equal(unet(x, t, context), before)


@pytest.mark.parametrize(("resolutions", "count"), [(1, 3), (2, 7), (9, 7)])
def test_the_finest_resolutions_are_merged(unet: UNet, resolutions: int, count: int) -> None:
    merged = merging(unet, 0.5, resolutions)
    assert sum(isinstance(module, MergedAttention) for module in merged.modules()) == count


def test_a_sample_does_not_depend_on_its_batch(unet: UNet) -> None:
    x, t, context = inputs(3)
    merged = merging(unet, 0.5, 2)
    together = merged(x, t, context)
    for i in range(3):
        alone = merged(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_it_stacks_on_a_perturbed_network(unet: UNet) -> None:
    """Merging, then the identity as map, is merging alone; cross-attention and the rest stay."""
    x, t, context = inputs()
    weak = perturbed(unet, "all")
    assert_close(merging(weak, 0)(x, t, context), weak(x, t, context), rtol=0, atol=0)
    assert not torch.allclose(merging(weak, 0.5, 2)(x, t, context), weak(x, t, context), atol=1e-3)
    with pytest.raises(AssertionError, match="not a variant"):
        perturbed(merging(unet, 0.5), "all")


def test_error_grows_with_the_ratio_in_a_trained_model() -> None:
    emoji = Pipeline.load("emoji", device="cpu")
    context = emoji.encode_prompts(["a red apple, noto emoji"] * 2)
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 500.0)
    exact = emoji.unet(x, t, context)
    errors = [
        float((merging(emoji.unet, ratio)(x, t, context) - exact).norm() / exact.norm())
        for ratio in (0, 0.25, 0.5, 0.75)
    ]
    assert errors[0] == 0
    assert errors == sorted(errors) and len(set(errors)) == 4
    assert errors[-1] < 0.5


@pytest.mark.parametrize(
    ("ratio", "resolutions", "message"),
    [
        (0.8, 1, "must be between 0 and 0.75, got 0.8"),
        (-0.1, 1, "must be between 0 and 0.75, got -0.1"),
        (float("nan"), 1, "got nan"),
        (0.5, 0, "at least 1 resolution, got 0"),
    ],
)
def test_bad_options_are_refused(unet: UNet, ratio: float, resolutions: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merging(unet, ratio, resolutions)


def test_a_model_without_transformers_is_refused() -> None:
    config = UNetConfig(
        model_channels=16, channel_mult=(1,), norm_groups=8, attention="adm", context_dim=None
    )
    with pytest.raises(ValueError, match="token merging needs transformers, this UNet has 'adm' attention"):
        merging(UNet(config), 0.5)
