"""A study of prompts written as YAML: each combination of subjects, media, artists, ... in a sentence.

    read_study("configs/sample/prompt_study.yaml")      -> (name, prompt, negative prompt) of each

What comes out is text as if it had been typed, so a study may hold wildcards (`prompt_sources.py`).
"""

import difflib
import itertools
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{medium} of {subject}, {details}, by {artist}, in the style of {style_reference}, {palette} palette"
)
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptStudy:
    """What is combined: the alternatives of each field, "" for one that says nothing.

    template: the sentence, `{field}` for what is filled in. Between its commas stand phrases. A phrase none
    of whose fields says anything is left out; words between two fields stand where both say something.
    """

    subject: tuple[str, ...]
    medium: tuple[str, ...] = ("",)
    details: tuple[str, ...] = ("",)
    artist: tuple[str, ...] = ("",)
    style_reference: tuple[str, ...] = ("",)
    palette: tuple[str, ...] = ("",)
    negative: tuple[str, ...] = ("",)
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        used = _FIELD.findall(self.template)
        for name in used:
            if name not in FILLED:
                near = difflib.get_close_matches(name, FILLED, n=1, cutoff=0.5)
                hint = f"did you mean {{{near[0]}}}?" if near else f"fields: {', '.join(FILLED)}"
                raise ValueError(f"template: unknown field {{{name}}}; {hint}")
        for name in FILLED:
            if any(getattr(self, name)) and name not in used:
                raise ValueError(f"{name} is given, but the template does not use {{{name}}}")
        if not any(self.subject):
            raise ValueError("subject needs a value")


VARIED = tuple(field.name for field in fields(PromptStudy) if field.name != "template")
FILLED = VARIED[:-1]  # what the sentence may hold: all but the negative prompt
_JOINED = {"details": ", ", "palette": " and "}  # an alternative of these may be a list


def read_study(path: str | Path, limit: int = 1000) -> list[tuple[str, str, str]]:
    """(name, prompt, negative prompt) of each combination that a YAML file asks for.

        subject: [a red apple, a wolf]          a text, or a list of alternatives
        artist: [Van Gogh, ""]                  "" or nothing: its phrase is left out
        details: [[soft light, close up], ""]   several at once; of `palette` also

    The keys are the fields of `PromptStudy`. The order is that of its fields, subject slowest and negative
    fastest; the name tells the values of those that vary. `path` may be a shipped file
    (`configs/sample/prompt_study.yaml`).

    Raises FileNotFoundError for a missing file, and ValueError for one that is not such YAML (the key is
    named, and the nearest known one) or asks for more than `limit` prompts.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ldm.config import find_config, from_dict

    file = find_config(path)
    try:
        data = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected key: value pairs, got {type(data).__name__}")
    values = {
        str(key): _alternatives(value, str(key), str(path)) if key in VARIED else value
        for key, value in {"subject": None, **data}.items()
    }
    try:
        study = from_dict(PromptStudy, values, str(path))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(str(path)) else f"{path}: {told}") from error
    count = math.prod(len(getattr(study, name)) for name in VARIED)
    if count > limit:
        raise ValueError(f"{path}: makes {count} prompts, more than {limit}")
    return study_prompts(study)


def study_prompts(study: PromptStudy) -> list[tuple[str, str, str]]:
    """(name, prompt, negative prompt) of each combination, as `read_study` tells."""
    varying = [name for name in VARIED if len(getattr(study, name)) > 1] or ["subject"]
    found = []
    for values in itertools.product(*(getattr(study, name) for name in VARIED)):
        chosen = dict(zip(VARIED, values, strict=True))
        name = ", ".join(chosen[field] or f"no {field.replace('_', ' ')}" for field in varying)
        found.append((name, _filled(study.template, chosen), chosen["negative"]))
    return found


def _alternatives(value: Any, key: str, source: str) -> list[str]:
    """The alternatives of a field, each as its text, equal ones once."""
    texts = []
    for alternative in value if isinstance(value, list) else [value]:
        several = alternative if isinstance(alternative, list) else [alternative]
        if len(several) > 1 and key not in _JOINED:
            raise ValueError(f"{source}: {key}: an alternative must be a text, got {alternative!r}")
        for text in several:
            if isinstance(text, bool) or not isinstance(text, (str, int, float, type(None))):
                raise ValueError(f"{source}: {key}: an alternative must be a text, got {text!r}; quote it")
            if isinstance(text, str) and ("${" in text or "\0" in text):
                raise ValueError(f"{source}: {key}: {text!r} holds what is not supported, ${{...}} or NUL")
        words = ["" if text is None else str(text).strip() for text in several]
        texts.append(_JOINED.get(key, "").join(word for word in words if word))
    return list(dict.fromkeys(texts)) or [""]


def _filled(template: str, values: dict[str, str]) -> str:
    """The sentence, phrases without a value left out."""
    phrases = []
    for phrase in template.split(","):
        before, *rest = _FIELD.split(phrase.strip())  # words, field, words, field, words
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        if not pairs:
            phrases.append(before)
            continue
        said = before
        for i, (field, words) in enumerate(pairs):
            if i + 1 < len(pairs) and not (values[field] and values[pairs[i + 1][0]]):
                words = " "  # those between two fields
            said += values[field] + words
        if any(values[field] for field, _ in pairs):
            phrases.append(" ".join(said.split()))
    return ", ".join(phrase for phrase in phrases if phrase)
