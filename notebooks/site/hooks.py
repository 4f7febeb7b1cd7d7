"""The pages of the site, for mkdocs: files of the repository, notebooks, and one page for each module.

`on_config` makes the navigation, `on_files` the pages, `on_page_content` turns TeX into MathML, which
browsers show by themselves.
"""

import logging
import re
from typing import Any

import books
import sources
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from sources import ROOT

LOG = logging.getLogger("mkdocs.hooks.site")  # in a strict build a warning is an error
TEXTS = ("README.md", "CHANGELOG.md", "THIRD_PARTY.md", "notebooks/README.md")
LINKED = re.compile(r'\]\(([^)#:\s]+)\)|src="([^":]+)"')


def ablations() -> list[str]:
    """Reports of ablations, paths in the repository."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs/ablations").glob("*.md"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation."""
    course = ["notebooks/README.md", *(books.page(path) for path in books.notebooks())]
    config.nav = [
        {"Start": "README.md"},
        {"Course": course},
        {"Reference": ["reference/index.md", *map(tree, sources.PACKAGES)]},
        {"Ablations": ablations()},
        {"Changelog": "CHANGELOG.md"},
        {"Third parties": "THIRD_PARTY.md"},
    ]
    return config


def tree(package: str) -> dict[str, Any]:
    """The navigation below a package: its own page, its packages, its modules."""
    inner, modules = sources.children(package)
    pages = [{module.split(".")[-1]: sources.page(module)} for module in modules]
    return {package.split(".")[-1]: [sources.page(package), *map(tree, inner), *pages]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages, the pictures in them and what else they link to."""
    for name, content in {**contents(), **reference()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def contents() -> dict[str, str | bytes]:
    """Pages made of files, by their place in the site; warns of what these name and is not there."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*TEXTS, *ablations())}
    found: dict[str, str | bytes] = {name: books.to_pages(text) for name, text in texts.items()}
    for path in books.notebooks():
        texts[books.page(path)], pictures = books.rendered(path)
        found |= {books.page(path): texts[books.page(path)], **pictures}
    for name, text in texts.items():
        tell_gone(name, text)
        for link in ((ROOT / name).parent / (a or b) for a, b in LINKED.findall(books.prose(text))):
            place = str(link.resolve().relative_to(ROOT))
            if link.is_file() and link.suffix != ".ipynb":
                found.setdefault(place, link.read_bytes())
            elif place not in found and not link.exists():
                LOG.warning("%s links to %s, which does not exist", name, place)
    return found


def reference() -> dict[str, str]:
    """Pages made of modules; warns of paths in their docstrings that are not there."""
    for module in sources.modules():
        tell_gone(module, sources.docstrings(module))
    pages = {sources.page(module): sources.text(module) for module in sources.modules()}
    return {"reference/index.md": sources.overview(), **pages}


def tell_gone(name: str, text: str) -> None:
    """Warn of paths in backticks that are not in the repository. The past of the changelog may be."""
    for path in sources.gone(text) if name != "CHANGELOG.md" else ():
        LOG.warning("%s names %s, which does not exist", name, path)


def on_page_content(html: str, **_: Any) -> str:
    """TeX as MathML."""
    return books.with_mathml(html)
