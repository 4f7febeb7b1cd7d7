"""Prompt languages: text -> tree -> what the prompt says at a step. The web UI's:

    (x)  [x]  (x:1.3)     weight times 1.1, divided by 1.1, times 1.3; brackets nest and multiply
    \\( \\) \\[ \\] \\\\        the character itself; so do \\: and \\| here
    a BREAK b             b begins a new chunk of tokens
    a:0.7 AND b:1.2       two prompts, each with its own weight in the guidance
    [a:b:0.5]             a, then b from half of the steps on; [a:b:12] from after step 12
    [b:0.5]  [a::0.5]     nothing, then b; a, then nothing
    [a|b|c]               a, b, c in turn, a step each

Two stages, as in the web UI. `parse` reads what changes with the step and AND (a grammar for lark); `at_step`
picks, which leaves a plain text whose brackets `emphasis` counts. So a weight may change on the way,
(x:[1.3:0.8:0.5]), and brackets that do not match are no error: opened and never closed they hold to the
end, closed and never opened they are text. Nothing a user can type is an error.

Other ways to read a prompt are the rows of `SYNTAXES`; ComfyUI's knows round brackets only.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ldm.models.weighting import BREAK, Piece

MAX_DEPTH = 100  # brackets around brackets that may still hold a schedule


@dataclass(frozen=True)
class Schedule:
    """`before`, then `after`. `when` as typed: 0.5 is a fraction of the steps, 12 a number of steps."""

    before: "tuple[Node, ...]"
    after: "tuple[Node, ...]"
    when: str

    def switch(self, steps: int) -> int:
        """How many of the steps show `before`. A number with a decimal point is a fraction: 1.0 is all."""
        share = float(self.when) * (steps if "." in self.when else 1)
        return int(max(0.0, min(float(steps), share)))


@dataclass(frozen=True)
class Alternate:
    """One of the options at each step, in turn."""

    options: "tuple[tuple[Node, ...], ...]"


Node = str | Schedule | Alternate


@dataclass(frozen=True)
class Part:
    """What stands between two ANDs, and its weight in the guidance."""

    nodes: tuple[Node, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt: one part, or several joined by AND. syntax: a key of SYNTAXES, for its brackets."""

    parts: tuple[Part, ...]
    syntax: str = "webui"


