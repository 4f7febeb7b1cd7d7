"""The modules of the packages: their pages, and what a name in a text stands for. Imports none of them."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("ldm", "sample", "train")
ARXIV = re.compile(r"(?<![\[`])\barXiv:(\d{4}\.\d{4,5})\b")


@functools.cache
def modules() -> dict[str, Path]:
    """Every public module: dotted name -> file; a package is its `__init__.py`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if parts[-1] == "__main__" or not any(part.startswith("_") for part in parts):
                found[".".join(parts)] = path
    return found


def is_package(module: str) -> bool:
    """Whether it is a folder."""
    return modules()[module].name == "__init__.py"


def children(package: str) -> tuple[list[str], list[str]]:
    """The packages and the modules directly in a package."""
    inside = [name for name in modules() if name.rpartition(".")[0] == package]
    return [name for name in inside if is_package(name)], [name for name in inside if not is_package(name)]


def page(module: str) -> str:
    """Where a module's page is."""
    return f"reference/{module.replace('.', '/')}{'/index' if is_package(module) else ''}.md"


@functools.cache
def lines(module: str) -> list[str]:
    """The module's lines."""
    return modules()[module].read_text(encoding="utf-8").splitlines()


@functools.cache
def parsed(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse("\n".join(lines(module)))


def comment(module: str, node: ast.stmt) -> str:
    """The comment behind a statement or, where there is none, the lines of comment right above it."""
    behind = lines(module)[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].strip()
    if behind.startswith("# "):
        return sentence(behind[2:])
    above, number = list[str](), node.lineno - 2
    while number >= 0 and lines(module)[number].strip().startswith("# "):
        above.insert(0, lines(module)[number].strip()[2:])
        number -= 1
    return sentence("\n".join(above))


def sentence(text: str) -> str:
    """A comment, without directives to tools and with a full stop."""
    text = re.split(r"\s*#?\s*(?:noqa|type: ignore)", text)[0].strip()
    return text and text + ("" if text[-1] in ".:!?" else ".")


@functools.cache
def members(module: str) -> dict[str, set[str]]:
    """What a module defines that has a place on its page: name -> for a class, the names in it."""
    found: dict[str, set[str]] = {}
    for node in parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = [each for each in node.body if isinstance(each, ast.FunctionDef) and shown(each.name)]
            found[node.name] = {each.name for each in inside} if isinstance(node, ast.ClassDef) else set()
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                found[target.id] = set()
    return {name: inside for name, inside in found.items() if shown(name)}


def shown(name: str) -> bool:
    """Whether a member is public."""
    return not name.startswith("_") or name == "__call__"


@functools.cache
def imported(module: str) -> dict[str, str]:
    """Names that a module imports from these packages: name -> full name."""
    found = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.ImportFrom) and node.module]
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}" for node in found for alias in node.names
    }


def place(name: str) -> str | None:
    """The name, if the site shows what it is the full name of: a module, a member of one, a method."""
    if name in modules():
        return name
    module, _, last = name.rpartition(".")
    if module in modules():
        return name if last in members(module) else None
    module, _, owner = module.rpartition(".")
    if module not in modules() or owner not in members(module):
        return None
    return name if last in members(module)[owner] else None


@functools.cache
def known() -> dict[str, str]:
    """What can be named from everywhere, because only one thing is called so: modules and classes."""
    found = [(name.split(".")[-1], name) for name in modules()]
    for module in modules():
        classes = [node.name for node in parsed(module).body if isinstance(node, ast.ClassDef)]
        found += [(name, f"{module}.{name}") for name in classes if shown(name)]
    counts = Counter(short for short, _ in found)
    return {short: name for short, name in found if counts[short] == 1}


def meant(text: str, module: str, owner: str | None = None) -> str | None:
    """What a name in backticks stands for in a module, or in its class `owner`; None if for nothing here.

    A path is looked for from the root, the package's folder and the module's; a dotted name in the class, the
    module, what it imports, the modules beside it, the package, and by a first word that only one thing has.
    What has no place of its own, such as a field, has that of its class.
    """
    if not re.fullmatch(r"[\w./]+(\(.*\))?", text):
        return None
    name, package = text.partition("(")[0], module if is_package(module) else module.rpartition(".")[0]
    around = [f"{package}.", f"{module.partition('.')[0]}.", ""]
    if name.endswith(".py"):
        name = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tried = [*(start + name for start in around), known().get(name, "")]
    else:
        first, dot, rest = name.partition(".")
        tried = [f"{owner}.{name}"] if owner else []
        tried += [f"{module}.{name}", imported(module).get(first, first) + dot + rest]
        tried += [start + name for start in around if dot]
        tried += [known()[first] + dot + rest] if first in known() and (dot or first[0].isupper()) else []
    found = next(filter(None, map(place, tried)), None)
    if found is None and name[0].isupper() and not name.endswith(".py"):
        return meant(name.rpartition(".")[0], module, owner)
    return found


def with_papers(text: str) -> str:
    """Markdown with its papers linked, where they are not."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def docstrings(module: str) -> str:
    """All docstrings of a module."""
    nodes = ast.walk(parsed(module))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return "\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


def gone(text: str) -> list[str]:
    """The paths in backticks that are not in the repository."""
    folders = "benchmarks|configs|ldm|notebooks|sample|tests|train"
    paths = re.findall(rf"(?<!`)`((?:{folders})/[\w./*-]+)", text)
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/.")))]


def summary(module: str) -> str:
    """The first sentence or line of the module's docstring."""
    text = " ".join((ast.get_docstring(parsed(module)) or "").split("\n\n")[0].split())
    return re.split(r"(?<! al)(?<! alg)(?<! eq)\. ", text)[0].rstrip(".:")


def table(names: list[str], start: str) -> str:
    """Modules with what they are; start: the page's folder."""
    rows = [
        f"| [`{name}`]({Path(page(name)).relative_to(start)}) | {cell(summary(name))} |" for name in names
    ]
    return "\n".join(["| module | what |", "|---|---|", *rows])


def cell(text: str) -> str:
    """Text in a table."""
    return text.replace("|", "\\|")


def overview() -> str:
    """The page that leads to all modules."""
    parts = ["# Reference", "Made of the docstrings of the sources."]
    for package in PACKAGES:
        inner = [name for name in modules() if name.startswith(package)]
        parts += [f"## {package}", table(inner, "reference")]
    return "\n\n".join(parts) + "\n"


def text(module: str) -> str:
    """A module's page: what is below it, and its members."""
    parts = [f"::: {module}"]
    if is_package(module):
        below = [name for group in children(module) for name in group]
        parts.append(table(below, str(Path(page(module)).parent)))
    return "\n\n".join(parts) + "\n"
