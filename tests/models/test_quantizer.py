"""The quantiser against hand-computed codes, losses and gradients, and against diffusers' on equal codebooks."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models import quantizer as module
from ldm.models.quantizer import CodeUsage, VectorQuantizer, perplexity, usage

CODES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])


def tiny(**options) -> VectorQuantizer:
    """Three codes in the plane."""
    quantizer = VectorQuantizer(3, 2, **options)
    quantizer.load_state_dict({"embedding.weight": CODES})
    return quantizer


def latents(*rows: list[tuple[float, float]]) -> Tensor:
    """A sample a row, (B, 2, 1, w)."""
    return torch.tensor(rows).permute(0, 2, 1)[:, :, None]


def random(size: int, dim: int) -> VectorQuantizer:
    """Codes as far apart as those of a trained codebook."""
    quantizer = VectorQuantizer(size, dim)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_nearest_codes() -> None:
    z = latents([(0.1, 0.2), (0.9, -0.1)], [(0.4, 1.9), (0.6, 0.5)])
    quantized = tiny()(z)
    assert quantized.indices.tolist() == [[[0, 1]], [[2, 1]]]
    assert quantized.indices.dtype == torch.int64
    assert_close(quantized.z_q, latents([(0.0, 0.0), (1.0, 0.0)], [(0.0, 2.0), (1.0, 0.0)]), rtol=0, atol=0)


def test_places_are_kept() -> None:
    """Rows, columns and channels in their order: codes of a map in, the same map out."""
    quantizer = random(64, 3)
    indices = torch.randint(64, (2, 5, 4))
    z = quantizer.lookup(indices)
    assert z.shape == (2, 3, 5, 4)
    assert_close(z[1, :, 3, 2], quantizer.embedding.weight[indices[1, 3, 2]])
    noisy = quantizer(z.detach() + 1e-4)
    assert bool((noisy.indices == indices).all())
    assert_close(noisy.z_q, z, rtol=0, atol=0)


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_its_gradients(legacy: bool) -> None:
    """|z - e|^2 is 0.05 and 0.02 at the first sample's two places, 0.17 and 0.41 at the second's; a sample has 4 values."""
    quantizer = tiny(beta=0.3, legacy=legacy)
    z = latents([(0.1, 0.2), (0.9, -0.1)], [(0.4, 1.9), (0.6, 0.5)]).requires_grad_()
    loss = quantizer(z).loss
    assert_close(loss, 1.3 * torch.tensor([0.07 / 4, 0.58 / 4]))
    loss.sum().backward()
    code_weight, latent_weight = (0.3, 1.0) if legacy else (1.0, 0.3)
    # d/dz |z - e|^2 / 4 = (z - e) / 2
    offsets = torch.tensor([[(0.1, 0.2), (-0.1, -0.1)], [(0.4, -0.1), (-0.4, 0.5)]])
    assert_close(z.grad, latent_weight * offsets.permute(0, 2, 1)[:, :, None] / 2)
    first, second = offsets.tolist()
    sums = [first[0], [a + b for a, b in zip(first[1], second[1], strict=True)], second[0]]
    assert_close(quantizer.embedding.weight.grad, -code_weight * torch.tensor(sums) / 2)


def test_gradient_passes_straight_through() -> None:
    quantizer, weights = tiny(), torch.randn(1, 2, 1, 3)
    z = torch.randn(1, 2, 1, 3, requires_grad=True)
    (quantizer(z).z_q * weights).sum().backward()
    assert_close(z.grad, weights, rtol=0, atol=0)
    assert quantizer.embedding.weight.grad is None


def test_codes_far_from_the_origin() -> None:
    """Spacings far below the square's rounding still decide."""
    quantizer = VectorQuantizer(3, 2)
    quantizer.load_state_dict({"embedding.weight": 1000 + 0.01 * CODES})
    z = 1000 + 0.01 * latents([(0.1, 0.2), (0.9, -0.1), (0.4, 1.9), (0.6, 0.5)])
    assert quantizer(z).indices.tolist() == [[[0, 1, 2, 1]]]


