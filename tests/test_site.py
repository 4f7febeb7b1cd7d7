"""The site of notebooks/site: docstrings and notebooks as Markdown, names as references. `.ci/run` builds it whole."""

import base64
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("griffe", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")

SITE = Path(__file__).parents[1] / "notebooks" / "site"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(SITE))
    return importlib.import_module


def as_markdown(site: Any, text: str, *names: str, link: Any = lambda name: None) -> list[str]:
    """The paragraphs of a docstring as Markdown."""
    return site("docstrings").markdown(text, set(names), link).strip().split("\n\n")


def test_remarks_become_a_list(site: Any) -> None:
    text = "Add.\n\nx, y: numbers,\n    or tensors. One of\neach; scale: another. Mind: this is none.\nRaises ValueError for\nnone of z: any."
    assert as_markdown(site, text, "x", "y", "scale") == [
        "Add.",
        "- `x`, `y`: numbers, or tensors. One of each;\n- `scale`: another. Mind: this is none.",
        "Raises ValueError for none of z: any.",
    ]
    below = "Add.\n\nArgs:\n    x: a number.\n        More.\n    **how: options.\nRaises nothing."
    assert as_markdown(site, below, "x", "how") == [
        "Add.",
        "- `x`: a number. More.",
        "- `**how`: options.",
        "Raises nothing.",
    ]
    assert as_markdown(site, "Note: this.\nBetween: that.", "x") == ["Note: this. Between: that."]


def test_formulas_and_blocks_are_code(site: Any) -> None:
    text = "Eq. 12.\n\nsigma_t = eta sqrt(b)\nx = 2\nThen.\n\n    name   what\n    other  more\n\nText where\nx = 2 is prose."
    assert as_markdown(site, text) == [
        "Eq. 12.",
        "```text\nsigma_t = eta sqrt(b)\nx = 2\n```",
        "Then.",
        "```text\nname   what\nother  more\n```",
        "Text where x = 2 is prose.",
    ]
    assert as_markdown(site, "As this:\n    pipe = load(1)") == ["As this:", "```python\npipe = load(1)\n```"]


def test_text_keeps_its_characters_and_gains_links(site: Any) -> None:
    text = "a * b * c in [0, 1], <name>, arXiv:2112.10752, `kept *` and `known`."
    assert as_markdown(site, text, link={"known": "ldm.known"}.get) == [
        "a &#42; b &#42; c in &#91;0, 1&#93;, &#60;name>, [arXiv:2112.10752](https://arxiv.org/abs/2112.10752), "
        "`kept *` and [`known`][ldm.known]."
    ]


@pytest.mark.parametrize(
    ("name", "module", "owner", "meant"),
    [
        ("make_betas", "ldm.diffusion.schedule", None, "ldm.diffusion.schedule.make_betas"),
        ("sigma(t)", "ldm.diffusion.schedule", "ldm.diffusion.schedule.Schedule", "ldm.diffusion.schedule.Schedule.sigma"),
        ("grids.make_grid", "ldm.diffusion.samplers", None, "ldm.diffusion.grids.make_grid"),  # beside it
        ("make_grid", "sample.stream", None, "ldm.diffusion.grids.make_grid"),  # imported
        ("samplers.py", "ldm.diffusion.step", None, "ldm.diffusion.samplers"),
        ("models/unet.py", "ldm.diffusion.step", None, "ldm.models.unet"),
        ("sample/stream.py", "ldm.diffusion.step", None, "sample.stream"),
        ("UNet.forward", "ldm.diffusion.denoiser", None, "ldm.models.unet.UNet.forward"),  # of one class only
        ("UNetConfig.factor", "train.data", None, "ldm.models.unet.UNetConfig.factor"),
        ("UNetConfig.context_dim", "train.data", None, "ldm.models.unet.UNetConfig"),  # in its signature
        ("make_gammas", "ldm.diffusion.schedule", None, None),
        ("x = 1", "ldm.diffusion.schedule", None, None),
        ("log.jsonl", "train.loop", None, None),
    ],
)  # fmt: skip
def test_what_a_name_stands_for(
    site: Any, name: str, module: str, owner: str | None, meant: str | None
) -> None:
    assert site("sources").meant(name, module, owner) == meant


def test_paths_that_do_not_exist(site: Any) -> None:
    text = "`ldm/config.py`, `configs/train/*.yaml`, `tests/`, `ldm/no.py` and `configs/none/`; `runs/mine`"
    assert site("sources").gone(text) == ["ldm/no.py", "configs/none/"]


