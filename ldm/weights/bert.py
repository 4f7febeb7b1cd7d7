"""Names of the BERT text tower (`ldm/models/bert.py`), in both directions: those of the original code, a
`TransformerWrapper` of x-transformers below `cond_stage_model.`, and those of diffusers' `LDMBertModel`.

x-transformers counts attention and MLP as layers of their own: our block i is its layers 2i and 2i+1, each
a pair of norm (0) and function (1). `to_ours` and its two counterparts are exact inverses, but for the head
over the vocabulary, `to_logits`: conditioning does not use it, so we neither keep nor write it.
"""

from torch import Tensor

from ldm.models.bert import BertTextConfig
from ldm.weights.names import Names, Tensors, inside, into_ours, into_theirs, tensor_names

PREFIX = "cond_stage_model."  # where the tower stands in a single-file checkpoint

DIFFUSERS_BLOCK = {
    "norm1": "self_attn_layer_norm",
    "to_q": "self_attn.q_proj",
    "to_k": "self_attn.k_proj",
    "to_v": "self_attn.v_proj",
    "to_out": "self_attn.out_proj",
    "norm2": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def to_ours(tensors: Tensors, config: BertTextConfig) -> dict[str, Tensor]:
    """The tower's tensors, in the original's names below `PREFIX` or in diffusers', in our names.

    `to_logits` is dropped. Names that are unknown stay as they are, so that strict loading names them.
    """
    original = any(name.startswith("transformer.") for name in tensors)
    names = compvis_names(config) if original else diffusers_names(config)
    head = "transformer.to_logits." if original else "to_logits."
    return into_ours({name: tensor for name, tensor in tensors.items() if not name.startswith(head)}, names)


def to_compvis(tensors: Tensors, config: BertTextConfig) -> dict[str, Tensor]:
    """Our tensors in the original's names, without `PREFIX`; ValueError unless they are all of `config`."""
    return into_theirs(tensors, compvis_names(config))


def to_diffusers(tensors: Tensors, config: BertTextConfig) -> dict[str, Tensor]:
    """Our tensors in diffusers' names. Raises ValueError unless they are all of `config`."""
    return into_theirs(tensors, diffusers_names(config))


def compvis_names(config: BertTextConfig) -> Names:
    """The name of each tensor, ours -> the original's, without `PREFIX`."""
    modules = {
        "token_embedding": "transformer.token_emb",
        "position_embedding": "transformer.pos_emb.emb",
        "final_norm": "transformer.norm",
    }
    for i in range(config.layers):
        attention, mlp = (f"transformer.attn_layers.layers.{j}" for j in (2 * i, 2 * i + 1))
        block = {
            "norm1": f"{attention}.0",
            **{f"to_{x}": f"{attention}.1.to_{x}" for x in ("q", "k", "v", "out")},
            "norm2": f"{mlp}.0",
            "fc1": f"{mlp}.1.net.0.0",
            "fc2": f"{mlp}.1.net.2",
        }
        modules |= {f"blocks.{i}.{ours}": theirs for ours, theirs in block.items()}
    return tensor_names(config, modules)


def diffusers_names(config: BertTextConfig) -> Names:
    """The name of each tensor, ours -> diffusers'."""
    modules = {
        "token_embedding": "model.embed_tokens",
        "position_embedding": "model.embed_positions",
        "final_norm": "model.layer_norm",
    }
    for i in range(config.layers):
        modules |= inside(f"blocks.{i}", f"model.layers.{i}", DIFFUSERS_BLOCK)
    return tensor_names(config, modules)
