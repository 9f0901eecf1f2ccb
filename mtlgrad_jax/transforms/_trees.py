"""Cutting a tree into groups of leaves and putting it together again."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import PyTree

Labels = Any | Callable[[Any], Hashable]


def label_leaves(labels: Labels, tree: PyTree, name: str) -> list[Any]:
    """Return one label per leaf, from a tree of labels or a function of the leaf's path."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if callable(labels):
        return [labels(path) for path in paths]
    given: Any = jax.tree.structure(labels)
    expected: Any = jax.tree.structure(tree)
    if given != expected:
        raise ValueError(f"`{name}` must have the structure of params, {expected}, got {given}.")
    return jax.tree.leaves(labels)


def cut(tree: PyTree, labels: list[Any], label: Any) -> dict[str, Any]:
    """Return the leaves with one label, under their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for (path, leaf), own in zip(leaves, labels, strict=True) if own == label}


def merge(tree: PyTree, *groups: dict[str, Any]) -> PyTree:
    """Return a tree of the structure of `tree`, its leaves taken from the groups."""
    leaves = {path: leaf for group in groups for path, leaf in group.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], tree)
