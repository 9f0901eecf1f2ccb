"""Write the pages of the site that come from the code: one for each method, the API reference, and copies."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import mtlgrad_jax
from mtlgrad_jax._core.row import DESCENT, NON_CONFLICTING, SCALE_FREE, Row
from mtlgrad_jax.registry import METHODS, ROWS, describe, needs

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"

KINDS = {
    "losses": (
        "Losses only",
        "These weigh the losses and never compare gradients. With `mtl.balanced_value_and_grad` or a `TaskJacobian` a "
        "step costs one backward pass, as plain training does. A stack of K gradients works too, but is a waste.",
    ),
    "gramian": (
        "Gramian",
        "These look at the inner products of the gradients. A step costs K backward passes with K gradients in memory "
        "(a stack), or 2K + 1 passes with the memory of one (a `TaskJacobian`).",
    ),
    "mixed": (
        "Losses and Gramian",
        "These look at the losses and at the inner products of the gradients. They cost what Gramian methods cost: K "
        "backward passes with a stack, 2K + 1 with a `TaskJacobian`.",
    ),
    "two_batches": (
        "Two batches",
        "These take inner products between the gradients of two independent batches, so that noise does not bias "
        "them. That is twice the cost of a Gramian method. With one batch they run too, and the result code says that "
        "they are biased.",
    ),
    "coordinates": (
        "Coordinates",
        "These look at each coordinate of the K gradients, so all K are stored: K backward passes and K gradients in "
        "memory, on both routes.",
    ),
    "buffers": (
        "Buffers",
        "These average each task's gradient over time. They cost K backward passes, K gradients in memory, and another "
        "K in the state.",
    ),
    "sharpness": (
        "Sharpness",
        "These look at gradients near the parameters. `fs_mtl` takes each task's gradient twice: 2K backward passes. "
        "`samo` replaces the first K of them by one backward pass and 2K forward passes.",
    ),
    "wrappers": (
        "Wrappers",
        "These change what another method sees, or what it returns. The cost is that of the method inside, unless the "
        "page says otherwise.",
    ),
}
"""Title of a folder of methods, and what its methods cost."""

SECTIONS = {
    "oracles": ("Gradients of the tasks", "Everything that turns losses into the gradients of K tasks."),
    "training": ("Training", "What joins losses, a method and an optimizer."),
    "_core": ("Writing a method", "The one kind of object, two ways to make one, and what its state says."),
    "solvers._solution": ("Writing a method", ""),
    "diagnostics": ("Metrics", "What `with_metrics` recorded."),
    "registry": ("Papers", "What to cite."),
}
"""Title and first line of an API page, by where its names are defined."""

MODULES = {
    "stacks": "Sums over parameters: all that touches arrays of the size of the gradients.",
    "solvers": "K×K problems, solved on the device.",
    "diagnostics": "Metrics, plots and Pareto fronts.",
    "integrations.nnx": "Flax NNX.",
    "integrations.linen": "Flax Linen.",
    "integrations.logging": "TensorBoard and other loggers.",
    "registry": "The rows of all methods and wrappers: what tables, tests and this site are made of.",
}
"""Modules whose names are used with the module's: `mtl.stacks.gramian`."""


DATA = {
    "POSITIVE_LOSSES": "The argument `losses` for a formula that needs every loss above zero: see `from_kernel`.",
    "RESULTS": "The meaning of the result codes in `Info.result`.",
}
"""What public names are that are neither functions nor classes."""


def public_names() -> list[str]:
    """Return the public names of the package that are no modules."""
    kept = (name for name, value in vars(mtlgrad_jax).items() if not isinstance(value, type(mtlgrad_jax)))
    return [name for name in kept if not name.startswith("_")]


def pages() -> dict[str, str]:
    """Return the text of all generated pages, by their path."""
    found = {f"methods/{name}.md": method_page(row) for name, row in ROWS.items()}
    for folder in KINDS:
        found[f"methods/{folder}-methods.md"] = kind_page(folder)
    return found | api_pages() | {"contributing.md": "```{include} ../../CONTRIBUTING.md\n```\n"}


def method_tables() -> str:
    """Return the tables of docs/methods.md: one for each kind of method, and one of where all come from."""
    parts = []
    for folder, (title, cost) in KINDS.items():
        rows = [row for row in METHODS if row.folder == folder]
        if rows:
            heading = ("method", "native scale", "state", "update needs", "guarantees")
            parts += [f"## {title}", cost, markdown_table(heading, map(facts_in_short, rows))]
    sources = [(f"`{row.name}`", row.reference, row.checked) for row in METHODS]
    return "\n\n".join([*parts, "## Sources", markdown_table(("method", "reference", "checked against"), sources)])


def facts_in_short(row: Row) -> tuple[str, ...]:
    """Return a line of a method for the table of its kind."""
    wanted = ", ".join(f"`{name}`" for name in needs(row))
    promises = ", ".join(sorted(row.promises & {NON_CONFLICTING, DESCENT, SCALE_FREE}))
    return f"`{row.name}`", row.scale, row.state, wanted or "-", promises or "-"


def kind_page(folder: str) -> str:
    """Return the page of a folder of methods: what they cost, and a line for each."""
    title, cost = KINDS[folder]
    rows = [row for row in ROWS.values() if row.folder == folder]
    table = [(f"[`{row.name}`]({row.name}.md)", summary(row)) for row in rows]
    return "\n\n".join([f"# {title}", cost, markdown_table(("", ""), table), toctree(row.name for row in rows)])


