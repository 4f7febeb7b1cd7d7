"""The captions of a new word: as many as in diffusers' script, all different, each with one place for the word."""

import pytest

from train.templates import OBJECT, STYLE


@pytest.mark.parametrize(("templates", "count"), [(OBJECT, 27), (STYLE, 19)])
def test_counts_and_places(templates: tuple[str, ...], count: int) -> None:
    assert len(templates) == count
    assert all(template.count("{}") == 1 and template.format("<cat>") != template for template in templates)
    assert all(template == " ".join(template.split()) for template in templates)


def test_all_differ() -> None:
    assert len({*OBJECT, *STYLE}) == len(OBJECT) + len(STYLE)
