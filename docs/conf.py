"""The documentation site: `make docs`.

The source directory is the checkout, so that a link between pages is the same file on the site and on a forge. Pages
are plain Markdown; what a method's or a layer's page cannot say in it, the fields of the class, is put below it here.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import gossamer
from gossamer.layers import PARAMETRIZATIONS
from gossamer.optim.optimizer import num_bytes

project = "Gossamer"
author = "The Gossamer contributors"
release = gossamer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "results/**.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "docs/_build", "src", "tests", "runs", "shared"]
myst_heading_anchors = 3
smartquotes = False  # B'A' is a product of two factors
highlight_language = "text"  # an algorithm is no Python

autodoc_default_options = {"undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what torch says of every module is not about ours
napoleon_use_rtype = False

html_theme = "furo"
html_title = "Gossamer"
html_static_path = ["_static"]
html_css_files = ["gossamer.css"]
html_additional_pages = {"index": "home.html"}
templates_path = ["_templates"]
html_show_copyright = html_show_sphinx = html_copy_source = False


def complete(app: Sphinx, docname: str, source: list[str]) -> None:
    """What pages say only here: the class of a method or a layer, from the code; the list of them; a table's name."""
    folder, _, name = docname.rpartition("/")
    if folder == "docs/methods":
        source[0] += in_python("gossamer", gossamer.methods()[name].cls)
    elif folder == "docs/layers":
        source[0] += in_python("gossamer.layers", PARAMETRIZATIONS[name], "   :no-index:\n")
    elif docname == "docs/methods":
        source[0] += f"\n{methods_table()}\n{PAGES.format('methods')}"
    elif docname == "docs/results":
        source[0] = source[0].replace("\n\n", REPORT, 1)
    elif docname == "docs/layers":
        source[0] += PAGES.format("layers")
    elif folder.partition("/")[0] == "results" and not source[0].startswith("# "):
        source[0] = f"# {docname.removeprefix('results/')}\n\n{source[0]}"


REPORT = '\n\n<a href="../report/index.html">The report</a>: curves, filters, every row as CSV.\n\n'
"""Of `make docs`, which writes it beside the pages."""
PAGES = "\n```{{toctree}}\n:hidden:\n:glob:\n{}/*\n```\n"


def in_python(module: str, cls: type[Any], options: str = "") -> str:
    """The class with its fields, also those that it has from another: they are what its user sets."""
    members = ", ".join(field.name for field in fields(cls))
    directive = f".. autoclass:: {module}.{cls.__name__}\n   :members: {members}\n{options}"
    return f"\n## In Python\n\n```{{eval-rst}}\n{directive}```\n"


def methods_table() -> str:
    """Every method with the bytes it keeps for a large matrix, at its defaults, the least first."""
    matrix = torch.empty(4096, 11008, device="meta")
    state = {entry.name: num_bytes(entry.cls().init(matrix).values()) for entry in gossamer.methods().values()}
    lines = [
        "| method | state of a 4096 x 11008 matrix at the defaults, MiB | of AdamW's | what it is |",
        "|---|---:|---:|---|",
    ]
    for name in sorted(state, key=lambda name: (state[name], name)):
        sizes = f"{state[name] / 2**20:,.1f} | {state[name] / state['adamw']:.2%}"
        lines.append(f"| [`{name}`](methods/{name}.md) | {sizes} | {gossamer.methods()[name].summary} |")
    return "\n".join(lines)


def from_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown with Google's sections. In the words of reStructuredText: an indented block is literal, a
    list may begin below a line of text, and code has two backticks."""
    if what == "data":  # the text below a constant, which is not in the object
        lines[:] = _below_constant(name)
    out: list[tuple[bool, str]] = []  # whether it is literal, and the line
    section = literal = False
    for line in lines:
        before = out[-1][1] if out else ""
        if line and not _indent(line):
            section, literal = bool(re.fullmatch(r"[A-Z]\w+:", line)), False
        if _indent(line) >= 4 and not (section or literal or before):
            out += [(True, "::"), (True, "")]
            literal = True
        begins = _is_item(line) and not _is_item(before) and _indent(before) <= _indent(line)
        if begins and before and not literal:
            out.append((False, ""))
        out.append((literal, line))
    texts = (
        "\n".join(line for _, line in lines) if literal else _prose("\n".join(line for _, line in lines))
        for literal, lines in groupby(out, key=lambda line: line[0])
    )
    lines[:] = "\n".join(texts).split("\n")
    if what in ("attribute", "data", "property"):  # napoleon takes what stands before a colon in their first line for
        lines[:0] = ["..", ""]  # their type; a comment has none


def _prose(text: str) -> str:
    """With code as code, links where it names something of ours, and what else would have a meaning escaped."""
    parts = re.split(r"(`+)(.+?)\1", text, flags=re.DOTALL)  # prose, backticks, code, prose, ...
    for i in range(0, len(parts), 3):
        parts[i] = re.sub(r"[|]|(?<=\w)_(?!\w)|(?<=/)\*|\*(?=\.)|(?<=\w)\*(?=[\s,])", r"\\\g<0>", parts[i])
    for i in range(2, len(parts), 3):
        ours = re.fullmatch(r"gossamer\.[\w.]+", parts[i])
        parts[i - 1], parts[i] = "", f":py:obj:`{parts[i]}`" if ours else f"``{parts[i]}``"
    return "".join(parts)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_item(line: str) -> bool:
    return line.lstrip().startswith("- ")


def _below_constant(name: str) -> list[str]:
    """The text is where the constant is made, which is not where it is offered."""
    package, _, constant = name.rpartition(".")
    for module in [package, *_imported_from(package, constant)]:
        analyzer = ModuleAnalyzer.for_module(module)
        if text := analyzer.find_attr_docs().get(("", constant)):
            return text
    return []


def _imported_from(package: str, constant: str) -> list[str]:
    source = Path(str(importlib.import_module(package).__file__)).read_text()
    modules = re.findall(rf"^from (\S+) import (?:\([^)]*\b{constant}\b|.*\b{constant}\b)", source, re.MULTILINE)
    return [inner for module in modules for inner in (*_imported_from(module, constant), module)]


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon, at 500