def test_start_of_the_codebook() -> None:
    weight = VectorQuantizer(500, 8).embedding.weight.detach()
    assert float(weight.abs().max()) <= 1 / 500
    assert_close(float(weight.std()), 1 / 500 / math.sqrt(3), rtol=0.05, atol=0)


def test_perplexity() -> None:
    """exp of the entropy: k where k codes are equally frequent; 1/2, 1/4, 1/4 give 2^1.5."""
    assert_close(float(perplexity(torch.full((2, 3, 3), 4), 7)), 1.0)
    assert_close(float(perplexity(torch.arange(8).view(2, 2, 2), 8)), 8.0, rtol=1e-6, atol=0)
    assert_close(float(perplexity(torch.tensor([[[0, 0], [5, 6]]]), 16)), 2**1.5, rtol=1e-6, atol=0)


def test_usage() -> None:
    assert float(usage(torch.full((2, 3, 3), 4), 8)) == 1 / 8
    assert float(usage(torch.arange(8).view(2, 2, 2), 8)) == 1.0
    assert float(usage(torch.tensor([[[0, 0], [5, 6]]]), 16)) == 3 / 16


def test_idle_steps_are_counted() -> None:
    """A step may come in parts: the first one begins it, and a use in any of them counts."""
    codes = CodeUsage(4, revive_after=2)
    assert codes.dead() == 0
    codes.count(torch.tensor([[[0, 0]]]))
    assert codes.idle.tolist() == [0, 1, 1, 1]
    codes.count(torch.tensor([[[1, 0]]]), part=0)
    codes.count(torch.tensor([[[2, 0]]]), part=1)
    assert codes.idle.tolist() == [0, 0, 0, 2]
    assert codes.dead() == 1
    assert codes.state_dict().keys() == {"idle"}  # so it is in a run's state


def test_dead_codes_become_latents() -> None:
    quantizer, codes = random(6, 2), CodeUsage(6, revive_after=3)
    before = quantizer.embedding.weight.detach().clone()
    codes.idle.copy_(torch.tensor([0, 3, 2, 7, 1, 4]))
    z = torch.randn(2, 2, 3, 5)
    rng = torch.Generator().manual_seed(1)
    assert codes.revive(quantizer.embedding.weight, z, rng) == 3
    after = quantizer.embedding.weight.detach()
    assert_close(after[[0, 2, 4]], before[[0, 2, 4]], rtol=0, atol=0)
    assert codes.idle.tolist() == [0, 0, 2, 0, 1, 0]
    places = {tuple(row) for row in z.permute(0, 2, 3, 1).reshape(-1, 2).tolist()}
    chosen = [tuple(row) for row in after[[1, 3, 5]].tolist()]
    assert set(chosen) <= places and len(set(chosen)) == 3
    assert quantizer.embedding.weight.requires_grad and quantizer.embedding.weight.grad is None
    assert codes.revive(quantizer.embedding.weight, z, rng) == 0  # none is dead any more


def test_revival_is_a_function_of_the_generator() -> None:
    z, results = torch.randn(1, 2, 8, 8), []
    for seed in (3, 3, 4):
        codes, table = CodeUsage(5, revive_after=1), torch.zeros(5, 2)
        codes.idle.fill_(1)
        codes.revive(table, z, torch.Generator().manual_seed(seed))
        results.append(table)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_more_dead_codes_than_places() -> None:
    """Those dead for longest come first, so that every code has its turn."""
    codes, table, z = CodeUsage(4, revive_after=1), torch.zeros(4, 2), torch.ones(1, 2, 1, 2)
    codes.idle.copy_(torch.tensor([1, 5, 2, 5]))
    assert codes.revive(table, z, torch.Generator()) == 2
    assert table[:, 0].tolist() == [0, 1, 0, 1]
    assert codes.idle.tolist() == [1, 0, 2, 0]


