"""The moving average of weights: its formula, its warm-up, and the exchange with the model's own weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from train.ema import EMA


def test_formula_with_warm_up():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA({"w": weight}, decay=0.3)
    expected = weight.detach().double().clone()
    for n in range(1, 21):
        with torch.no_grad():
            weight.copy_(torch.tensor([n, n**0.5]))
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach().double()
        assert_close(ema.shadow["w"].double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.updates == 20


@pytest.mark.parametrize(("updates", "decay"), [(0, 2 / 11), (9, 11 / 20), (88, 90 / 99), (10**6, 0.9999)])
def test_decay_of_one_update(updates, decay):
    """From 0 towards 1 the average moves by 1 - decay; the cap is reached only after 89,990 updates."""
    weight = nn.Parameter(torch.zeros(3))
    ema = EMA({"w": weight}, decay=0.9999)
    ema.updates = updates
    nn.init.ones_(weight)
    ema.update()
    assert_close(ema.shadow["w"], torch.full((3,), 1 - decay), rtol=1e-5, atol=1e-8)


def test_no_decay_follows_the_weights():
    weight = nn.Parameter(torch.zeros(3))
    ema = EMA({"w": weight}, decay=0.0)
    nn.init.constant_(weight, 5.0)
    ema.update()
    assert torch.equal(ema.shadow["w"], weight)


def model_and_average():
    model = nn.Linear(3, 2)
    ema = EMA(dict(model.named_parameters()), decay=0.9)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    ema.update()
    return model, ema


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_averaged_exchanges_and_restores():
    model, ema = model_and_average()
    own, average = copies(model.state_dict()), copies(ema.shadow)
    with ema.averaged():
        assert same(model.state_dict(), average)
        assert not same(model.state_dict(), own)
        nn.init.zeros_(model.weight)  # whatever happens inside stays inside
    assert same(model.state_dict(), own)
    assert same(ema.shadow, average)


def test_averaged_restores_after_an_error():
    model, ema = model_and_average()
    own, average = copies(model.state_dict()), copies(ema.shadow)
    with pytest.raises(KeyError), ema.averaged():
        raise KeyError
    assert same(model.state_dict(), own)
    assert same(ema.shadow, average)


def test_half_precision_weights_have_a_float32_average():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA({"w": weight}, decay=0.5)
    nn.init.constant_(weight, 2.0)
    for _ in range(3):
        ema.update()
    average = copies(ema.shadow)
    assert average["w"].dtype == torch.float32
    assert average["w"] != average["w"].bfloat16()  # finer than the weights can hold
    with ema.averaged():
        assert weight.dtype == torch.bfloat16
    assert weight.item() == 2
    assert same(ema.shadow, average)


def test_it_keeps_no_gradient():
    model, ema = model_and_average()
    assert not any(tensor.requires_grad for tensor in ema.shadow.values())
    with ema.averaged():
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay_is_refused(decay):
    with pytest.raises(ValueError, match=r"EMA decay must be in \[0, 1\)"):
        EMA({}, decay)
