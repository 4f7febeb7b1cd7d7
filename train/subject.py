"""What the few pictures of a subject are called while a model learns it.

A caption is a template with the subject's name in place of `{}`: templates of objects or styles as in
textual inversion (Gal et al. 2022, arXiv:2208.01618), "a photo of a {}" with a rare identifier and the noun
of its class as in DreamBooth (Ruiz et al. 2023, arXiv:2208.12242, section 3.1), or each picture's own
caption. Used by `personal.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import torch
from torch import Tensor

from ldm.seeding import generator
from train.templates import OBJECT, STYLE

OWN = "own"
LISTS = {"object": OBJECT, "style": STYLE}


@dataclass(frozen=True)
class SubjectConfig:
    """templates: texts with `{}` for the subject's name, or without, then as they are; "object" and "style"
    are the lists of `templates.py`, "own" is the picture's caption in metadata.jsonl or a .txt file beside
    it. Of several, each step draws one for each picture. identifier: the rare or new word. noun: of its
    class; `{}` is both, and the noun alone for pictures of the class (`prior.py`). identifiers: by concept,
    where the pictures show several: a picture's concept is its column "concept", or the folder it stands
    in.
    """

    templates: tuple[str, ...] = ("a photo of a {}",)
    identifier: str = ""
    noun: str = ""
    identifiers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError(
                'subject.templates is empty; give "own", "object", "style" or a text such as "a {}"'
            )

    def texts(self) -> list[str]:
        """All templates, the lists written out, "own" as it is."""
        return [text for template in self.templates for text in LISTS.get(template, (template,))]


class Captions:
    """The captions that each picture of a set may get; as many for each, in the order of the templates.

    captions, concepts, files: of the pictures. identifier: where the configuration names none. Raises
    ValueError for a template without a name to fill it, and a picture without what a template asks for.
    """

    def __init__(
        self,
        config: SubjectConfig,
        captions: Sequence[str],
        concepts: Sequence[str],
        files: Sequence[str],
        identifier: str = "",
    ):
        self.config, self.own = config, list(captions)
        self.texts = config.texts()
        self.identifier = config.identifier or identifier
        self.choices: list[list[str]] = []
        for caption, concept, file in zip(captions, concepts, files, strict=True):
            name = self._identifier(concept, file) if config.identifiers else self.identifier
            if OWN in self.texts and not caption.strip():
                raise ValueError(
                    f"{file}: no caption (metadata.jsonl, or a .txt beside it); subject.templates has 'own'"
                )
            self.choices.append([filled(text, caption, f"{name} {config.noun}") for text in self.texts])

    def _identifier(self, concept: str, file: str) -> str:
        concept = concept or PurePosixPath(file).parent.name
        if concept not in self.config.identifiers:
            raise ValueError(
                f"{file}: no subject.identifiers for its concept {concept!r} (column or folder), only for "
                f"{', '.join(self.config.identifiers)}"
            )
        return self.config.identifiers[concept]

    @property
    def all(self) -> list[str]:
        """Every caption there can be, once."""
        return list(dict.fromkeys(caption for choices in self.choices for caption in choices))

    def first(self, rows: Tensor) -> list[str]:
        """The same caption each time, for what is to be compared."""
        return [self.choices[row][0] for row in rows.tolist()]

    def drawn(self, rows: Tensor, *key: int | str) -> list[str]:
        """One of its captions for each of these pictures, a function of the key."""
        which = torch.randint(len(self.texts), (len(rows),), generator=generator(*key))
        return [self.choices[row][at] for row, at in zip(rows.tolist(), which.tolist(), strict=True)]

    def of_class(self) -> list[str]:
        """The same sentences of the class alone. Raises ValueError where that is nothing else."""
        noun = self.config.noun
        own = [caption for caption in dict.fromkeys(self.own) if caption] if OWN in self.texts else [""]
        told = [filled(text, caption, noun) for text in self.texts for caption in own] if noun else []
        if not told or set(told) & set(self.all):
            raise ValueError(
                "what pictures of the class are called is not known: give subject.noun and {} in every "
                "template, or prior.prompts"
            )
        return list(dict.fromkeys(told))


def filled(template: str, own: str, name: str) -> str:
    """A template as a caption. Raises ValueError where the name is needed and empty."""
    text, name = own if template == OWN else template, name.strip()
    if "{}" in text and not name:
        raise ValueError(f"{text!r} needs a name for {{}}: give subject.identifier or subject.noun")
    return text.replace("{}", name)