def test_broken_latents_replace_nothing() -> None:
    codes, table = CodeUsage(2, revive_after=1), torch.zeros(2, 2)
    codes.idle.fill_(9)
    assert codes.revive(table, torch.tensor([[[[1.0]], [[math.nan]]]]), torch.Generator()) == 0
    assert not table.any() and codes.dead() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(dtype: torch.dtype) -> None:
    """The choice is made in float32 on the weights as they are; values come back in the latents' format."""
    quantizer = random(256, 4).to(dtype)
    z = torch.randn(2, 4, 5, 3, dtype=dtype)
    quantized = quantizer(z)
    codes, flat = quantizer.embedding.weight.double(), z.double().permute(0, 2, 3, 1)[..., None, :]
    distances = (flat - codes).square().sum(-1)
    assert bool((quantized.indices == distances.argmin(-1)).all())
    assert quantized.z_q.dtype == dtype
    assert quantized.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(quantized.z_q, quantizer.lookup(quantized.indices), rtol=0, atol=0)


def test_autocast_does_not_reach_the_choice() -> None:
    quantizer, z = random(256, 4), torch.randn(2, 4, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z)
    assert_close(cast.indices, quantizer(z).indices, rtol=0, atol=0)
    assert cast.loss.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 positions and 16384 codes would be 2^26 distances; and the chunks' size does not change the result."""
    quantizer, z = random(16384, 3), torch.randn(1, 3, 64, 64)
    with Largest() as watch, torch.no_grad():
        indices = quantizer(z).indices
    assert 16384 < watch.numel <= module.CHUNK
    monkeypatch.setattr(module, "CHUNK", 16384 * 500)
    assert bool((quantizer(z).indices == indices).all())
    monkeypatch.setattr(module, "CHUNK", 1)  # still one position at a time
    assert bool((quantizer(z[..., :2, :3]).indices == indices[:, :2, :3]).all())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_latents_stay_visible(broken: float) -> None:
    z = latents([(0.1, 0.2), (broken, 0.0)])
    with torch.no_grad():
        z_q = tiny()(z).z_q
    assert z_q[0, 0, 0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("wrong", [-1, 3])
def test_lookup_wants_known_codes(wrong: int) -> None:
    with pytest.raises(
        ValueError, match=rf"code numbers must be in 0\.\.2, got {min(wrong, 0)}\.\.{max(wrong, 0)}"
    ):
        tiny().lookup(torch.tensor([[[0, wrong]]]))


@pytest.mark.parametrize("legacy", [True, False])
def test_equals_that_of_diffusers(legacy: bool) -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.vq_model import VectorQuantizer as Theirs

    theirs = Theirs(64, 4, beta=0.25, legacy=legacy, sane_index_shape=True)
    torch.nn.init.normal_(theirs.embedding.weight)
    ours = VectorQuantizer(64, 4, legacy=legacy)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(3, 4, 6, 5)
    both, weights = [z.clone().requires_grad_() for _ in range(2)], torch.randn_like(z)
    z_q, loss, (_, _, indices) = theirs(both[0])
    quantized = ours(both[1])
    assert bool((quantized.indices == indices).all())
    assert_close(quantized.z_q, z_q, rtol=0, atol=1e-6)
    assert_close(quantized.loss.mean(), loss, rtol=1e-6, atol=0)
    (loss + (z_q * weights).mean()).backward()
    (quantized.loss.mean() + (quantized.z_q * weights).mean()).backward()
    assert_close(both[1].grad, both[0].grad, rtol=0, atol=1e-7)
    assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad, rtol=0, atol=1e-7)
    assert_close(ours.lookup(indices), theirs.get_codebook_entry(indices, (3, 6, 5, 4)), rtol=0, atol=0)
