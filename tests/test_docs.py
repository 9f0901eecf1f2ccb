"""Every public name has an entry in the reference, and links between the pages work where they are read as files."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import ROWS

ROOT = Path(__file__).parents[1]
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def pages():
    """The generated pages, by path."""
    return runpy.run_path(str(ROOT / "docs" / "pages.py"))["pages"]()


def test_every_public_name_has_one_entry(pages):
    package = Path(mtl.__file__).parent
    source = ast.parse(Path(mtl.__file__).read_text())
    imported = [node for node in source.body if isinstance(node, ast.ImportFrom)]
    exported = {alias.asname for node in imported for alias in node.names}
    modules = {name for name in exported if (package / name).with_suffix(".py").exists()}
    modules |= {name for name in exported if (package / name / "__init__.py").exists()}
    integrations = {f"integrations.{path.stem}" for path in (package / "integrations").glob("[!_]*.py")}
    text = "\n".join(pages.values())
    entries = re.findall(r"^(?:\.\. auto(?:function|class)::|```\{py:data\}) mtlgrad_jax\.(\w+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(exported - modules)
    documented = re.findall(r"^\.\. automodule:: mtlgrad_jax\.([\w.]+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(modules | integrations)


def test_every_method_has_a_page_with_its_facts(pages):
    for name, row in ROWS.items():
        page = pages[f"methods/{name}.md"]
        for fact in ("Kind", "Native scale", "State", "Update needs", "Reference", "Raises"):
            assert re.search(rf"^\| {fact} \| \S", page, re.MULTILINE), (name, fact)
        assert f"({name}.md)" in pages[f"methods/{row.folder}-methods.md"]


@pytest.mark.parametrize("path", READ, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


@pytest.mark.nightly
@pytest.mark.parametrize("loop", ["Plain optax", "Flax NNX", "Flax Linen", "Equinox", "Haiku"])
def test_a_training_loop_can_be_copied(loop):
    """Alone with the data of the page it trains, in no more than 30 lines that are not blank."""
    page = (ROOT / "docs" / "training_loops.md").read_text()
    data, code = (
        re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] for text in (page, page.split(f"\n## {loop}\n")[1])
    )
    assert sum(map(bool, (data + code).splitlines())) <= 30
    before, after = {}, {}
    exec(data + code.replace("range(50)", "range(1)"), before)
    exec(data + code, after)
    for task, loss in before["losses"].items():
        assert after["losses"][task] < 0.8 * loss


def anchors(text):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_names_of_others_are_translated_to_methods():
    rows = re.findall(r"^\| `\w+` \| `(\w+)` \|", (ROOT / "docs" / "coming_from.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    assert set(rows) <= set(ROWS)
