"""Where prompts come from besides the command line: a file of prompts, and wildcards.

    read_prompts("prompts.txt")               a prompt a line
    expand("a {red|green} __fruit__", ...)    one of the choices for each picture; `combinations` makes all

What comes out is text as if it had been typed, so that each may feed the next: a line of a file may hold
wildcards, and so may a study (`prompt_study.py`). Stands before `sample/prompts.py`, which reads the text.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_DEPTH = 40  # choices in choices, files included


# --- a file of prompts --------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file without blanks around them; blank ones and those that start with # are
    left out.

    Raises FileNotFoundError for a missing file and ValueError, with file:line, for one that is not such text
    or holds no prompt.
    """
    lines = [line for _, line in _lines(Path(path))]
    if not lines:
        raise ValueError(f"{path}: holds no prompt; write one a line (lines that start with # are comments)")
    return lines


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of each line that says something."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is {'a folder' if path.is_dir() else 'missing'}, not a text file")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from None
        if "\0" in line:
            raise ValueError(f"{path}:{number}: holds a NUL character; save the file as UTF-8 text")
        if line and not line.startswith("#"):
            lines.append((number, line))
    return lines


# --- wildcards ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wildcard:
    """`__name__`: a line of the file of this name."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`{a|2::b}`: (weight, nodes) of each option."""

    options: "tuple[tuple[float, Nodes], ...]"


Nodes = tuple[str | Wildcard | Choice, ...]

_TOKEN = re.compile(
    r"\\.?|__(?=[^\s_])(?P<name>(?:(?!__)[^{}|\\\n])+)(?<=\S)__|[{}|]|(?:(?!__[^\s_])[^\\{}|])+|_", re.DOTALL
)
_WEIGHT = re.compile(r"\s*(\d+\.?\d*|\.\d+)::")


def expand(prompt: str, seed: int, image_index: int, folder: str | Path) -> str:
    """The prompt of picture `image_index`: each choice made.

        __fruit__  __animal/dog__    a line of folder/fruit.txt, of folder/animal/dog.txt
        {red|green|}                 one of what the bars part, here perhaps nothing
        {3::red|green}               red in three of four pictures; a file's lines may have weights too
        \\{  \\}  \\_                   the character itself

    Options and lines may hold choices in turn. What is chosen is a function of the seed, the picture's number
    and which of the prompt's choices it is, so that a picture says the same whatever is made beside it.

    Raises ValueError for a brace without its partner, a file that is missing, empty, no text or outside of
    the folder, weights that sum to nothing, and choices more than MAX_DEPTH deep.
    """
    return _said(_parse(prompt, "the prompt"), Path(folder), (seed, "wildcards", image_index), (), ())


def _said(
    nodes: Nodes, folder: Path, key: tuple[int | str, ...], place: tuple[int, ...], files: tuple[str, ...]
) -> str:
    """What nodes say. place: of them among the choices, outermost first. files: that they stand in."""
    import torch

    from ldm.seeding import generator

    texts = []
    number = 0  # of the choice among those here, since text around it may change
    for node in nodes:
        if isinstance(node, str):
            texts.append(node)
            continue
        options, inner = _options(node, folder, len(place), files)
        here = (*place, number)
        draw = torch.rand((), generator=generator(*key, *here), dtype=torch.float64).item()
        texts.append(_said(_nodes(*_drawn(options, draw)), folder, key, here, inner))
        number += 1
    return "".join(texts)


def combinations(prompt: str, folder: str | Path, limit: int = 1000) -> list[str]:
    """Every prompt that `expand` may make, each once, in the order of the options, the last choice fastest.

    Options of weight 0 are left out. Raises ValueError for more than `limit` of them, and as `expand`.
    """
    return _every(_parse(prompt, "the prompt"), Path(folder), limit, 0, ())


def _every(nodes: Nodes, folder: Path, limit: int, depth: int, files: tuple[str, ...]) -> list[str]:
    texts = [""]
    for node in nodes:
        if isinstance(node, str):
            texts = [text + node for text in texts]
            continue
        options, inner = _options(node, folder, depth, files)
        here: dict[str, None] = {}
        for weight, option, source in options:
            if weight > 0:
                here |= dict.fromkeys(_every(_nodes(option, source), folder, limit, depth + 1, inner))
                if len(texts) * len(here) > limit:
                    raise ValueError(f"the prompt makes more than {limit} combinations")
        texts = list(dict.fromkeys(text + more for text in texts for more in here))
    return texts


