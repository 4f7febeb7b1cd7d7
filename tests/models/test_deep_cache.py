"""DeepCache: bit-equal at every 1, the step between by hand, when it begins anew, prompts that are not mixed."""

import pytest
import torch
from networks import randomised
from torch import Tensor
from torch.testing import assert_close

from ldm.models.deep_cache import DeepCache
from ldm.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("no_grad")
SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 2, "norm_groups": 8, "num_heads": 2}
CONFIGS = {
    "transformer": UNetConfig(**SMALL, context_dim=12, attention_resolutions=(1, 2)),
    "pooled": UNetConfig(**SMALL, context_dim=12, attention_resolutions=(2,), pooled_context=True),
    "adm": UNetConfig(**SMALL, context_dim=None, attention="adm", num_classes=5, resblock_updown=True),
}


class Watched(UNet):
    """Counts the runs of the whole network."""

    runs = 0

    def forward(self, *args, **named):
        self.runs += 1
        return super().forward(*args, **named)


@pytest.fixture(params=CONFIGS)
def unet(request: pytest.FixtureRequest) -> Watched:
    return randomised(Watched(CONFIGS[request.param]))


@pytest.fixture
def plain() -> Watched:
    return randomised(Watched(CONFIGS["transformer"]))


def inputs(unet: UNet, batch: int = 2) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, context and y."""
    context = torch.randn(batch, 5, 12) if unet.config.context_dim else None
    y = torch.arange(batch) if unet.config.num_classes else None
    return torch.randn(batch, 4, 8, 8), context, y


def at(t: float, batch: int = 2) -> Tensor:
    return torch.full((batch,), t)


def runs(cache: DeepCache, calls: list[tuple[float, Tensor, Tensor]]) -> list[bool]:
    """Whether each call (t, x, context) ran the whole network."""
    whole = []
    for t, x, context in calls:
        before = cache.unet.runs
        cache(x, at(t, len(x)), context)
        whole.append(cache.unet.runs > before)
    return whole


def test_every_one_is_bit_equal(unet: Watched) -> None:
    x, context, y = inputs(unet)
    cache = DeepCache(unet, 1)
    for t in (900.0, 500.0, 100.0):
        assert torch.equal(cache(x, at(t), context, y), unet(x, at(t), context, y))


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_the_step_between_is_the_network_with_an_old_feature(unet: Watched, branch: int) -> None:
    """The whole network, in which the feature of the step before is put at its place by hooks."""
    x, context, y = inputs(unet)
    later = x + 0.3 * torch.randn_like(x)
    stage = unet.up_blocks[-1].resnets[-1 - branch]
    skip = 16  # channels of each skip of the first level
    old = []
    handle = stage.register_forward_pre_hook(lambda module, given: old.append(given[0][:, :-skip].clone()))
    first = unet(x, at(800.0), context, y)
    handle.remove()
    handle = stage.register_forward_pre_hook(
        lambda module, given: (torch.cat([old[0], given[0][:, -skip:]], dim=1), given[1])
    )
    expected = unet(later, at(700.0), context, y)
    handle.remove()

    cache = DeepCache(unet, 2, branch)
    unet.runs = 0
    assert torch.equal(cache(x, at(800.0), context, y), first)
    (kept,) = cache.kept.values()
    feature = kept.feature.clone()
    between = cache(later, at(700.0), context, y)
    assert unet.runs == 1
    assert torch.equal(kept.feature, feature)
    assert_close(between, expected, rtol=0, atol=1e-6)
    exact = unet(later, at(700.0), context, y)
    assert not torch.allclose(between, exact, atol=1e-4)
    assert torch.equal(cache(later, at(600.0), context, y), unet(later, at(600.0), context, y))


def test_no_hook_is_left(plain: Watched) -> None:
    x, context, _ = inputs(plain)
    cache = DeepCache(plain, 2)
    cache(x, at(800.0), context)
    with pytest.raises(ValueError, match="takes 4 channels"):
        cache(x[:, :3], at(700.0), context)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_the_pattern_of_steps(plain: Watched) -> None:
    x, context, _ = inputs(plain)
    steps = [(1000.0 - i, x, context) for i in range(7)]
    assert runs(DeepCache(plain, 3), steps) == [True, False, False, True, False, False, True]
    assert runs(DeepCache(plain, 1), steps) == [True] * 7


def test_a_new_trajectory_begins_anew(plain: Watched) -> None:
    x, context, _ = inputs(plain)
    cache = DeepCache(plain, 5)
    assert runs(cache, [(900.0, x, context), (800.0, x, context)]) == [True, False]
    assert runs(cache, [(850.0, x, context), (800.0, x, context)]) == [True, False]
    assert runs(cache, [(700.0, x[..., :4], context), (700.0, x, context)]) == [True, False]
    cache.reset()
    assert runs(cache, [(600.0, x, context)] * 3) == [True] * 3  # trajectories of one step


def test_samplers_that_evaluate_twice_at_a_level(plain: Watched) -> None:
    """Heun's: the end of a step is the beginning of the next."""
    x, context, _ = inputs(plain)
    steps = [(t, x, context) for t in (900.0, 800.0, 800.0, 700.0, 700.0, 600.0, 600.0)]
    assert runs(DeepCache(plain, 3), steps) == [True, False, False, False, False, True, False]


