"""Attention in bfloat16: in training of short sequences computed in float32 on the CPU, else as torch has it."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ldm.models.attention import SHORT, attend


def qkv(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(2, 3, size, 8).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_attention_trains_in_float32(causal: bool, autocast: bool) -> None:
    """Output and gradients are float32's, rounded once."""
    low = qkv(9, 9, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h = attend(*low, causal=causal)
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected.bfloat16())
    h.float().square().sum().backward()
    (expected.bfloat16().float().square().sum()).backward()
    for a, b in zip(low, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert_close(a.grad.float(), b.grad, rtol=2**-7, atol=1e-3)


def test_long_attention_and_inference_are_torchs() -> None:
    for x, trains in ((qkv(SHORT + 1, 5, torch.bfloat16), True), (qkv(9, 5, torch.bfloat16), False)):
        with torch.set_grad_enabled(trains):
            assert torch.equal(attend(*x), F.scaled_dot_product_attention(*x))
    x = qkv(9, 5, torch.float32)
    assert torch.equal(attend(*x), F.scaled_dot_product_attention(*x))
