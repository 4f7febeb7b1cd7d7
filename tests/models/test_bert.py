"""The text tower of the original latent diffusion: its formula, both libraries' names, parity, behaviour."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.bert import BertTextConfig, BertTextEncoder
from ldm.weights import bert
from ldm.weights.io import load_strict

SMALL = {
    "vocab_size": 50,
    "context_length": 9,
    "width": 12,
    "layers": 3,
    "heads": 2,
    "head_channels": 5,  # inside, 10 channels stand for 12
    "mlp_width": 20,
}
CONFIG = BertTextConfig(**SMALL)
IDS = torch.tensor([[2, 7, 30, 49, 8, 3, 0, 0, 0], [2, 44, 44, 1, 12, 13, 14, 15, 3]])


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """Random values in every parameter, of a size that keeps activations near one; evaluation mode."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return module.eval().requires_grad_(False)


def encoder(**values: Any) -> BertTextEncoder:
    model = randomised(BertTextEncoder(BertTextConfig(**{**SMALL, **values})))
    assert isinstance(model, BertTextEncoder)
    return model


def ldm_bert(config: BertTextConfig) -> nn.Module:
    """diffusers' model of the same configuration, at random weights."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    return randomised(LDMBertModel(ldm_bert_config(config)))


def ldm_bert_config(config: BertTextConfig) -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

    return LDMBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        encoder_layers=config.layers,
        encoder_ffn_dim=config.mlp_width,
        encoder_attention_heads=config.heads,
        head_dim=config.head_channels,
        d_model=config.width,
    )


# Closed form


def test_without_its_branches_it_is_the_norm_of_the_embeddings() -> None:
    model = encoder()
    for block in model.blocks:
        for last in (block.to_out, block.fc2):
            last.weight.zero_()
            last.bias.zero_()
    x = model.token_embedding.weight[IDS] + model.position_embedding.weight  # neither is scaled
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-5).sqrt() * model.final_norm.weight + model.final_norm.bias
    assert_close(model(IDS), expected, rtol=0, atol=1e-5)


def test_the_formula_written_out() -> None:
    """Every operation by hand, in the original's names: softmax(q k^T / sqrt(64)), exact GELU, pre-norm."""
    model = encoder()
    w = {
        name.removeprefix("transformer."): t
        for name, t in bert.to_compvis(model.state_dict(), CONFIG).items()
    }

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_emb.weight"][IDS] + w["pos_emb.emb.weight"]
    for i in range(0, 6, 2):
        at = f"attn_layers.layers.{i}"
        h = norm(x, f"{at}.0")
        outputs = []
        for head in (slice(0, 5), slice(5, 10)):
            q, k, v = (h @ w[f"{at}.1.to_{y}.weight"][head].T for y in "qkv")
            outputs.append((q @ k.mT / 5**0.5).softmax(-1) @ v)
        x = x + torch.cat(outputs, -1) @ w[f"{at}.1.to_out.weight"].T + w[f"{at}.1.to_out.bias"]
        at = f"attn_layers.layers.{i + 1}"
        h = norm(x, f"{at}.0") @ w[f"{at}.1.net.0.0.weight"].T + w[f"{at}.1.net.0.0.bias"]
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        x = x + h @ w[f"{at}.1.net.2.weight"].T + w[f"{at}.1.net.2.bias"]
    assert_close(model(IDS), norm(x, "norm"), rtol=0, atol=1e-5)


def test_number_of_parameters() -> None:
    """The head over the vocabulary is counted in the model's name: 872,300,484 of the UNet + these = 1.45e9."""
    with torch.device("meta"):
        tower = BertTextEncoder(BertTextConfig())
    count = sum(parameter.numel() for parameter in tower.parameters())
    head = 1280 * 30522 + 30522
    assert count == 542_895_360
    assert round((872_300_484 + count + head) / 1e9, 2) == 1.45


# Names and parity


def test_parity_with_diffusers() -> None:
    theirs = ldm_bert(CONFIG)
    ours = BertTextEncoder(CONFIG).eval().requires_grad_(False)
    load_strict(ours, bert.to_ours(theirs.state_dict(), CONFIG), "diffusers")
    assert_close(ours(IDS), theirs(IDS).last_hidden_state, rtol=0, atol=1e-5)
    assert_close(ours(IDS[:, :4]), theirs(IDS[:, :4]).last_hidden_state, rtol=0, atol=1e-5)


def test_parity_of_the_published_shape() -> None:
    """As wide as text2img256 (heads 8 x 64 inside 640), two blocks of it, all 77 tokens."""
    config = BertTextConfig(vocab_size=100, width=640, layers=2, mlp_width=2560)
    theirs = ldm_bert(config)
    ours = BertTextEncoder(config).eval().requires_grad_(False)
    load_strict(ours, bert.to_ours(theirs.state_dict(), config), "diffusers")
    ids = torch.randint(100, (2, 77))
    assert_close(ours(ids), theirs(ids).last_hidden_state, rtol=0, atol=1e-5)


