"""The rows of all methods, ordered by what a method must see, and of all wrappers."""

import difflib
import functools
import importlib
import pkgutil
import textwrap
from typing import Any

from mtlgrad_jax import methods, wrappers
from mtlgrad_jax._core.method import Method
from mtlgrad_jax._core.row import Row

FOLDERS = {
    "losses": "losses only: one plain backward pass",
    "gramian": "the Gramian of the gradients",
    "mixed": "losses and Gramian",
    "two_batches": "the cross-Gramian of two batches",
    "coordinates": "every coordinate of the stack",
    "buffers": "the stack, and a buffer of the same size",
    "sharpness": "gradients at perturbed parameters",
    "wrappers": "what the wrapped method looks at",
}
"""What the methods of each folder look at, which determines their cost."""


def _rows() -> dict[str, Row]:
    found = [
        importlib.import_module(module.name).ROW
        for package in (methods, wrappers)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.ispkg
    ]
    found.sort(key=lambda row: (list(FOLDERS).index(row.folder), row.name))
    return {row.name: row for row in found}


ROWS = _rows()
"""All rows by name."""

METHODS = tuple(row for row in ROWS.values() if row.folder != "wrappers" and not row.wraps)
"""Every method."""

WRAPPERS = tuple(row for row in ROWS.values() if row not in METHODS)
"""Every wrapper, and every transformation that goes before or after a method."""


def make(row: Row, num_tasks: int, /, **kwargs: Any) -> Any:
    """Return the method for K tasks with its smallest arguments and those given."""
    return row.factory(**{**smallest(row, num_tasks), **kwargs})


def smallest(row: Row, num_tasks: int) -> dict[str, Any]:
    """Return the smallest arguments of a factory, including the method inside a wrapper."""
    inside = row.around(make(ROWS[row.wraps], num_tasks)) if row.wraps else {}
    return {**inside, **row.kwargs(num_tasks)}


@functools.cache
def needs(row: Row) -> tuple[str, ...]:
    """Return the arguments that an update of the row requires."""
    method = make(row, 3)
    declared = method.arguments if isinstance(method, Method) else ()
    required = [argument.name for argument in declared if argument.required and argument.stand_in is None]
    return (*required, *row.functions)


def cite(name: str) -> str:
    """Return the BibTeX entries of a method's or a wrapper's papers.

    Args:
      name: of its factory.

    Example:
      >>> import mtlgrad_jax as mtl
      >>> print(mtl.cite("cagrad"))
      @inproceedings{liu2021conflict,
        title = {{Conflict-Averse Gradient Descent for Multi-task Learning}},
        author = {Liu, Bo and Liu, Xingchao and Jin, Xiaojie and Stone, Peter and Liu, Qiang},
        year = {2021},
        booktitle = {NeurIPS},
        eprint = {2110.14048},
        archiveprefix = {arXiv},
      }

    Raises:
      ValueError: for a name that is unknown, or that has no paper.
    """
    if not (isinstance(name, str) and name in ROWS):
        near = ", ".join(difflib.get_close_matches(str(name), ROWS)) or "none; mtl.registry.ROWS holds all names"
        raise ValueError(f"`name` must be that of a method or a wrapper, got name={name!r}. Similar names: {near}.")
    if not ROWS[name].papers:
        raise ValueError(f"`{name}` has no paper to cite. Its reference: {ROWS[name].reference}.")
    return "\n\n".join(paper.bibtex() for paper in ROWS[name].papers)


def describe(row: Row) -> str:
    """Return what the row adds to its factory's documentation."""
    promises = ", ".join(sorted(row.promises)) or "none"
    inner = "what the method needs" if row.wraps else ""
    wanted = " and ".join(filter(None, [inner, *(f"`{name}`" for name in needs(row))]))
    lines = [
        f"Native scale: {row.scale}.",
        f"State: {row.state}.",
        f"Looks at: {FOLDERS[row.folder]}.",
        f"Update needs: {wanted or 'nothing beyond the gradients'}."
        + (f" At least {row.fewest} tasks present." if row.fewest > 1 else ""),
    ]
    if row in METHODS:
        lines += [
            f"Properties, checked for the default arguments: {promises}.",
            f"Checked against: {row.checked}.",
        ]
    lines += [
        f"Reference: {row.reference}.",
        "Raises: ValueError for arguments out of range, and in update for wrong shapes.",
    ]
    return "\n".join(lines)


def _document() -> None:
    for row in ROWS.values():
        notes = textwrap.indent(describe(row), " " * 6)
        row.factory.__doc__ = f"{(row.factory.__doc__ or '').rstrip()}\n\n    Notes:\n{notes}\n    "


_document()
