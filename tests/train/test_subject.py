"""What the pictures of a subject are called."""

import pytest
import torch

from train.subject import Captions, SubjectConfig
from train.templates import OBJECT, STYLE


def captions(config, own=("", "", ""), concepts=("", "", ""), files=("a/0.png", "b/1.png", "2.png"), **more):
    return Captions(config, own, concepts, files, **more)


def test_templates_are_filled_with_identifier_and_noun():
    found = captions(SubjectConfig(templates=("photo of a {}", "the {}!"), identifier="sks", noun="dog"))
    assert found.all == ["photo of a sks dog", "the sks dog!"]
    assert found.of_class() == ["photo of a dog", "the dog!"]
    assert captions(SubjectConfig(), identifier="<new>").all == ["a photo of a <new>"]


def test_the_lists_are_as_long_as_in_diffusers_script():
    assert len(captions(SubjectConfig(templates=("object",), identifier="x")).all) == 27 == len(set(OBJECT))
    both = captions(SubjectConfig(templates=("object", "style"), identifier="x"))
    assert len(both.all) == 27 + 19 == len(set(OBJECT + STYLE))


def test_own_captions_are_each_pictures():
    found = captions(
        SubjectConfig(templates=("own",), identifier="sks", noun="dog"), ["a {} in snow", "x", "the {}"]
    )
    assert found.first(torch.tensor([2, 0, 0])) == ["the sks dog", "a sks dog in snow", "a sks dog in snow"]
    fixed = captions(SubjectConfig(templates=("photo of a sks dog",)))
    assert fixed.all == ["photo of a sks dog"]


def test_pictures_of_several_concepts_have_names_of_their_own():
    """By the column, else by the folder."""
    config = SubjectConfig(templates=("a {}",), identifiers={"a": "<toy>", "b": "<cat>", "style": "<s>"})
    assert captions(config, concepts=("", "", "style")).all == ["a <toy>", "a <cat>", "a <s>"]
    with pytest.raises(ValueError, match=r"2\.png: no subject.identifiers for its concept '' .* a, b, style"):
        captions(config)


def test_draws_are_a_function_of_the_key():
    found = captions(SubjectConfig(templates=("object",), identifier="x"))
    rows = torch.zeros(200, dtype=torch.int64)
    drawn = found.drawn(rows, 0, "template", 3)
    assert drawn == found.drawn(rows, 0, "template", 3)
    assert drawn != found.drawn(rows, 0, "template", 4)
    assert len(set(drawn)) == 27


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"a/0\.png: no caption .* 'own'"):
        captions(SubjectConfig(templates=("own",), identifier="x"))
    with pytest.raises(ValueError, match="needs a name"):
        captions(SubjectConfig())
    with pytest.raises(ValueError, match=r"subject.noun and \{\} in every template"):
        captions(SubjectConfig(identifier="x")).of_class()
    with pytest.raises(ValueError, match=r"subject.noun and \{\} in every template"):
        captions(SubjectConfig(templates=("a dog",), noun="dog")).of_class()
    with pytest.raises(ValueError, match=r"subject\.templates is empty"):
        SubjectConfig(templates=())
