"""Short leaves joined into long ones: most of the time to compile a program goes into what it does with each leaf."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.control import by_platform, once

_SHORT = 1 << 13  # most entries of a leaf that is joined with others


class Leaves(NamedTuple):
    """Marks a tree over the parameters among the arguments and results of a function."""

    tree: PyTree  # leaves may have leading axes


def joined(function: Callable[..., Any], params: PyTree, *args: Any) -> Any:
    """Return `function(*args)`; under jit on one CPU, the short leaves of each marked tree are joined for it.

    The function must treat all leaves alike. It gets the trees without marks; those that it marks are cut again.

    Args:
      function: takes the arguments.
      params: the parameters, or their shapes.
      *args: trees of arrays, in which trees over the parameters are marked as `Leaves`.
    """
    structure: Any
    like, structure = jax.tree.flatten(params)
    marked = [node for node in jax.tree.leaves(args, is_leaf=_is_marked) if _is_marked(node)]
    parts = _parts(like, *map(jax.tree.leaves, marked))

    def join(tree: PyTree) -> list[Array]:
        leaves = jax.tree.leaves(tree)
        axes = leaves[0].ndim - like[0].ndim
        return [stacks.join([leaves[i] for i in p], axes) if len(p) > 1 else leaves[p[0]] for p in parts]

    def cut(tree: PyTree) -> PyTree:
        cuts = [_cut(leaf, [like[i] for i in part]) for leaf, part in zip(jax.tree.leaves(tree), parts, strict=True)]
        order = itertools.chain.from_iterable
        leaves = dict(zip(order(parts), order(cuts), strict=True))
        return structure.unflatten(leaves[i] for i in range(len(like)))

    def call(*args: Any, blocked: bool) -> Any:
        if not blocked:
            return _unmark(lambda tree: tree, function(*_unmark(lambda tree: tree, args)))
        return _unmark(cut, function(*_unmark(join, args)))

    if len(parts) == len(like) or not isinstance(jnp.zeros(()), jax.core.Tracer):
        return call(*args, blocked=False)
    return by_platform(call, *args)


def marked(state: PyTree, shapes: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Mark the trees over the parameters in a state, whose shapes `shapes(params)` gives."""
    structure: Any = jax.tree.structure(shapes(Leaves(params)))
    return structure.unflatten(jax.tree.leaves(state))


def draw_like(sample: Callable[[Array, tuple[int, ...]], Array], key: Array, tree: PyTree) -> PyTree:
    """Return `sample(key, shape)` for every leaf; short leaves share one draw, which is the same if they are joined."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    parts = _parts(leaves)
    found: dict[int, Array] = {}
    for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
        like = [leaves[i] for i in part]
        if len(part) == 1:
            draws = [sample(own, like[0].shape)]
        else:
            draws = _cut(once(sample(own, (sum(leaf.size for leaf in like),))), like)
        found.update(zip(part, draws, strict=True))
    return treedef.unflatten(found[i] for i in range(len(leaves)))


def _is_marked(node: Any) -> bool:
    return isinstance(node, Leaves)


def _unmark(change: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    return jax.tree.map(lambda node: change(node.tree) if _is_marked(node) else node, tree, is_leaf=_is_marked)


def _parts(like: Sequence[Any], *others: Sequence[Any]) -> list[list[int]]:
    """Return which leaves are joined: all short ones with the same dtypes, by shape; a second time, nothing is."""
    found: dict[Any, list[int]] = {}
    for i, leaves in enumerate(zip(like, *others, strict=True)):
        dtypes = tuple(jnp.result_type(leaf) for leaf in leaves)
        found.setdefault(dtypes if leaves[0].size <= _SHORT else i, []).append(i)
    return [sorted(part, key=lambda i: like[i].shape) for part in found.values()]


def _cut(joint: Array, like: list[Any]) -> list[Array]:
    if len(like) == 1:
        return [joint]
    pieces = stacks.cut(joint, [math.prod(own.shape) for own in like], axis=joint.ndim - 1)
    return [piece.reshape(*joint.shape[:-1], *own.shape) for piece, own in zip(pieces, like, strict=True)]