def test_every_public_module_has_a_page_that_is_reached(site: Any) -> None:
    sources, hooks_tree = site("sources"), []

    def walk(package: str) -> None:
        inner, modules = sources.children(package)
        hooks_tree.extend([package, *modules])
        for each in inner:
            walk(each)

    for package in sources.PACKAGES:
        walk(package)
    assert sorted(hooks_tree) == sorted(sources.modules())
    assert all(sources.summary(module) for module in sources.modules()), "a module without a docstring"
    assert len({sources.page(module) for module in sources.modules()}) == len(sources.modules())


def test_a_notebook_as_a_page(site: Any, tmp_path: Path) -> None:
    picture = base64.b64encode(b"PNG").decode()
    cells = [
        {
            "cell_type": "markdown",
            "source": ["# Title\n", "You can\n", "- add, see [2](02_noise.ipynb#a).\n"],
        },
        {
            "cell_type": "code",
            "source": ["x = 1\n", "x"],
            "outputs": [
                {"text": ["one\n"]},
                {"data": {"image/png": picture, "text/plain": "figure"}},
                {"data": {"image/svg+xml": ["<svg>", "</svg>"], "text/plain": "figure"}},
                {"data": {"text/markdown": ["| a |\n", "|---|"], "text/plain": "table"}},
                {"data": {"text/plain": ["1"]}},
            ],
        },
        {"cell_type": "markdown", "source": "<details>\n<summary>Solution</summary>\n\n$x$\n</details>"},
        {
            "cell_type": "markdown",
            "source": "- `ldm/diffusion/schedule.py`: `Schedule`, `nothing`\n- `ldm/no.py`: `x`",
        },
    ]
    path = tmp_path / "90_small.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    text, pictures = site("books").rendered(path)
    assert pictures == {"notebooks/90_small/1.png": b"PNG", "notebooks/90_small/2.svg": b"<svg></svg>"}
    assert text.split("\n\n") == [
        "# Title\nYou can",
        "- add, see [2](02_noise.md#a).",
        "```python\nx = 1\nx\n```",
        "```text\none\n```",
        "![output](90_small/1.png)",
        "![output](90_small/2.svg)",
        "| a |\n|---|",
        "```text\n1\n```",
        '<details markdown="1">\n<summary>Solution</summary>',
        "$x$\n</details>",
        "- [`ldm/diffusion/schedule.py`][ldm.diffusion.schedule]: [`Schedule`][ldm.diffusion.schedule.Schedule], "
        "`nothing`\n- [`ldm/no.py`][ldm.no]: `x`\n",  # which the strict build refuses
    ]


def test_code_in_a_page_stays_as_it_is(site: Any) -> None:
    text = "As\n- this\n```yaml\nlist:\n- [a](01_tour.ipynb)\n```\nAs\n- that\n"
    assert site("books").to_pages(text) == text.replace("As\n-", "As\n\n-")
    papers = site("books").to_pages("arXiv:2006.11239, [arXiv:1234.56789](x), `arXiv:2006.11239`")
    assert papers.startswith(
        "[arXiv:2006.11239](https://arxiv.org/abs/2006.11239), [arXiv:1234.56789](x), `arXiv"
    )


def test_formulas_need_no_script(site: Any) -> None:
    page = '<p><span class="arithmatex">\\(a \\lt b\\)</span></p><div class="arithmatex">\\[x_0\\]</div>'
    shown = site("books").with_mathml(page)
    assert "arithmatex" not in shown
    assert shown.count("<math") == 2
    assert 'display="block"' in shown
    assert "<msub><mi>x</mi><mn>0</mn></msub>" in shown


def test_the_objects_of_a_module(site: Any) -> None:
    """Shapes stay strings, comments become docstrings, fields are told by the signature, aliases are left out."""
    import griffe

    extensions = griffe.load_extensions(site("docstrings").Docstrings)
    loader = griffe.GriffeLoader(extensions=extensions, search_paths=[SITE.parents[1]])
    ldm = loader.load("ldm", try_relative_path=False)
    step, schedule = ldm["diffusion.step"], ldm["diffusion.schedule"]
    assert str(step["toward"].returns) == "Float[Tensor, 'B ...']"
    assert str(step["levels"].parameters["sigmas"].annotation) == "Float[Tensor, 'levels']"
    assert str(ldm["models.unet.UNet.forward"].parameters["t"].annotation) == "Shaped[Tensor, 'B']"
    assert step["FAR"].docstring.value.startswith("From so high a level down,")
    assert schedule["SNAP"].docstring.value.strip().endswith("nearer than this is on the table.")
    assert "beta_start" not in schedule["DiffusionConfig"].members
    assert "beta_start" in schedule["DiffusionConfig"].parameters
    assert "- `beta_start`, `beta_end`: noise variance" in schedule["DiffusionConfig"].docstring.value
    assert ldm["diffusion.samplers"].exports is None
