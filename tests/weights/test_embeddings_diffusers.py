"""New words against transformers' text tower and diffusers' reader: our files there, the same hidden states.

The tower is a tiny random one, of float32; tolerance 1e-5 absolute (hidden states are of order 1).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.textual_inversion import textual_inversion
from ldm.models.tokenizer import END_ID, Tokenizer
from ldm.weights import compvis
from ldm.weights.embeddings import Embedding, read_embeddings, write_embeddings
from ldm.weights.io import load_strict
from ldm.weights.writing import write_tokenizer

library = pytest.importorskip("transformers")
diffusers_reader = pytest.importorskip("diffusers.loaders.textual_inversion")

TEXT = TextConfig(width=32, mlp_width=64, layers=2, heads=4)
PROMPTS = [
    "a photo of <cat-toy>",
    "<cat-toy> beside a Fish, in a painting of <cat-toy>",
    "an apple of one <apple> , and <cat-toy>",
    "no new word",
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, TEXT)
    return folder


class Theirs(diffusers_reader.TextualInversionLoaderMixin):
    """What diffusers' loader needs of a pipeline."""

    hf_device_map = None

    def __init__(self, folder: Path, **config: int):
        torch.manual_seed(0)
        self.components: dict[str, Any] = {}
        self.tokenizer = library.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = library.CLIPTextConfig(**sizes, **config)
        self.text_encoder = library.CLIPTextModel(config).eval().requires_grad_(False)

    def ids(self, prompts: list[str]) -> torch.Tensor:
        prompts = [self.maybe_convert_prompt(prompt, self.tokenizer) for prompt in prompts]
        options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        return self.tokenizer(prompts, **options).input_ids


def ours(theirs: Theirs) -> tuple[TextEncoder, Tokenizer]:
    encoder = TextEncoder(TEXT).eval().requires_grad_(False)
    load_strict(encoder, compvis.to_ours(theirs.text_encoder.state_dict(), TEXT), "transformers")
    return encoder, Tokenizer()


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.pt"])
def test_the_same_hidden_states(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    theirs = Theirs(tokenizer_folder)
    encoder, tokenizer = ours(theirs)
    inversion = textual_inversion(encoder, tokenizer)
    for token, count in (("<cat-toy>", 3), ("<apple>", 1)):
        path = tmp_path / token / name
        write_embeddings(path, [Embedding(token, torch.randn(count, 32))])
        [found] = read_embeddings(path, token).embeddings
        inversion.add(token, found.vectors)
        theirs.load_textual_inversion(str(path), token=token)
    ids, others = tokenizer(PROMPTS), theirs.ids(PROMPTS)
    assert torch.equal(ids, others)
    assert int(ids.max()) == END_ID + 4
    assert_close(encoder(ids), theirs.text_encoder(others).last_hidden_state, rtol=0, atol=1e-5)


def test_the_trap_of_their_pooled_output(tokenizer_folder: Path) -> None:
    """CLIP-L's own configuration says that the end token is 2; then they pool at the greatest id, the new
    word's. What we pool, the last state of a tower that repeats its end, is the end token's."""
    theirs = Theirs(tokenizer_folder, eos_token_id=2)
    encoder, tokenizer = ours(theirs)
    vectors = torch.randn(1, 32)
    textual_inversion(encoder, tokenizer).add("<cat-toy>", vectors)
    theirs.load_textual_inversion({"<cat-toy>": vectors}, token="<cat-toy>")
    ids = tokenizer(["a <cat-toy> and a fish"])
    row = ids[0].tolist()
    output = theirs.text_encoder(ids)
    pooled_there = output.last_hidden_state[:, row.index(END_ID + 1)]
    assert_close(output.pooler_output, pooled_there, rtol=0, atol=1e-5)
    repeating = TextEncoder(replace(TEXT, repeat_end=True)).requires_grad_(False)
    repeating.load_state_dict(encoder.state_dict())
    textual_inversion(repeating, Tokenizer()).add("<cat-toy>", vectors)
    at_the_end = output.last_hidden_state[:, row.index(END_ID)]
    assert_close(repeating(ids)[:, -1], at_the_end, rtol=0, atol=1e-5)
    assert not torch.allclose(at_the_end, pooled_there, atol=1e-2)
