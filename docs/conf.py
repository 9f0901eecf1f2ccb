"""Settings of the documentation site: `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))

import pages

import mtlgrad_jax
from mtlgrad_jax.registry import ROWS

project = "mtlgrad_jax"
author = "The mtlgrad_jax developers"
version = release = mtlgrad_jax.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "mtlgrad_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3
nb_execution_mode = "off"
smartquotes_action = "D"  # dashes, but quotes as in the code
default_role = "py:obj"  # single backticks in docstrings: a link if there is such a name, else code
autodoc_member_order = "bysource"
autodoc_default_options = {"no-value": True}
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_use_rtype = False
python_use_unqualified_type_names = True


def outside_links(app: Any, name: str, text: list[str]) -> None:
    """Let links to files outside `docs/`, which work on GitHub, lead to their pages here."""
    text[0] = text[0].replace("](../CONTRIBUTING.md", "](generated/contributing.md")


def tidy(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave out the notes that the registry adds to a docstring, as its page has a table, and protect K. from lists."""
    if name.removeprefix("mtlgrad_jax.") in ROWS and "Notes:" in lines:
        del lines[lines.index("Notes:") :]
    if name.startswith("mtlgrad_jax") and lines[:1] and lines[0].startswith("Alias for field number"):
        lines.clear()
    lines[:] = [re.sub(r"^(\s*num_tasks: )K\.$", r"\1K, the number of tasks.", line) for line in lines]


def short_types(app: Any, tree: nodes.document) -> None:
    """Write the types of arrays as the code does."""
    for text in list(tree.findall(nodes.Text)):
        if "jaxlib._jax." in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.", "")))


def method_links(app: Any, tree: nodes.document) -> None:
    """Let the name of a method in code style lead to its page."""
    for code in list(tree.findall(nodes.literal)):
        name = re.fullmatch(r"(?:mtl\.)?(\w+)(?:\(.*\))?", code.astext())
        if name and name[1] in ROWS and isinstance(code.parent, nodes.paragraph | nodes.entry | nodes.strong):
            page = app.builder.get_relative_uri(app.env.docname, f"generated/methods/{name[1]}")
            link = nodes.reference("", "", code.deepcopy(), internal=True, refuri=page)
            code.parent.replace(code, link)


def mathml(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    tex = re.sub(r"\}\s+\{", "}{", node.astext())  # docutils does not know the space between the parts of a fraction
    block = node.tagname == "math_block"
    formula = tex2mathml(tex, as_block=block)
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for documents."""
    pages.write()
    app.connect("source-read", outside_links)
    app.connect("autodoc-process-docstring", tidy, priority=400)  # before napoleon
    app.connect("doctree-read", short_types)
    app.connect("doctree-read", method_links)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
