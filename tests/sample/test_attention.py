"""Words of a prompt and their tokens, and the sheet of heat maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.models.attention_maps import record
from ldm.models.tokenizer import Tokenizer
from ldm.models.weighting import Piece, chunks
from sample.attention import CAPTION, RAMP, SIDE, Word, colours, heat, token_pictures, words
from sample.images import save_png
from sample.pipeline import Pipeline


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


def test_words_and_their_positions(tokenizer: Tokenizer) -> None:
    """One token each, behind the start token; punctuation is a word of its own."""
    assert words(tokenizer, [tokenizer.encode("a Red fox, asleep")]) == [
        ("a", [1]), ("red", [2]), ("fox", [3]), (",", [4]), ("asleep", [5])
    ]  # fmt: skip


def test_a_word_of_several_tokens_is_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xylophonist café 🦊 now")
    found = words(tokenizer, [ids])
    assert [word.text for word in found] == ["xylophonist", "café", "🦊", "now"]
    assert len(found[0].positions) > 1
    assert [position for word in found for position in word.positions] == list(range(1, len(ids) + 1))


def test_a_placeholder_is_one_word(tokenizer: Tokenizer) -> None:
    tokenizer.add_placeholder("<my-cat>", 3)
    found = words(tokenizer, [tokenizer.encode("a <my-cat> on grass")])
    assert found == [("a", [1]), ("<my-cat>", [2, 3, 4]), ("on", [5]), ("grass", [6])]


def test_later_chunks_stand_behind_all_of_the_first(tokenizer: Tokenizer) -> None:
    pieces = [Piece("tree " * 74 + "end "), Piece("next", 1.3)]
    ids = [[token for token, _ in chunk] for chunk in chunks(pieces, tokenizer)]
    assert list(map(len, ids)) == [75, 1]
    found = words(tokenizer, ids)
    assert found[0] == ("tree", [1])
    assert found[74] == ("end", [75])
    assert found[75] == ("next", [78])


def test_a_word_may_go_on_in_the_next_chunk(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xylophonist")
    assert words(tokenizer, [[*tokenizer.encode("a"), ids[0]], ids[1:]]) == [
        ("a", [1]), ("xylophonist", [2, *range(78, 77 + len(ids))])
    ]  # fmt: skip


def test_what_does_not_fit_is_left_out(tokenizer: Tokenizer) -> None:
    found = words(tokenizer, [tokenizer.encode("tree " * 80)])
    assert found[-1] == ("tree", [75])
    assert words(tokenizer, [[]]) == words(tokenizer, []) == []


def test_colours_run_along_the_ramp() -> None:
    places = torch.linspace(0, 1, len(RAMP))
    assert torch.allclose(colours(places), torch.tensor(RAMP, dtype=torch.float32), atol=1e-3)
    brightness = colours(torch.linspace(0, 1, 50)).sum(dim=-1)
    assert bool((brightness.diff() > 0).all())


def test_heat_goes_from_zero_to_one() -> None:
    found = heat(torch.rand(4, 4) * 0.01 + 0.2, (32, 24))
    assert found.shape == (24, 32)
    assert (float(found.min()), float(found.max())) == (0, 1)
    assert int(heat(torch.full((4, 4), 0.3), (8, 8)).count_nonzero()) == 0


def test_each_word_has_a_tile_with_its_own_map(tmp_path: Path) -> None:
    """Two words that attend to opposite corners of a grey picture; the second has two tokens."""
    maps = torch.zeros(6, 4, 4)
    maps[1, 0, 0] = 0.1
    maps[3, 3, 3], maps[4, 3, 3] = 0.1, 0.3
    maps[0] = torch.rand(4, 4)  # the start token counts for no word
    sheet = token_pictures(
        maps, [Word("up", [1]), Word("downwards", [3, 4])], Image.new("RGB", (16, 16), "grey"), columns=2
    )
    assert sheet.size == (2 * SIDE + 6, SIDE + CAPTION + 4)
    pixels = np.asarray(sheet).astype(int).sum(axis=2)
    first, second = pixels[2 : SIDE + 2, 2 : SIDE + 2], pixels[2 : SIDE + 2, SIDE + 4 : -2]
    near, far = np.s_[:20, :20], np.s_[-20:, -20:]
    assert first[near].min() > first[far].max()
    assert second[far].min() > second[near].max()
    strips = pixels[SIDE + 2 : -2, 2 : SIDE + 2], pixels[SIDE + 2 : -2, SIDE + 4 : -2]
    assert all((strip < 300).any() for strip in strips)  # the captions
    save_png(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as saved:
        assert saved.size == sheet.size


def test_large_pictures_keep_their_size_and_long_words_are_cut() -> None:
    sheet = token_pictures(torch.rand(3, 4, 2), [Word("w" * 300, [2])], Image.new("RGB", (200, 400)))
    assert sheet.size == (204, 400 + CAPTION + 4)


def test_what_cannot_be_drawn_is_refused() -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="no word"):
        token_pictures(torch.rand(3, 4, 4), [], picture)
    with pytest.raises(ValueError, match="reach to token 3, the maps have 3 tokens"):
        token_pictures(torch.rand(3, 4, 4), [Word("a", [3])], picture)


@torch.no_grad()
def test_from_a_prompt_to_a_sheet() -> None:
    """The emoji model's maps of a prompt have its tokens, and give a tile a word."""
    emoji = Pipeline.load("emoji", device="cpu")
    prompt = "a red apple, noto emoji"
    context = emoji.encode_prompts([prompt])
    with record(emoji.unet, context=context) as maps:
        emoji.unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), context)
    found = words(emoji.tokenizer, [emoji.tokenizer.encode(prompt)])
    assert maps.mean().shape[1] == emoji.tokenizer.context_length
    sheet = token_pictures(maps.mean()[0], found, Image.new("RGB", (64, 64)), columns=len(found))
    assert sheet.width == len(found) * (SIDE + 2) + 2
