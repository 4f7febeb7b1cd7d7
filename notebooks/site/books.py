"""Notebooks as pages: their cells and committed outputs as Markdown; TeX as MathML. Runs nothing."""

import base64
import html
import json
import re
from pathlib import Path

import sources
from latex2mathml.converter import convert
from sources import ROOT

NOTEBOOK = re.compile(r"(\]\([\w/.]*\d\d_\w+)\.ipynb")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LIST = re.compile(r"^((?!-|\d+\.| ).+)\n(?=- |1\. )", re.MULTILINE)
PLACES = re.compile(r"^- `((?:ldm|sample|train)/[\w/]+\.py)`: .*$", re.MULTILINE)
PICTURES = {"image/png": (".png", base64.b64decode), "image/svg+xml": (".svg", str.encode)}
TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def notebooks() -> list[Path]:
    """The notebooks of the course, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def page(path: Path) -> str:
    """Where a notebook's page is."""
    return f"notebooks/{path.stem}.md"


def to_pages(text: str) -> str:
    """Markdown as Jupyter and GitHub read it, for Python-Markdown: links, folded parts, lists."""
    parts = FENCED.split(text)
    for place in range(0, len(parts), 2):
        part = sources.with_papers(LIST.sub(r"\1\n\n", NOTEBOOK.sub(r"\1.md", parts[place])))
        parts[place] = PLACES.sub(referring, part).replace("<details>", '<details markdown="1">')
    return "".join(parts)


def prose(text: str) -> str:
    """Markdown without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))


def referring(line: re.Match[str]) -> str:
    """A line of a closing cell, "- `path.py`: `name`, ...", with references; a wrong one fails the build."""
    module = line[1].removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def reference(quoted: re.Match[str]) -> str:
        if quoted[1] == line[1]:
            return f"[{quoted[0]}][{module}]"
        target = sources.meant(quoted[1], module) if module in sources.modules() else None
        return f"[{quoted[0]}][{target}]" if target else quoted[0]

    return re.sub(r"`([^`]+)`", reference, line[0])


def rendered(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their paths in the site."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(to_pages(source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            picture = next((kind for kind in PICTURES if kind in data), None)
            if picture:
                suffix, decode = PICTURES[picture]
                name = f"{path.stem}/{len(pictures) + 1}{suffix}"
                pictures[f"notebooks/{name}"] = decode(data[picture])
                parts.append(f"![output]({name})")
            elif "text/markdown" in data:
                parts.append(to_pages(data["text/markdown"]))
            else:
                text = "".join(output.get("text", "")) or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def with_mathml(page: str) -> str:
    """HTML with its TeX, marked by arithmatex, as MathML."""
    return TEX.sub(lambda found: mathml(html.unescape(found[2]), found[1] == "div"), page)


def mathml(tex: str, block: bool) -> str:
    """A formula."""
    return convert(tex, display="block" if block else "inline")