def method_page(row: Row) -> str:
    """Return the page of a method: its documentation, its row, and what was checked."""
    facts = [tuple(line.rstrip(".").split(": ", 1)) for line in describe(row).splitlines()]
    facts.insert(0, ("Kind", f"[{KINDS[row.folder][0]}]({row.folder}-methods.md), which says what it costs"))
    deviations = checked().get(row.name)
    if deviations:
        facts.append(("Compared with the reference", f"{deviations}; see [what was checked](../../checked.md)"))
    parts = [f"# {row.name}", directive("autofunction", row.name), "## Facts", linked(markdown_table(("", ""), facts))]
    broken = counterexamples().get(row.name)
    if broken:
        parts += [
            "## What does not hold",
            "Counterexamples, as explained in [properties](../../properties.md):",
            broken,
        ]
    return "\n\n".join(parts)


def linked(text: str) -> str:
    """Return a text with links to the papers on arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def summary(row: Row) -> str:
    """Return the first line of a factory's documentation."""
    return (row.factory.__doc__ or "").strip().splitlines()[0]


def checked() -> dict[str, str]:
    """Return how many updates of each method were compared with its reference, from the table of that page."""
    found = {}
    table = (DOCS / "checked.md").read_text().partition("<!-- /checked -->")[0]
    for name, _, count, error, narrow_count, narrow_error in table_rows(table):
        if count != "-":
            found[name] = f"{count} updates in float64, to {error}; {narrow_count} in float32, to {narrow_error}"
    return found


def counterexamples() -> dict[str, str]:
    """Return the counterexamples of each method, from the page of properties."""
    text = (DOCS / "properties.md").read_text()
    return dict(re.findall(r"^### (\w+)\n\n((?:- .*\n)+)", text, flags=re.MULTILINE))


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of a page's table that begin with a name in backticks."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return [[cells[0].strip("`"), *cells[1:]] for cells in rows]


def api_pages() -> dict[str, str]:
    """Return the pages of the API reference: every public name once, and an index of all."""
    names = public_names()
    by_title: dict[str, list[str]] = {}
    intros = dict(reversed(SECTIONS.values()))
    for name in names:
        if name not in ROWS:
            by_title.setdefault(section(name), []).append(name)
    found = {}
    for title, own in by_title.items():
        found[f"api/{slug(title)}.md"] = "\n\n".join([f"# {title}", intros[title], *map(documented, own)])
    for module, intro in MODULES.items():
        found[f"api/{module}.md"] = "\n\n".join([f"# {module}", intro, module_directive(module)])
    return found | {"api/index.md": api_index(list(found))}


def api_index(found: list[str]) -> str:
    """Return the first page of the API reference."""
    kinds = [f"[{title}](../methods/{folder}-methods.md)" for folder, (title, _) in KINDS.items()]
    return "\n\n".join(
        [
            "# API reference",
            "`import mtlgrad_jax as mtl`. Each method and each wrapper has a page of its own: "
            + ", ".join(kinds)
            + ". Everything else is here:",
            toctree((Path(page).name.removesuffix(".md") for page in found), ":maxdepth: 2"),
        ]
    )


def section(name: str) -> str:
    """Return the title of the API page for a public name, by the module that defines it."""
    value = getattr(mtlgrad_jax, name)
    module = getattr(value, "__module__", None) or "_core"
    if not module.startswith("mtlgrad_jax."):
        module = "mtlgrad_jax._core"
    own = module.removeprefix("mtlgrad_jax.")
    return next(title for prefix, (title, _) in SECTIONS.items() if own.startswith(prefix))


def documented(name: str) -> str:
    """Return what documents a public name."""
    value = getattr(mtlgrad_jax, name)
    if name in DATA:
        return "\n\n".join([f"```{{py:data}} mtlgrad_jax.{name}\n{DATA[name]}\n```", *result_codes(name)])
    return directive("autoclass" if isinstance(value, type) else "autofunction", name)


def result_codes(name: str) -> list[str]:
    """Return a table of the result codes, below their name."""
    codes = [(str(code), meaning) for code, meaning in mtlgrad_jax.RESULTS.items()]
    return [markdown_table(("code", "meaning"), codes)] if name == "RESULTS" else []


def directive(kind: str, name: str) -> str:
    """Return a directive that documents a public name."""
    members = "\n   :members:" if kind == "autoclass" else ""
    return f"```{{eval-rst}}\n.. {kind}:: mtlgrad_jax.{name}{members}\n```"


def module_directive(module: str) -> str:
    """Return a directive that documents what a module holds."""
    imported = "\n   :imported-members:" if module in ("solvers", "diagnostics") else ""
    return f"```{{eval-rst}}\n.. automodule:: mtlgrad_jax.{module}\n   :members:{imported}\n```"


def markdown_table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table."""
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def toctree(documents: Iterable[str], option: str = ":hidden:") -> str:
    """Return a table of contents."""
    return "\n".join(["```{toctree}", option, "", *documents, "```"])


def slug(title: str) -> str:
    """Return the name of a title's page."""
    return title.lower().replace(" ", "-")


def notebook_pages() -> dict[str, str]:
    """Return the notebooks, and an index of them."""
    folder = ROOT / "notebooks"
    found = {path.name: path.read_text() for path in sorted(folder.glob("*.ipynb"))}
    found["index.md"] = "\n\n".join([(folder / "README.md").read_text(), toctree(Path(name).stem for name in found)])
    return {f"notebooks/{name}": text for name, text in found.items()}


def write() -> None:
    """Write all generated pages."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    for path, text in (pages() | notebook_pages()).items():
        (GENERATED / path).parent.mkdir(parents=True, exist_ok=True)
        (GENERATED / path).write_text(text + "\n")
