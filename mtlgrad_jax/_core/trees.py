"""Splitting a tree into groups of leaves and merging them again."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtlgrad_jax._core.tasks import Jacobian

Labels = Any | Callable[[Any], Hashable]


def label_leaves(labels: Labels, tree: PyTree, name: str) -> list[Any]:
    """Return one label per leaf, from a tree of labels, its upper part, or a function of the leaf's path."""
    tree = tree.like if isinstance(tree, Jacobian) else tree
    bare = jax.tree_util.all_leaves([labels])
    if callable(labels) and bare:
        found = [labels(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    else:
        given: Any = jax.tree.structure(labels)
        expected: Any = jax.tree.structure(tree)
        try:
            parts = [tree] if bare else given.flatten_up_to(tree)
        except (ValueError, TypeError):
            parts = None
        if parts is None or (bare and given != expected):
            raise ValueError(
                f"`{name}` must have the structure of params, {expected}, or of its upper part, or be a function of a "
                f"leaf's path, got {given}."
            )
        sizes = [len(jax.tree.leaves(part)) for part in parts]
        found = [label for label, size in zip(jax.tree.leaves(labels), sizes, strict=True) for _ in range(size)]
    for label in found:
        if not isinstance(label, Hashable):
            raise ValueError(f"`{name}` must give labels that can be keys of a dict, got {label!r}.")
    return found


def under(*names: str | int) -> Callable[[Any], bool]:
    """Return a function that tells whether a leaf's path begins with one of the given names.

    For arguments such as `is_shared` and `where`. A name may be a dict key, a field, an attribute or an index.

    Args:
      *names: the first parts of the paths.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.shared_private(mtl.mean(), mtl.under("trunk"))
      >>> grads = {"trunk": jnp.asarray([[1.0], [3.0]]), "heads": [jnp.asarray([[5.0], [0.0]])]}
      >>> update, _ = tx.update(grads, tx.init({"trunk": jnp.zeros(1), "heads": [jnp.zeros(1)]}))
      >>> update["trunk"].tolist(), update["heads"][0].tolist()
      ([2.0], [5.0])
    """
    if not names or not all(isinstance(name, (str, int)) and not isinstance(name, bool) for name in names):
        raise ValueError(f"`names` must be names or indices, got names={names!r}.")

    def begins(path: Any) -> bool:
        return bool(path) and next(
            getattr(path[0], part) in names for part in ("key", "name", "idx") if hasattr(path[0], part)
        )

    return begins


def flag_leaves(flags: Any, tree: PyTree, name: str) -> list[bool]:
    """Return which leaves are flagged by a tree of bool or a function of the leaf's path; at least one must be."""
    found = label_leaves(flags, tree, name)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in found):
        raise ValueError(f"`{name}` must say True or False for every leaf, got {found!r}.")
    if not any(found):
        raise ValueError(f"`{name}` must be true for some leaf, got none.")
    return found


def cut(tree: PyTree, labels: list[Any], label: Any) -> Any:
    """Return a tree with None in place of leaves of other labels; for a TaskJacobian, that of the leaves that are left.

    Paths stay those of the whole tree, so that functions of a path also work inside another wrapper.
    """
    if isinstance(tree, Jacobian):
        return tree.part([own == label for own in labels])
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([leaf if own == label else None for leaf, own in zip(leaves, labels, strict=True)])


def merge(tree: PyTree, *groups: PyTree) -> PyTree:
    """Return a tree with the structure of `tree` and the leaves of the groups, which `cut` made."""
    tree = tree.like if isinstance(tree, Jacobian) else tree
    leaves = dict(named for group in groups for named in jax.tree_util.tree_leaves_with_path(group))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], tree)


def row_shapes(task_grads: PyTree) -> PyTree:
    """Return the shape and dtype of each leaf of one gradient of a stack or TaskJacobian."""
    if isinstance(task_grads, Jacobian):
        return task_grads.like
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), task_grads)


def unaliased(tree: PyTree, other: PyTree = None) -> PyTree:
    """Return a tree that can be donated: no array occurs in it twice, or in the other tree too."""
    seen = {id(leaf) for leaf in jax.tree.leaves(other)}

    def own(leaf: Any) -> Any:
        leaf = jnp.copy(leaf) if isinstance(leaf, jax.Array) and id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)
