"""Cutting a tree into groups of leaves and putting it together again."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.tasks import Jacobian

Labels = Any | Callable[[Any], Hashable]

_SHORT = 1 << 13  # entries of a leaf that shares its draw with others


def label_leaves(labels: Labels, tree: PyTree, name: str) -> list[Any]:
    """Return one label per leaf, from a tree of labels, of its upper part or a function of the leaf's path."""
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
    """Return a function that says of a leaf's path whether it begins with one of some names.

    For arguments such as `is_shared` and `where`, whatever the container: keys of a dict, fields, attributes, indices.

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
    """Return which leaves are flagged, by a tree of bool or a function of the leaf's path; some must be."""
    found = label_leaves(flags, tree, name)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in found):
        raise ValueError(f"`{name}` must say True or False for every leaf, got {found!r}.")
    if not any(found):
        raise ValueError(f"`{name}` must be true for some leaf, got none.")
    return found


def cut(tree: PyTree, labels: list[Any], label: Any) -> Any:
    """Return the leaves with one label, under their paths; of a TaskJacobian that in these leaves."""
    if isinstance(tree, Jacobian):
        return tree.part([own == label for own in labels])
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for (path, leaf), own in zip(leaves, labels, strict=True) if own == label}


def merge(tree: PyTree, *groups: dict[str, Any]) -> PyTree:
    """Return a tree of the structure of `tree`, its leaves taken from the groups."""
    tree = tree.like if isinstance(tree, Jacobian) else tree
    leaves = {path: leaf for group in groups for path, leaf in group.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], tree)


def unaliased(tree: PyTree, other: PyTree = None) -> PyTree:
    """Return a tree that can be donated: no array in it is there twice, or in the other tree."""
    seen = {id(leaf) for leaf in jax.tree.leaves(other)}

    def own(leaf: Any) -> Any:
        leaf = jnp.copy(leaf) if isinstance(leaf, jax.Array) and id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def draw_like(sample: Callable[[Array, tuple[int, ...]], Array], key: Array, leaves: list[Array]) -> list[Array]:
    """Return `sample(key, shape)` for every leaf, drawn at once for all short ones: draws take long to compile."""
    short = [leaf.size <= _SHORT for leaf in leaves]
    ends = np.cumsum([leaf.size for leaf, shares in zip(leaves, short, strict=True) if shares])
    first, *others = jax.random.split(key, 1 + len(leaves) - sum(short))
    parts = iter(jnp.split(stacks.once(sample(first, (int(ends[-1]),))), ends[:-1]) if any(short) else [])
    keys = iter(others)
    return [
        next(parts).reshape(leaf.shape) if shares else sample(next(keys), leaf.shape)
        for leaf, shares in zip(leaves, short, strict=True)
    ]