# Weight, what it says (a line of a file is not parsed yet), where it stands
Option = tuple[float, str | Nodes, str]


def _options(
    node: Wildcard | Choice, folder: Path, depth: int, files: tuple[str, ...]
) -> tuple[list[Option], tuple[str, ...]]:
    """What there is to choose from, and the files that the choice stands in."""
    if isinstance(node, Wildcard):
        files = (*files, node.name)
    if depth >= MAX_DEPTH:
        chain = ", ".join(f"__{name}__" for name in dict.fromkeys(files[-3:]))
        raise ValueError(f"choices in choices more than {MAX_DEPTH} deep{f', in {chain}' if files else ''}")
    options: list[Option]
    if isinstance(node, Choice):
        options = [(weight, nodes, "the prompt") for weight, nodes in node.options]
        where = "{...}"
    else:
        path = _wildcard_file(node.name, folder)
        where = f"{path}"
        options = [(*_weighted(line), f"{path}:{number}") for number, line in _lines(path)]
        if not options:
            raise ValueError(f"{path}: holds no line to choose")
    total = sum(weight for weight, _, _ in options)
    if not 0 < total < math.inf:
        raise ValueError(f"{where}: weights of a choice need a finite sum above 0, got {total:g}")
    return options, files


def _drawn(options: Sequence[Option], draw: float) -> tuple[str | Nodes, str]:
    """The option at `draw`, from [0, 1), of their weights."""
    left = draw * sum(weight for weight, _, _ in options)
    possible = [option for option in options if option[0] > 0]
    for weight, option, source in possible:
        left -= weight
        if left < 0:
            return option, source
    return possible[-1][1:]  # for rounding


def _nodes(option: str | Nodes, source: str) -> Nodes:
    return _parse(option, source) if isinstance(option, str) else option


def _weighted(text: str) -> tuple[float, str]:
    """`3::red` as 3 and "red"; without a number the weight is 1."""
    weight = _WEIGHT.match(text)
    return (float(weight[1]), text[weight.end() :]) if weight else (1.0, text)


def _wildcard_file(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no folder of wildcards")
    if any(part.strip(" ") in ("", ".", "..") for part in name.split("/")) or ":" in name or "\0" in name:
        raise ValueError(f"wildcard __{name}__ must name a file in {folder}, such as __animal/dog__")
    path = folder / f"{name}.txt"
    try:
        if path.is_file():
            return path
    except OSError:  # a name too long for the file system
        pass
    known = sorted(each.relative_to(folder).with_suffix("").as_posix() for each in folder.rglob("*.txt"))
    near = [each for each in known if each.split("/")[-1] == name.split("/")[-1]]  # in another folder
    near = near[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = "did you mean" if near else "known ones:"
    names = ", ".join(f"__{each}__" for each in near or known[:8]) or "none"
    raise ValueError(f"wildcard __{name}__: {path} does not exist; {hint} {names}{'?' if near else ''}")


def _parse(text: str, source: str) -> Nodes:
    """Text as text, wildcards and choices. Bars outside of braces are text."""
    nodes: list[Any] = []
    opened: list[tuple[int, list[Any], list[Any]]] = []  # place of the brace, nodes before it, its options
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match["name"]:
            nodes.append(Wildcard(match["name"]))
        elif token == "{":
            opened.append((match.start(), nodes, []))
            nodes = []
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"{source}: braces in braces more than {MAX_DEPTH} deep")
        elif token == "}" and not opened:
            raise ValueError(
                f"{source}: closing brace at character {match.start() + 1} was never opened; "
                r"write \} for the character"
            )
        elif token in "|}" and opened:
            _, before, options = opened[-1]
            options.append(_option(nodes))
            nodes = []
            if token == "}":
                opened.pop()
                nodes = [*before, Choice(tuple(options))]
        else:
            nodes.append(token[1:] if token in (r"\{", r"\}", r"\_") else token)
    if opened:
        raise ValueError(
            f"{source}: brace at character {opened[-1][0] + 1} is never closed; write \\{{ for the character"
        )
    return tuple(nodes)


def _option(nodes: Sequence[Any]) -> tuple[float, Nodes]:
    """What stands between two bars, the weight that it may begin with taken off."""
    if not nodes or not isinstance(nodes[0], str):
        return 1.0, tuple(nodes)
    weight, first = _weighted(nodes[0])
    return weight, (first, *nodes[1:])