def tree(tensors: dict[str, Tensor]) -> Any:
    """Objects that answer to the dotted names: attributes, and lists where the names are numbers."""
    if "" in tensors:
        return nn.Parameter(tensors[""], requires_grad=False)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = tensor
    if not parts:
        return None  # a number without tensors: an activation
    if all(name.isdigit() for name in parts):
        return [tree(parts.get(str(i), {})) for i in range(max(map(int, parts)) + 1)]
    return type("Node", (), {name: tree(part) for name, part in parts.items()})()


def test_original_names_are_those_that_diffusers_converts() -> None:
    """diffusers' own conversion reads our CompVis tensors, and the model it makes agrees with ours."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint

    ours = encoder()
    original = bert.to_compvis(ours.state_dict(), CONFIG)
    head = {
        "transformer.to_logits.weight": torch.zeros(50, 12),
        "transformer.to_logits.bias": torch.zeros(50),
    }
    theirs = convert_ldm_bert_checkpoint(tree(original | head), ldm_bert_config(CONFIG))
    assert_close(ours(IDS), theirs(IDS).last_hidden_state, rtol=0, atol=1e-5)
    assert_close(
        {name: t for name, t in theirs.state_dict().items() if not name.startswith("to_logits.")},
        bert.to_diffusers(ours.state_dict(), CONFIG),
        rtol=0,
        atol=0,
    )


TABLES = {
    "compvis": (bert.to_compvis, "transformer.to_logits."),
    "diffusers": (bert.to_diffusers, "to_logits."),
}


@pytest.mark.parametrize("table", TABLES)
def test_round_trip_is_bit_equal_and_drops_the_head(table: str) -> None:
    to_theirs, head = TABLES[table]
    ours = dict(encoder().state_dict())
    theirs = to_theirs(ours, CONFIG)
    with_head = theirs | {f"{head}weight": torch.randn(50, 12), f"{head}bias": torch.randn(50)}
    back = bert.to_ours(with_head, CONFIG)
    assert_close(back, ours, rtol=0, atol=0)
    load_strict(BertTextEncoder(CONFIG), back, "the round trip")
    assert_close(to_theirs(back, CONFIG), theirs, rtol=0, atol=0)


def test_names_of_the_published_model() -> None:
    names = bert.compvis_names(BertTextConfig())
    with torch.device("meta"):
        assert set(names) == set(BertTextEncoder(BertTextConfig()).state_dict())
    theirs = {bert.PREFIX + name for name in names.values()}
    assert len(theirs) == len(names) == 2 + 2 + 32 * 13
    assert {
        "cond_stage_model.transformer.token_emb.weight",
        "cond_stage_model.transformer.pos_emb.emb.weight",
        "cond_stage_model.transformer.attn_layers.layers.62.1.to_out.bias",
        "cond_stage_model.transformer.attn_layers.layers.63.1.net.0.0.weight",
        "cond_stage_model.transformer.norm.bias",
    } <= theirs
    assert "cond_stage_model.transformer.attn_layers.layers.0.1.to_q.bias" not in theirs


@pytest.mark.parametrize("table", TABLES)
def test_wrong_tensors_are_named(table: str) -> None:
    to_theirs, _ = TABLES[table]
    ours = dict(encoder().state_dict())
    theirs = to_theirs(ours, CONFIG)
    theirs["transformer.memory_tokens" if table == "compvis" else "pooler.bias"] = torch.zeros(1)
    last = list(theirs)[2]
    del theirs[last]
    with pytest.raises(
        ValueError, match="the file does not fit .*1 missing: .*; 1 unexpected: (transf|pooler)"
    ):
        load_strict(BertTextEncoder(CONFIG), bert.to_ours(theirs, CONFIG), "the file")
    del ours["final_norm.bias"]
    with pytest.raises(ValueError, match="1 tensors are missing or unknown: final_norm.bias"):
        to_theirs(ours, CONFIG)


# Behaviour


def test_every_token_sees_every_other_and_the_padding() -> None:
    model = encoder()
    for position in range(9):
        changed = IDS.clone()
        changed[0, position] = 21
        difference = (model(changed) - model(IDS))[0].abs().amax(-1)
        assert bool((difference > 1e-4).all()), f"token {position} does not reach {difference.argmin()}"
    assert not torch.allclose(model(IDS[:1, :6]), model(IDS[:1])[:, :6], atol=1e-3), "padding matters"


def test_only_the_positions_tell_the_order() -> None:
    model, order = encoder(), torch.randperm(9)
    assert not torch.allclose(model(IDS[:, order]), model(IDS)[:, order], atol=1e-3)
    model.position_embedding.weight.zero_()
    assert_close(model(IDS[:, order]), model(IDS)[:, order], rtol=0, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch() -> None:
    model = encoder()
    assert_close(model(IDS)[1:], model(IDS[1:]), rtol=0, atol=1e-5)


def test_it_trains() -> None:
    """Its loss reaches every weight but the embeddings of words that do not occur."""
    model = BertTextEncoder(CONFIG)
    model(IDS).square().mul(torch.arange(12.0)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    grad = model.token_embedding.weight.grad
    assert grad is not None and set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(
        IDS.flatten().tolist()
    )


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="takes 9 tokens, got 10"):
        encoder()(torch.zeros(1, 10, dtype=torch.int64))


@pytest.mark.parametrize("name", SMALL)
def test_errors_of_a_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=f"BERT text {name} must be at least 1, got 0"):
        BertTextConfig(**{**SMALL, name: 0})