def test_groups_of_a_batch_side_by_side(plain: Watched) -> None:
    """Two trajectories in lockstep, each with two evaluations a step."""
    x, cond, _ = inputs(plain)
    other = torch.randn(2, 5, 12)
    steps = [(t - d, x, context) for t in (900.0, 800.0) for context in (cond, other) for d in (0.0, 100.0)]
    cache, alone = DeepCache(plain, 9), {id(cond): DeepCache(plain, 9), id(other): DeepCache(plain, 9)}
    assert runs(cache, steps) == [True, False, True, False, False, False, False, False]
    cache.reset()
    for t, _, context in steps:
        assert torch.equal(cache(x, at(t), context), alone[id(context)](x, at(t), context))


def test_prompts_are_not_mixed(plain: Watched) -> None:
    """Two conditionings one after the other at each step, as for prompts of different lengths."""
    x, cond, _ = inputs(plain)
    uncond = torch.randn(2, 5, 12)
    cache = DeepCache(plain, 2)
    alone = [DeepCache(plain, 2), DeepCache(plain, 2)]
    for t in (900.0, 800.0, 700.0, 600.0):
        for context, one in ((uncond, alone[0]), (cond, alone[1])):
            assert torch.equal(cache(x, at(t), context), one(x, at(t), context))
    assert len(cache.kept) == 2


def test_what_is_old_is_forgotten(plain: Watched) -> None:
    """A conditioning that comes back after more than N steps, as around a guidance interval, is computed anew."""
    x, cond, _ = inputs(plain)
    other = torch.randn(2, 5, 12)
    cache = DeepCache(plain, 2)
    calls = [(900.0, x, cond), (800.0, x, other), (700.0, x, other), (600.0, x, cond), (500.0, x, cond)]
    assert runs(cache, calls) == [True, True, False, True, False]
    assert len(cache.kept) == 1


def test_a_context_made_anew_is_never_taken_for_another(plain: Watched) -> None:
    x, _, _ = inputs(plain)
    cache = DeepCache(plain, 4)
    for t in range(900, 880, -1):
        context = torch.randn(2, 5, 12)
        assert torch.equal(cache(x, at(float(t)), context), plain(x, at(float(t)), context))
        assert len(cache.kept) <= 5


def test_several_contexts_of_one_x(plain: Watched) -> None:
    """[uncond, cond] with the rows of x once, as guidance asks the network."""
    x, context, _ = inputs(plain, batch=4)
    x = x[:2]
    once, twice = DeepCache(plain, 2), DeepCache(plain, 2)
    for t in (900.0, 800.0):
        expected = twice(torch.cat([x, x]), at(t, 4), context)
        assert_close(once(x, at(t), context), expected, rtol=0, atol=1e-5)


def test_control_is_refused(plain: Watched) -> None:
    x, context, _ = inputs(plain)
    with pytest.raises(ValueError, match="leaves out the layers that a ControlNet steers"):
        DeepCache(plain, 2)(x, at(5.0), context, control=[x])


@pytest.mark.parametrize(
    ("every", "branch", "message"),
    [(0, 0, "N at least 1, got 0"), (2, 3, "between 0 and num_res_blocks 2, got 3"), (2, -1, "got -1")],
)
def test_bad_options_are_refused(plain: Watched, every: int, branch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepCache(plain, every, branch)
