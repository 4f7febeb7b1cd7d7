"""Activation checkpointing: the same gradients to the bit, fewer activations kept, and what a copy does."""

import pytest
import torch
from torch import nn

from ldm.losses.adversarial import adaptive_weight
from ldm.models.autoencoder import AutoencoderConfig, make_autoencoder
from ldm.models.blocks import ResBlock
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.variants import sharing
from train.recompute import recompute_blocks

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    context_dim=16,
    num_heads=2,
    norm_groups=8,
    dropout=0.3,
    sample_size=8,
)
ADM = UNetConfig(
    **{
        **vars(CONFIG),
        "attention": "adm",
        "context_dim": None,
        "resblock_updown": True,
        "scale_shift_norm": True,
    }
)


def network(make, recomputing):
    torch.manual_seed(1)
    module = make()
    for parameter in module.parameters():  # those that begin with zeros, too
        nn.init.normal_(parameter, std=0.1)
    if recomputing:
        recompute_blocks(module)
    return module


def kept_bytes(compute):
    """The result, and the size of what the graph keeps for the backward pass, parameters aside."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return result, sum(kept.values())


def gradients_of(module, *inputs):
    torch.manual_seed(2)  # of the dropout
    outputs, kept = kept_bytes(lambda: module(*inputs))
    outputs.square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters()}, kept


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("config", [CONFIG, ADM], ids=["transformer", "adm"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_unet_are_equal_to_the_bit_and_less_is_kept(config, autocast):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    context = torch.randn(2, 5, 16) if config.context_dim else None
    results = []
    for recomputing in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients_of(network(lambda: UNet(config), recomputing), x, t, context))
    (plain, kept), (again, kept_less) = results
    assert_equal_gradients(plain, again)
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())
    assert kept_less < 0.5 * kept


def test_gradients_of_a_text_tower_are_equal_to_the_bit():
    config = TextConfig(width=16, layers=2, heads=2)
    ids = torch.randint(1000, (2, config.context_length))
    plain, again = (gradients_of(network(lambda: TextEncoder(config), on), ids) for on in (False, True))
    assert_equal_gradients(plain[0], again[0])
    assert again[1] < plain[1]


def test_gradients_of_an_autoencoder_through_the_adaptive_weight_are_equal_to_the_bit():
    """That takes two gradients of the graph before the backward pass, and keeps it."""
    config = AutoencoderConfig(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
    images = torch.randn(2, 3, 16, 16)
    noise = torch.randn(2, 4, 8, 8)
    found = []
    for recomputing in (False, True):
        model = network(lambda: make_autoencoder(config), recomputing)
        output, _ = model(images, noise)
        near, far = (output - images).abs().mean(), output.square().mean()
        factor = adaptive_weight(near, far, model.decoder.conv_out.weight)
        (near + factor * far).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_equal_gradients(*found)


def test_without_gradients_a_block_runs_once(monkeypatch):
    block = ResBlock(8, 8, None, groups=4)
    recompute_blocks(block)
    monkeypatch.setattr("train.recompute.checkpoint", None)  # would be called, and fail
    with torch.no_grad():
        assert block(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_a_copy_runs_its_own_layers():
    unet = network(lambda: UNet(CONFIG), True)
    variant = sharing(unet)
    block = variant.down_blocks[0].resnets[0]
    assert block.forward.__self__ is block
    block.conv2 = nn.Identity()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    with torch.no_grad():
        unet.eval(), variant.eval()
        assert not torch.equal(unet(x, t, context), variant(x, t, context))