# Brackets that do not match arrive as LOOSE, so that the grammar sees only matching ones.
_GRAMMAR = r"""
?item: TEXT | ESCAPE | round | square
round: "(" (item | COLON | PIPE)* ")"
square: "[" (item | COLON | PIPE)* "]"
ESCAPE: /\\[()\[\]\\:|]?/
COLON: ":"
PIPE: "|"
%declare LOOSE
"""
_ONE = r"""
start: part
part: (item | COLON | PIPE | LOOSE)*
TEXT: /[^\\()\[\]:|]+/
"""
_COMPOSED = r"""
start: part (_AND part)*
part: (item | COLON | PIPE | LOOSE)* WEIGHT?
WEIGHT.2: /:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*(?=\bAND\b|\Z)/
_AND.2: /\bAND\b/
TEXT: /(?:(?!\bAND\b)[^\\()\[\]:|])+/
"""
_NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_EMPHASIS = re.compile(
    r"\\[()\[\]\\:|]?|:\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_COMFY = re.compile(r"\\[()]|[()]|[^()\\]+|\\")


class _Brackets:
    """Between lark's lexer and parser: brackets without a partner become LOOSE.

    A closing bracket of the wrong kind leaves all that are open without one: whatever they enclosed would
    hold it.
    """

    always_accept = ()

    def process(self, stream: Any) -> Iterator[Any]:
        tokens = list(stream)
        opened: list[int] = []
        matched = set()
        for i, token in enumerate(tokens):
            if token.type == "_AND" or len(opened) == MAX_DEPTH:
                opened.clear()
            if token.type in ("LPAR", "LSQB"):
                opened.append(i)
            elif token.type in ("RPAR", "RSQB"):
                if opened and tokens[opened[-1]].type[1:] == token.type[1:]:
                    matched |= {opened.pop(), i}
                else:
                    opened.clear()
        for i, token in enumerate(tokens):
            if token.type in ("LPAR", "LSQB", "RPAR", "RSQB") and i not in matched:
                token.type = "LOOSE"
            yield token


@cache
def _parser(composed: bool) -> Any:
    import lark  # here: no other command needs it

    grammar = (_COMPOSED if composed else _ONE) + _GRAMMAR
    return lark.Lark(grammar, parser="lalr", lexer="basic", postlex=_Brackets(), keep_all_tokens=False)


def parse(text: str, composed: bool = True, syntax: str = "webui") -> Prompt:
    """The tree of a prompt. Every text has one.

    syntax: how to read it, a key of SYNTAXES; ValueError for another.

    composed: whether AND and a weight at the end mean anything; the web UI's negative prompt has neither. As
    there, a number after a colon at the very end of a prompt is its weight, also without AND: write
    "at 10\\:30" for the time.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"syntax of prompts must be one of {', '.join(SYNTAXES)}, got {syntax!r}")
    if not SYNTAXES[syntax].trees:
        return Prompt((Part((text,)),), syntax)
    parts = []
    for tree in _parser(composed).parse(text).children:
        children, weight = list(tree.children), 1.0
        if children and getattr(children[-1], "type", "") == "WEIGHT":
            weight = float(children.pop()[1:])
        parts.append(Part(_nodes(children)[0], weight))
    return Prompt(tuple(parts), syntax)


def mixed(prompt: Prompt) -> Prompt:
    """The prompt with the weights of its parts divided by their sum, so that they are shares of one.

    As it is, "Van Gogh:3 AND Monet:2" pulls with 3 s + 2 s at a guidance of s, as in the web UI: right for
    weights near 1, where AND adds what each part asks for to the picture. Mixed, 0.6 s + 0.4 s pull with s
    in all, however many the parts: right where the numbers mean how much of each ("three of Van Gogh, two of
    Monet"). One part alone gets weight 1.

    Raises ValueError where the sum is not positive, or not finite.
    """
    total = sum(part.weight for part in prompt.parts)
    if not 0 < total < math.inf:
        weights = ", ".join(f"{part.weight:g}" for part in prompt.parts)
        raise ValueError(f"weights of a mixture need a finite sum above 0, got {weights}")
    return replace(prompt, parts=tuple(replace(part, weight=part.weight / total) for part in prompt.parts))


def _nodes(children: Sequence[Any]) -> tuple[tuple[Node, ...], bool]:
    """Lark's tokens and trees as nodes, neighbouring text joined; and whether they may stand in a schedule.

    The web UI's grammar allows no stray colon or bar in there."""
    nodes: list[Node] = []
    fits = True
    for child in children:
        if isinstance(child, str):
            fits &= getattr(child, "type", "") not in ("COLON", "PIPE", "LOOSE")
            nodes.append(str(child))
        else:
            found, inner = _bracket(child)
            nodes += found
            fits &= inner
    return _joined(nodes), fits


def _joined(nodes: Sequence[Node]) -> tuple[Node, ...]:
    joined: list[Node] = []
    for node in nodes:
        if joined and isinstance(node, str) and isinstance(joined[-1], str):
            joined[-1] += node
        else:
            joined.append(node)
    return tuple(joined)


def _bracket(tree: Any) -> tuple[tuple[Node, ...], bool]:
    """A schedule, an alternation, or brackets as they stand: [x], (x), (x:weight) and what is none of it."""
    children = tree.children
    at = [i for i, child in enumerate(children) if getattr(child, "type", "") in ("COLON", "PIPE")]
    between = zip([-1, *at], [*at, len(children)], strict=True)
    parts = [_nodes(children[i + 1 : j]) for i, j in between]
    options = tuple(nodes for nodes, _ in parts)
    colons, bars = (sum(children[i].type == kind for i in at) for kind in ("COLON", "PIPE"))
    fits = all(inner for _, inner in parts)
    if tree.data == "square" and fits:
        last = options[-1]
        number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if bars and not colons:
            return (Alternate(options),), True
        if colons in (1, 2) and not bars and number:
            return (Schedule(options[0] if colons == 2 else (), options[-2], number[1]),), True
    opening, closing = "[]" if tree.data == "square" else "()"
    literal: list[Node] = [opening, *options[0]]
    for i, nodes in zip(at, options[1:], strict=True):
        literal += [str(children[i]), *nodes]
    most = 1 if tree.data == "round" else 0  # colons: only (x:weight) holds one
    return _joined([*literal, closing]), fits and not bars and colons <= most


def text_at(nodes: Sequence[Node], step: int, steps: int) -> str:
    """The text of step 0..steps-1, its emphasis still in brackets."""
    texts = []
    for node in nodes:
        if isinstance(node, Schedule):
            node = text_at(node.before if step < node.switch(steps) else node.after, step, steps)
        elif isinstance(node, Alternate):
            node = text_at(node.options[step % len(node.options)], step, steps)
        texts.append(node)
    return "".join(texts)


def at_step(prompt: Prompt, step: int, steps: int) -> tuple[tuple[float, tuple[Piece, ...]], ...]:
    """What the prompt says at step 0..steps-1: (weight of the part, its pieces) of each part.

    Equal for steps that say the same, and hashable, so that each is encoded once.
    Raises ValueError for a step outside 0..steps-1.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step of a prompt must be in 0..{steps - 1}, got {step}")
    texts = [text_at(part.nodes, step, steps) for part in prompt.parts]
    if len(texts) > 1:  # the blanks around AND
        texts = [text.strip() for text in texts]
    pieces = SYNTAXES[prompt.syntax].pieces
    return tuple((part.weight, pieces(text)) for part, text in zip(prompt.parts, texts, strict=True))


def emphasis(text: str) -> tuple[Piece, ...]:
    """Text in brackets as pieces with weights, neighbours of equal weight joined; never empty.

    Each bracket multiplies what was read since its partner was opened. Round and square ones are counted
    apart, so that they may overlap. A number counts only right before the closing round bracket.
    """
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= factor

    for match in _EMPHASIS.finditer(text):
        token, weight = match[0], match["weight"]
        if token in opened:
            opened[token].append(len(texts))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), float(weight))
        elif token == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif token == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            first, *others = [token[1:]] if token.startswith("\\") else _BREAK.split(token)
            found = [first, *(part for other in others for part in (None, other))]
            texts += found
            weights += [1.0] * len(found)
    for start in opened["("]:
        multiply(start, 1.1)
    for start in opened["["]:
        multiply(start, 1 / 1.1)
    pieces: list[Piece] = []
    for part, factor in zip(texts, weights, strict=True):
        if part is None:
            pieces.append(BREAK)
        elif pieces and pieces[-1] != BREAK and pieces[-1].weight == factor:
            pieces[-1] = Piece(pieces[-1].text + part, factor)
        else:
            pieces.append(Piece(part, factor))
    return tuple(piece for piece in pieces if piece.text) or (Piece(""),)


def comfy_emphasis(text: str) -> tuple[Piece, ...]:
    """ComfyUI's way: (x) is the weight around it times 1.1, (x:1.3) is 1.3 whatever stands around it.

    Only round brackets count; \\( and \\) are the characters. The number follows the last colon in the
    bracket, and something stands before that colon. Text between two brackets is a piece of its own, also
    where neighbours weigh the same. Brackets that do not match: see `_comfy_groups`.
    """
    pieces = []
    todo = [(_COMFY.findall(text), 1.0)]  # what is still to be read, the next one last
    while todo:
        tokens, weight = todo.pop()
        groups = _comfy_groups(tokens)
        if groups == [tokens] and not _bracketed(tokens):
            said = "".join(token[-1] if token in ("\\(", "\\)") else token for token in tokens)
            # A blank more, lest it be taken for the end of a chunk
            pieces.append(Piece(said + " " if (said, weight) == BREAK else said, weight))
        else:
            for group in reversed(groups):
                todo.append(_inside(group, weight) if _bracketed(group) else (group, weight))
    return tuple(pieces) or (Piece(""),)


def _comfy_groups(tokens: list[str]) -> list[list[str]]:
    """Text and brackets in turn: one opened at depth 0 reaches to where the depth is 0 again, or to the end.

    One that reaches to the end is text, brackets inside it included, unless it ends in a closing bracket,
    which then counts for it. One closed and never opened is text and leaves the depth at -1, so that the next
    one opened is text too.
    """
    groups: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token == "(" and depth == 0:
            groups.append([])
        groups[-1].append(token)
        depth += (token == "(") - (token == ")")
        if token == ")" and depth == 0:
            groups.append([])
    return [group for group in groups if group]


def _bracketed(group: list[str]) -> bool:
    return len(group) > 1 and group[0] == "(" and group[-1] == ")"


def _inside(group: list[str], weight: float) -> tuple[list[str], float]:
    """What stands in a bracket, without its number, and its weight."""
    inner = group[1:-1]
    before, colon, number = inner[-1].rpartition(":") if inner else ("", "", "")
    if colon and _NUMBER.fullmatch(number) and (before or len(inner) > 1):
        return [*inner[:-1], *filter(None, [before])], float(number)
    return inner, weight * 1.1


def as_typed(text: str) -> tuple[Piece, ...]:
    """The text, brackets and BREAK included."""
    return (Piece(text),)


@dataclass(frozen=True)
class Syntax:
    """A way to read prompts. trees: with AND, schedules and alternation. pieces: what brackets mean."""

    trees: bool
    pieces: Callable[[str], tuple[Piece, ...]]


SYNTAXES = {
    "webui": Syntax(True, emphasis),
    "webui-none": Syntax(True, as_typed),  # the web UI with its emphasis set to "None"
    "comfy": Syntax(False, comfy_emphasis),
    "plain": Syntax(False, as_typed),
}
