"""Docstrings of the sources as Markdown, and their objects as the site shows them: an extension of griffe.

Docstrings here are plain text with lines `name: remark` for parameters and fields, which may stand indented
below `Args:`; indented blocks of code, formulas or tables; and names in backticks, which become references.
"""

import ast
import re
import textwrap
from collections.abc import Callable
from typing import Any

import griffe
import sources

SHAPED = {"Bool", "Float", "Int", "Integer", "Num", "Shaped", "UInt8"}  # jaxtyping's, as the sources use them
OBVIOUS = {"module-attribute", "class-attribute", "instance-attribute"}  # labels that tell nothing

REMARK = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*):(?: |$)")
FORMULA = re.compile(r"[A-Za-z_]\w*(?:\([\w, ]*\))? = ")
SECTION = re.compile(r"(?:Raises|Returns|Yields) ")
ITEM = re.compile(r"(?:-|\d+\.) ")
QUOTED = re.compile(r"`([^`\n]+)`")
MEANT = str.maketrans({character: f"&#{ord(character)};" for character in "*_[]<$"})  # not Markdown's

Link = Callable[[str], str | None]  # a name in backticks -> the full name of what it refers to


def markdown(text: str, names: set[str], link: Link) -> str:
    """A docstring as Markdown. names: parameters or fields, whose remarks become a list."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "Args:":
            below = next((n for n, line in enumerate(lines) if n and not line.startswith(" ")), len(lines))
            found += pieces(textwrap.dedent("\n".join(lines[1:below])).splitlines(), names)
            lines = lines[below:]
        found += pieces(lines, names)
    return "\n\n".join(written(kind, lines, names, link) for kind, lines in found) + "\n"


def pieces(lines: list[str], names: set[str]) -> list[tuple[str, list[str]]]:
    """The pieces of a paragraph: kind ("text", "item", "remark" or "code") and lines."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        kind, previous = found[-1] if found else ("", [""])
        begun, ended = beginning(line, names), previous[-1].rstrip().endswith((".", ":"))
        if line.startswith(" "):
            fresh = None if kind in ("remark", "item", "code") else "code"
        elif begun == "code":
            fresh = "code" if not found or (ended and kind != "code") else None
        elif begun == "section":
            fresh = "text" if not found or ended or kind == "code" else None
        else:
            fresh = begun or ("text" if kind in ("", "code") else None)
        if fresh:
            found.append((fresh, [line]))
        else:
            previous.append(line)
    return found


def beginning(line: str, names: set[str]) -> str | None:
    """What a line can be the first of; None for a line of text."""
    remark = REMARK.match(line)
    if remark and all(name.lstrip("*") in names for name in remark[1].split(", ")):
        return "remark"
    kinds = {"item": ITEM, "section": SECTION, "code": FORMULA}
    return next((kind for kind, pattern in kinds.items() if pattern.match(line)), None)


def written(kind: str, lines: list[str], names: set[str], link: Link) -> str:
    """A piece as Markdown."""
    if kind == "code":
        code = textwrap.dedent("\n".join(lines))
        return f"```{language(code)}\n{code}\n```"
    text = " ".join(line.strip() for line in lines)
    if kind == "remark":
        return "\n".join(remark(each, link) for each in remarks(text, names))
    marker = ITEM.match(text)
    return inline(text, link) if not marker else marker[0] + inline(text[marker.end() :], link)


def remarks(text: str, names: set[str]) -> list[str]:
    """The remarks in a text that begins with one; a further one follows a full stop or a semicolon."""
    found: list[str] = []
    for part in re.split(r"(?<=[.;]) (?=[\w*, ]+: )", text):
        if not found or beginning(part, names) == "remark":
            found.append(part)
        else:
            found[-1] += f" {part}"
    return found


def remark(text: str, link: Link) -> str:
    """One remark as an item of a list."""
    told, _, text = text.partition(":")
    return f"- {', '.join(f'`{name}`' for name in told.split(', '))}: {inline(text.strip(), link)}"


def inline(text: str, link: Link) -> str:
    """Text with references for the names in backticks and links to papers; the rest as it stands."""
    parts, end = [], 0
    for found in QUOTED.finditer(text):
        target = link(found[1])
        parts.append(plain(text[end : found.start()]))
        parts.append(f"[{found[0]}][{target}]" if target else found[0])
        end = found.end()
    return "".join([*parts, plain(text[end:])])


def plain(text: str) -> str:
    """Text without Markdown's meaning, papers linked."""
    return sources.with_papers(text.translate(MEANT))


def language(code: str) -> str:
    """Python where it is, for the colours."""
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def with_shapes(node: ast.expr | None, parent: Any) -> Any:
    """An annotation whose shapes stay strings, `Float[Tensor, "B C h w"]`; None for one that has none.

    griffe reads strings in annotations as names of types not yet defined.
    """
    shaped = False
    for each in ast.walk(node) if node else ():
        if isinstance(each, ast.Subscript) and isinstance(each.value, ast.Name) and each.value.id in SHAPED:
            shaped = True
            for part in ast.walk(each.slice):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value = part.value.strip()  # " B" is B; the blank is for linters
    return griffe.safe_get_annotation(node, parent, parse_strings=False) if shaped else None


class Docstrings(griffe.Extension):
    """Annotations with their shapes; docstrings as Markdown; of members, those that say something."""

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        """Parameters and result."""
        of = node.args
        given = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
        for argument in given:
            annotation = with_shapes(argument.annotation, func.parent)
            if annotation is not None:
                func.parameters[argument.arg].annotation = annotation
        func.returns = with_shapes(node.returns, func.parent) or func.returns

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Constants, fields, properties: the comment above or behind is the docstring."""
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        attr.annotation = with_shapes(annotation, attr.parent) or attr.annotation
        if attr.docstring is None and isinstance(node, ast.Assign | ast.AnnAssign):
            said = sources.comment(attr.module.path, node)
            attr.docstring = griffe.Docstring(said, lineno=node.lineno, parent=attr) if said else None

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        """What it defines, not what it hands on."""
        mod.exports = None

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """No heading for a field or a layer of which nothing is said: the signature and the source tell."""
        for name, member in list(cls.members.items()):
            plain = "dataclass" in cls.labels or "class-attribute" not in member.labels
            if member.is_attribute and member.docstring is None and plain and "property" not in member.labels:
                del cls.members[name]

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Docstring and labels."""
        obj.labels -= OBVIOUS
        if obj.docstring is None:
            return
        module = obj.module.path
        owner = obj.path if obj.is_class else obj.parent.path if obj.parent and obj.parent.is_class else None
        names = set(obj.members) if obj.is_class else set[str]()
        if isinstance(obj, griffe.Class | griffe.Function):
            names |= {parameter.name for parameter in obj.parameters}

        def link(name: str) -> str | None:
            target = None if name in names else sources.meant(name, module, owner)
            return None if target in (obj.path, module) else target

        obj.docstring.value = markdown(obj.docstring.value, names, link)
