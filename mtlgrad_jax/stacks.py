"""Algebra of stacked pytrees: all sums over the P parameters are in this file.

A stack is a pytree whose leaves have the shape `(K, *parameter shape)`: row i is the gradient of task i. Gramians are
accumulated leaf by leaf, never from a concatenated copy, in float32 at the highest matmul precision (float64 under
x64), whatever the gradients' dtype. Leaves that are not floating (integer parameters) count as zero gradients.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._core.checks import as_array, check_count, check_dtype, leaf_name
from mtlgrad_jax._core.control import by_platform, map_leaves, once, promoting, repeat
from mtlgrad_jax._core.tasks import Jacobian, accumulator_dtype, present_tasks, task_flags, task_vector

_BLOCK = 1 << 15  # entries of a block that stays in cache on CPU
_RUN = 256  # columns that are summed one after the other on CPU
_SHORT = 1024  # most columns of a leaf that is joined with others on CPU
_LEAST_BATCHED = 512  # entries of a slice that is a product of its own on GPU
_STACKED = 32  # most groups in a batch, and leaves in one join
_UNROLLED_ROWS = 16  # rows that one fused loop reads

AxisName = str | Sequence[str] | None
Groups = Sequence[list[Array]]  # leaves of several stacks


def num_tasks(task_grads: PyTree, params: PyTree | None = None, *, name: str = "task_grads") -> int:
    """Return K, the length of the leading axis that all leaves of a stack share.

    Args:
      task_grads: the stack.
      params: if given, every leaf must have the shape `(K, *parameter shape)`.
      name: name of the stack in error messages.

    Raises:
      ValueError: a leaf has no leading axis, another K than the first leaf, or does not match its parameter.
    """
    if isinstance(task_grads, Jacobian):
        return task_grads.num_tasks
    leaves = jax.tree_util.tree_leaves_with_path(task_grads)
    if not leaves:
        raise ValueError(f"`{name}` must have at least one leaf, got an empty tree.")
    if params is not None:
        structure: Any = jax.tree.structure(task_grads)
        expected: Any = jax.tree.structure(params)
        if structure != expected:
            raise ValueError(f"`{name}` must have the structure of params, {expected}, got {structure}.")
    shapes = [jnp.shape(p) for p in jax.tree.leaves(params)] if params is not None else [None] * len(leaves)
    K = None
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        got = np.shape(leaf)
        if not got or (shape is not None and got[1:] != shape):
            wanted = "(K, *parameter shape)" if shape is None else str(("K", *shape)).replace("'", "")
            raise ValueError(
                f"`{name}` must be stacked per-task gradients: {leaf_name(path)} has shape {got}, expected "
                f"{wanted}. mtlgrad_jax.task_value_and_grad makes such a stack. Around a method, use "
                "mtlgrad_jax.accumulate and chain instead of optax.MultiSteps and apply_if_finite."
            )
        K = got[0] if K is None else K
        if got[0] != K:
            raise ValueError(
                f"`{name}` must have one leading axis of K tasks: {leaf_name(path)} has {got[0]} rows, "
                f"{leaf_name(leaves[0][0])} has {K}."
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(f"`{name}` must be real: {leaf_name(path)} is complex; split it into its parts.")
    assert K is not None
    if K == 0:
        raise ValueError(f"`{name}` must hold at least one task, got K=0.")
    return K


def zeros(params: PyTree, num_tasks: int, dtype: DTypeLike | None = None) -> PyTree:
    """Return a stack of zero gradients with the parameters' sharding.

    Args:
      params: the parameters.
      num_tasks: K.
      dtype: of the floating leaves; that of each parameter for None.
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_dtype("dtype", dtype)
    return map_leaves(lambda p: jnp.broadcast_to(p, (num_tasks, *p.shape)), zero_gradient(params, dtype))


def zero_gradient(params: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Return one zero gradient, as `zeros` does a stack of them."""
    params = jax.tree.map(partial(as_array, "params"), params)
    return map_leaves(lambda p: jnp.zeros_like(p, dtype if _is_floating(p) else None), params)


def gramian(
    task_grads: PyTree, task_mask: Bool[Array, " K"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "K K"]:
    """Return the Gramian M_ij = <g_i, g_j> of the K stacked gradients.

    For row norms from 1e-18 to 1e18 in float32, every entry is exact up to rounding of n_i n_j or up to float32's
    smallest normal number: where squares underflow or overflow, the product is recomputed from rows scaled by powers of
    two. On one CPU the rounding error does not grow with P: it stays within 32 eps of n_i n_j even if all products are
    equal, and is a few eps otherwise; elsewhere it is that of the device's own sums.

    Args:
      task_grads: stack of K gradients, or a TaskJacobian.
      task_mask: absent tasks get a zero row and column.
      axis_name: inside shard_map, the mesh axes over which parameters are split; never a data axis.
    """
    if isinstance(task_grads, Jacobian):
        present = present_tasks(task_mask, task_grads.num_tasks)
        return jnp.where(present[:, None] & present[None, :], task_grads.gramian(), 0)
    K = num_tasks(task_grads)  # before jit, whose errors name no argument
    flags = None if task_mask is None else present_tasks(task_mask, K)
    return gramians([task_grads], flags, axis_name=axis_name)[0]


@partial(jax.jit, static_argnames="axis_name")
def gramians(
    groups: Sequence[PyTree], task_mask: Bool[Array, " K"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "groups K K"]:
    """Return the Gramian of each of several stacks of the same tasks, as `gramian` does for one."""
    K = num_tasks(groups)
    present, leaves = present_tasks(task_mask, K), [_floating(group) for group in groups]
    pairs = present[:, None] & present[None, :]

    def trusted(plain: Array) -> Array:
        rows = jax.vmap(jnp.diagonal)(plain)
        exact = _representable(rows, leaves) | ~present[None]
        return exact[:, :, None] & exact[:, None, :]

    product = _inner(leaves, None, K, K, trusted, axis_name)
    return jnp.where(pairs, (product + product.mT) / 2, 0)


def cross_gramian(first: PyTree, second: PyTree, *, axis_name: AxisName = None) -> Float[Array, "K L"]:
    """Return <a_i, b_j> for the rows of two stacks over the same parameters, for instance of two batches.

    As exact as `gramian`; an entry of zero also triggers the recomputation, unless one of its rows is zero.

    Args:
      first: stack of K gradients.
      second: stack of L gradients over the same parameters.
      axis_name: as in `gramian`.
    """
    num_tasks(first, name="first"), num_tasks(second, name="second")
    return cross_gramians([first], [second], axis_name=axis_name)[0]


@partial(jax.jit, static_argnames="axis_name")
def cross_gramians(
    firsts: Sequence[PyTree], seconds: Sequence[PyTree], *, axis_name: AxisName = None
) -> Float[Array, "groups K L"]:
    """Return the products of several pairs of stacks with the same tasks on each side, as `cross_gramian` does."""
    K, L = num_tasks(firsts, name="first"), num_tasks(seconds, name="second")
    rows, columns = [], []
    for first, second in zip(firsts, seconds, strict=True):
        check_like("second", second, first)
        leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        pairs = [(jnp.asarray(a), jnp.asarray(b)) for a, b in leaves]
        pairs = sorted((pair for pair in pairs if all(map(_is_floating, pair))), key=lambda pair: _kind(*pair))
        rows.append([a for a, _ in pairs])
        columns.append([b for _, b in pairs])
    return _inner(rows, columns, K, L, lambda plain: _representable(plain, rows), axis_name)


def project(task_grads: PyTree, direction: PyTree, *, axis_name: AxisName = None) -> Float[Array, " K"]:
    """Return J d: the inner product of every task's gradient with one direction."""
    if isinstance(task_grads, Jacobian):
        return task_grads.pushforward(direction)
    num_tasks(task_grads)
    row = map_leaves(lambda leaf: leaf[None], jax.tree.map(partial(as_array, "direction"), direction))
    check_like("direction", row, task_grads)
    row = map_leaves(lambda leaf, like: leaf if _is_floating(leaf) else leaf.astype(like.dtype), row, task_grads)
    return cross_gramian(task_grads, row, axis_name=axis_name)[:, 0]


def task_norms(task_grads: PyTree, *, axis_name: AxisName = None) -> Float[Array, " K"]:
    """Return the Euclidean norm of every task's gradient, without overflow or underflow."""
    if isinstance(task_grads, Jacobian):
        return jnp.sqrt(jnp.diagonal(task_grads.gramian()))
    num_tasks(task_grads)
    return _task_norms(task_grads, axis_name=axis_name)


@partial(jax.jit, static_argnames="axis_name")
def _task_norms(task_grads: PyTree, *, axis_name: AxisName) -> Float[Array, " K"]:
    K = num_tasks(task_grads)
    return by_platform(lambda leaves, *, blocked: _norms(_rows(leaves, blocked), K, axis_name), _floating(task_grads))


@jax.jit
def leaf_norms(task_grads: PyTree) -> PyTree:
    """Return a tree of the Euclidean norms (K,) of every task's gradient in each leaf, as `task_norms` does."""
    K = num_tasks(task_grads)

    def norms(leaf: Array) -> Array:
        if not _is_floating(leaf):
            return jnp.zeros((K,), accumulator_dtype())
        up = _power(jnp.max(jnp.abs(leaf), axis=range(1, leaf.ndim), initial=0).astype(accumulator_dtype()))
        return jnp.sqrt(jnp.sum(_wide(leaf, 1 / up) ** 2, axis=range(1, leaf.ndim))) * up

    return map_leaves(norms, task_grads)


def map_rows(function: Callable[..., Array], stack: PyTree, *rest: PyTree) -> PyTree:
    """Return a tree of `function(leaf, ...)` for every leaf of a stack; it must treat all leaves alike.

    Under jit on one CPU, short leaves of the same shape are one batch, which is faster to compile.

    Args:
      function: takes a leaf, and those of `rest` at the same place.
      stack: stack of K gradients.
      *rest: trees of the same structure.
    """

    def mapped(*trees: PyTree, blocked: bool) -> PyTree:
        if not blocked:
            return map_leaves(function, *trees)
        groups = list(zip(*map(jax.tree.leaves, trees), strict=True))
        structure: Any = jax.tree.structure(stack)
        return structure.unflatten(_unbatched(*_batches(lambda own: function(*own), groups, (), blocked)))

    if not isinstance(jnp.zeros(()), jax.core.Tracer):
        return mapped(stack, *rest, blocked=False)
    return by_platform(mapped, stack, *rest)


@promoting
def join(leaves: Sequence[Array], axis: int = 1) -> Array:
    """Return leaves flattened from an axis on, and joined along it.

    Neighbours of the same shape are first joined in memory order, some at a time: XLA:CPU compiles that several times
    faster.
    """
    joined, axes = [], leaves[0].shape[:axis]
    for (shape, _), alike in itertools.groupby(leaves, key=lambda leaf: (leaf.shape, leaf.dtype)):
        own, size = [leaf if shape else leaf[None] for leaf in alike], math.prod(shape[axis:])
        some = [own[i : i + _STACKED] for i in range(0, len(own), _STACKED)]
        blocks = jnp.concatenate([jnp.concatenate(part).reshape(len(part), *axes, size) for part in some])
        joined.append(jnp.moveaxis(blocks, 0, axis).reshape(*axes, len(own) * size))
    return jnp.concatenate(joined, axis=axis)


def cut(rows: Array, counts: Sequence[int], axis: int = 0) -> list[Array]:
    """Return consecutive parts of an array along an axis."""
    return [rows] if len(counts) == 1 else _cut(rows, tuple(counts), axis)


@partial(jax.jit, static_argnames=("counts", "axis"))
def _cut(rows: Array, counts: tuple[int, ...], axis: int) -> list[Array]:
    """Return what `cut` does.

    XLA:CPU compiles a kernel for each part that begins at another place that it knows. So the places depend on a
    condition that it cannot decide, and one kernel serves all parts of the same size.
    """

    def parts(rows: Array, *, blocked: bool) -> list[Array]:
        places = list(itertools.accumulate(counts, initial=0))[:-1]
        if not blocked:
            return jnp.split(rows, places[1:], axis)
        known = once(lax.optimization_barrier(jnp.uint32(0))) == 0

        def placed() -> tuple[Array, list[Array]]:
            return rows, [jnp.uint32(place) for place in places]

        rows, unknown = lax.cond(known, placed, lambda: jax.tree.map(jnp.zeros_like, placed()))
        return [_part(rows, place, count, axis) for place, count in zip(unknown, counts, strict=True)]

    return by_platform(parts, rows)


@partial(jax.jit, static_argnames=("count", "axis"))
def _part(rows: Array, place: Array, count: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(rows, place, count, axis)


def combine(weights: Float[Array, " L"], task_grads: PyTree) -> PyTree:
    """Return sum_i w_i g_i in the gradients' dtype.

    A task of weight zero is left out, not multiplied by zero: its row may hold NaN.
    """
    if isinstance(task_grads, Jacobian):
        return task_grads.pullback(weights)
    K = num_tasks(task_grads) if jax.tree.leaves(task_grads) else None
    return _combine(task_vector("weights", weights, num_tasks=K), task_grads)


def total(tasks: Bool[Array, " K"], task_grads: PyTree) -> PyTree:
    """Return the sum of the gradients of some tasks."""
    if isinstance(task_grads, Jacobian):
        return task_grads.total(tasks)
    return _combine(tasks.astype(accumulator_dtype()), task_grads)


@jax.jit
@promoting
def _combine(weights: Float[Array, " L"], task_grads: PyTree) -> PyTree:
    weights = once(weights)

    def leaf_sum(leaf: Array, *, blocked: bool) -> Array:
        if not _is_floating(leaf):
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        w = weights.astype(jnp.promote_types(leaf.dtype, jnp.float32))

        def rows_sum(start: Array | int, count: int) -> Array:
            factors, rows = (lax.dynamic_slice_in_dim(x, start, count) for x in (w, leaf))
            if blocked:  # fewer operations to compile, all in one loop; elsewhere the terms would be stored
                factors = column(factors, leaf)
                together = jnp.where(factors != 0, factors * rows.astype(w.dtype), 0)
                terms = [lax.index_in_dim(together, i, keepdims=False) for i in range(count)]
            else:
                products = [(x, x * row.astype(w.dtype)) for x, row in zip(factors, rows, strict=True)]
                terms = [lax.select(x != 0, term, jnp.zeros_like(term)) for x, term in products]
            return _pairwise(lax.add, terms)

        whole, rest = divmod(leaf.shape[0], _UNROLLED_ROWS)
        total = rows_sum(whole * _UNROLLED_ROWS, rest) if rest else rows_sum(0, _UNROLLED_ROWS)
        if whole > (not rest):
            total = lax.fori_loop(
                0 if rest else 1, whole, lambda i, total: total + rows_sum(i * _UNROLLED_ROWS, _UNROLLED_ROWS), total
            )
        return total.astype(leaf.dtype)

    return by_platform(lambda stack, *, blocked: map_leaves(partial(leaf_sum, blocked=blocked), stack), task_grads)


@jax.jit
def combines(weights: Float[Array, "groups K"], groups: Sequence[PyTree]) -> list[PyTree]:
    """Return the weighted sum of each of several stacks of the same tasks, as `combine` does for one."""
    if len(weights) != len(groups):
        raise ValueError(f"`weights` must have one row per stack, {len(groups)}, got shape {weights.shape}.")

    def sums(weights: Array, groups: list[PyTree], *, blocked: bool) -> list[PyTree]:
        return _unbatched(*_batches(lambda g, w: combine(w, g), groups, [weights], blocked))

    return by_platform(sums, weights, list(groups))


@promoting
def mix(a: Float[Array, " K"], first: PyTree, b: Float[Array, " K"], second: PyTree) -> PyTree:
    """Return the stack of rows a_i x_i + b_i y_i of two stacks, in the dtypes of the first."""
    K = num_tasks(first, name="first")
    check_like("second", second, first, rows=True)
    a, b = once(task_vector("a", a, num_tasks=K)), once(task_vector("b", b, num_tasks=K))

    def leaf_mix(x: Array, y: Array) -> Array:
        if not _is_floating(x):
            return x
        return (column(a, x) * x + column(b, y) * y).astype(x.dtype)

    return map_leaves(leaf_mix, first, second)


def select(tasks: Bool[Array, " K"], stack: PyTree, other: PyTree = None) -> PyTree:
    """Return a stack with the rows of one stack for some tasks, and those of another, or zeros, for the rest."""
    K = num_tasks(stack, name="stack") if jax.tree.leaves(stack) else None
    tasks = once(task_flags("tasks", tasks, num_tasks=K))
    other = map_leaves(jnp.zeros_like, stack) if other is None else other
    check_like("other", other, stack, rows=True)
    return map_leaves(lambda x, y: jnp.where(column(tasks, x), x, y), stack, other)


def check_like(name: str, stack: PyTree, like: PyTree, *, rows: bool = False) -> None:
    """Raise a ValueError unless a stack is over the same parameters as another and, with `rows`, has as many rows."""
    structure: Any = jax.tree.structure(stack)
    expected: Any = jax.tree.structure(like)
    if structure != expected:
        raise ValueError(f"`{name}` must have the structure of the other stack, {expected}, got {structure}.")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(stack), jax.tree.leaves(like), strict=True):
        got, wanted = np.shape(leaf), np.shape(other)
        expected = wanted if rows else (*got[:1], *wanted[1:])
        if got != expected:
            raise ValueError(
                f"`{name}` must fit the other stack: {leaf_name(path)} has shape {got}, expected {expected}."
            )


def by_coordinate(
    function: Callable[..., Array], task_grads: PyTree, *others: PyTree, present: Bool[Array, " K"] | None
) -> PyTree:
    """Return one gradient: a function of each floating leaf of a stack, in its dtype; zeros for other leaves.

    Args:
      function: takes a leaf, and those of `others` at the same place. Under jit it is traced once for each shape.
      task_grads: stack of K gradients.
      *others: trees of the same structure.
      present: which tasks are present: a coordinate is NaN if the gradient of one of them is not finite there, which is
        found out in the same pass. None if the function itself shows that.
    """

    def reduced(leaf: Array, *own: Array) -> Array:
        if not _is_floating(leaf):
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        result = function(leaf, *own)
        if present is not None:
            finite = fold_rows(
                lambda finite, i, row: finite & (jnp.isfinite(row) | ~present[i]), jnp.ones(leaf.shape[1:], bool), leaf
            )
            result = jnp.where(finite, result, jnp.nan)
        return result.astype(leaf.dtype)

    return map_leaves(reduced, task_grads, *others)


def fold_rows(function: Callable[[Any, Array | int, Array], Any], carry: Any, leaf: Array) -> Any:
    """Return the result of `carry = function(carry, i, row)` over the rows of a leaf, each in at least float32.

    The rows are read once, sixteen at a time in one fused loop.
    """
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)

    def some(start: Array | int, count: int, carry: Any) -> Any:
        for i in range(count):
            carry = function(carry, start + i, leaf[start + i].astype(dtype))
        return carry

    whole, rest = divmod(len(leaf), _UNROLLED_ROWS)
    carry = some(whole * _UNROLLED_ROWS, rest, carry)
    return repeat(
        0, whole, lambda j, carry: some(j * _UNROLLED_ROWS, _UNROLLED_ROWS, carry), carry, unrolled=whole == 1
    )


def finite_tasks(task_grads: PyTree) -> Bool[Array, " K"]:
    """Return for every task whether its whole gradient is finite."""
    if isinstance(task_grads, Jacobian):
        return task_grads.finite_tasks()
    return _finite(task_grads, (num_tasks(task_grads),))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether every entry of a tree is finite."""
    return _finite(tree, ())


@jax.jit
def used(groups: Sequence[PyTree]) -> Bool[Array, "groups K"]:
    """Return for each of several stacks which tasks have a nonzero entry there."""
    K = num_tasks(groups)

    def of_group(leaves: list[Array]) -> Array:
        entries = map_leaves(lambda leaf: (leaf != 0).any(axis=range(1, leaf.ndim)), leaves)
        return _pairwise(lax.bitwise_or, entries or [jnp.zeros((K,), bool)])

    each = partial(_each_group, of_group)
    return by_platform(lambda groups, *, blocked: once(each(groups, blocked=blocked)), [_floating(g) for g in groups])


@partial(jax.jit, static_argnames="lead")
def _finite(tree: PyTree, lead: tuple[int, ...]) -> Bool[Array, "..."]:
    """Return a flag for every entry along the leading axes that all leaves share."""

    def finite(leaves: list[Array], *, blocked: bool) -> Array:
        def check(leaf: Array) -> Array:
            axes = range(len(lead), leaf.ndim)
            if not blocked or leaf.dtype == jnp.float16:
                return jnp.isfinite(leaf).all(axis=axes)
            # XLA:CPU adds numbers faster than it joins flags, except float16, of which it stores a wider copy.
            return jnp.isfinite(jnp.sum(leaf - leaf, axis=axes))

        checks = map_leaves(check, _rows(leaves, blocked, len(lead)))
        return once(_pairwise(lax.bitwise_and, checks or [jnp.ones(lead, bool)]))

    return by_platform(finite, _floating(tree))


def _floating(tree: PyTree) -> list[Array]:
    """Return the floating leaves, those alike next to each other."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return sorted(filter(_is_floating, leaves), key=_kind)


def _kind(*leaves: Array) -> tuple[Any, ...]:
    """Return a key to sort leaves by, or the leaves that several stacks have at the same place."""
    return (*(str(leaf.dtype) for leaf in leaves), leaves[0].shape)


def _is_floating(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _rows(leaves: list[Array], blocked: bool, lead: int = 1) -> list[Array]:
    """Return leaves as they are, or flat after their leading axes, with short ones joined.

    Every leaf costs compile time, and many short ones cost run time.
    """
    if not blocked:
        return leaves
    short = [leaf for leaf in leaves if math.prod(leaf.shape[lead:]) <= _SHORT]
    long = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves if math.prod(leaf.shape[lead:]) > _SHORT]
    return long + ([join(short, lead)] if short else [])


def _pairwise(join: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    while len(parts) > 1:
        parts = [*map(join, parts[::2], parts[1::2]), *parts[len(parts) // 2 * 2 :]]
    return parts[0]


def column(values: Array, leaf: Array) -> Array:
    """Return K values in a shape that broadcasts against the rows of a leaf."""
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _representable(product: Array, groups: Groups) -> Array:
    """Return which entries of a product neither overflow nor, being at least P tiny/eps, lose squares to underflow."""
    limits = jnp.finfo(product.dtype)
    sizes = jnp.asarray([sum(leaf.size // len(leaf) for leaf in leaves) for leaves in groups], product.dtype)
    lowest = column(sizes * limits.tiny / limits.eps, product)
    return (jnp.abs(product) >= lowest) & jnp.isfinite(product)


def _inner(
    first: Groups, second: Groups | None, K: int, L: int, trusted: Callable[[Array], Array], axis_name: AxisName
) -> Float[Array, "groups K L"]:
    """Return the products of the rows in each group; `second` is None for the products of `first` with itself.

    If a product is not `trusted`, they are recomputed from rows scaled by powers of two.
    """

    def inner(first: Groups, second: Groups | None, *, blocked: bool) -> Array:
        first = [_rows(leaves, blocked) for leaves in first]
        others = first if second is None else [_rows(leaves, blocked) for leaves in second]

        def product(leaves: tuple[list[Array], list[Array]], row: Array | None, column: Array | None) -> Array:
            products = [_product(a, b, row, column, blocked=blocked) for a, b in zip(*leaves, strict=True)]
            return _pairwise(lax.add, products or [jnp.zeros((K, L), accumulator_dtype())])

        def total(rows: Array | None, columns: Array | None) -> Array:
            pairs = list(zip(first, others, strict=True))
            return _over(lax.psum, _each_group(product, pairs, rows, columns, blocked=blocked), axis_name)

        plain = total(None, None)

        def checked() -> Array:
            rows = _largest(first, K, axis_name, blocked)
            columns = rows if second is None else _largest(others, L, axis_name, blocked)
            zero = (rows == 0)[:, :, None] | (columns == 0)[:, None, :]

            def rescaled() -> Array:
                r, c = _power(rows), _power(columns)
                return total(1 / r, 1 / c) * r[:, :, None] * c[:, None, :]

            return lax.cond(jnp.all(trusted(plain) | zero), lambda: plain, rescaled)

        return lax.cond(jnp.all(trusted(plain)), lambda: plain, checked)

    return by_platform(inner, first, second)


def _norms(leaves: list[Array], K: int, axis_name: AxisName) -> Float[Array, " K"]:
    def total(scale: Array | None) -> Array:
        squares = map_leaves(lambda leaf: jnp.sum(_wide(leaf, scale) ** 2, axis=range(1, leaf.ndim)), leaves)
        return _over(lax.psum, _pairwise(lax.add, squares or [jnp.zeros((K,), accumulator_dtype())]), axis_name)

    def rescaled() -> Array:
        up = _power(_largest([leaves], K, axis_name))[0]
        return jnp.sqrt(total(1 / up)) * up

    plain = total(None)
    return lax.cond(jnp.all(_representable(plain[None], [leaves])), lambda: jnp.sqrt(plain), rescaled)


def _largest(groups: Groups, K: int, axis_name: AxisName, blocked: bool = False) -> Float[Array, "groups K"]:
    def largest(leaves: list[Array]) -> Array:
        entries = map_leaves(lambda leaf: jnp.max(jnp.abs(leaf), axis=range(1, leaf.ndim), initial=0), leaves)
        wide = accumulator_dtype()
        return _pairwise(lax.max, [own.astype(wide) for own in entries] or [jnp.zeros((K,), wide)])

    return _over(lax.pmax, _each_group(largest, [*groups], blocked=blocked), axis_name)


def _each_group(function: Callable[..., Array], groups: list[Any], *scales: Array | None, blocked: bool) -> Array:
    """Return a function of the leaves of each group and of its scales, in one array."""
    batches, results = _batches(function, groups, scales, blocked)
    order = [i for batch in batches for i in batch]
    places = sorted(range(len(order)), key=order.__getitem__)
    return jnp.concatenate(results) if order == [*range(len(order))] else jnp.concatenate(results)[jnp.asarray(places)]


def _batches(
    function: Callable[..., Any], groups: list[Any], scales: Sequence[Array | None], blocked: bool
) -> tuple[list[list[int]], list[Any]]:
    """Return batches of groups, and the stacked results of each; on CPU, short groups alike are in one batch."""
    alike: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        leaves, structure = jax.tree.flatten(group)
        short = blocked and 0 < sum(math.prod(leaf.shape[1:]) for leaf in leaves) <= _SHORT
        alike.setdefault((structure, *((leaf.shape, leaf.dtype) for leaf in leaves)) if short else i, []).append(i)
    batches = [same[i : i + _STACKED] for same in alike.values() for i in range(0, len(same), _STACKED)]
    rows = [scale if scale is None else cut(scale, [1] * len(groups)) for scale in scales]
    results = []
    for batch in batches:
        if len(batch) == 1:
            own = (row if row is None else row[batch[0]][0] for row in rows)
            found = jax.tree.map(lambda leaf: leaf[None], function(groups[batch[0]], *own))
        else:
            own = (scale if scale is None else scale[jnp.asarray(batch)] for scale in scales)
            found = jax.vmap(function)(jax.tree.map(lambda *same: jnp.stack(same), *(groups[i] for i in batch)), *own)
        results.append(found)
    return batches, results


def _unbatched(batches: list[list[int]], results: list[PyTree]) -> list[PyTree]:
    """Return the result of every group, in the order of the groups."""
    found: dict[int, PyTree] = {}
    for batch, result in zip(batches, results, strict=True):
        structure: Any
        leaves, structure = jax.tree.flatten(result)
        parts = [cut(leaf, [1] * len(batch)) for leaf in leaves]
        found |= {i: structure.unflatten(part[place][0] for part in parts) for place, i in enumerate(batch)}
    return [found[i] for i in range(len(found))]


def _over(reduce: Callable[..., Array], values: Array, axis_name: AxisName) -> Array:
    """Return values computed once, and reduced over the mesh axes."""
    values = once(values)
    return values if axis_name is None else reduce(values, axis_name)


def _power(largest: Array) -> Array:
    """Return powers of two near some numbers; dividing and multiplying by them is exact."""
    limits = jnp.finfo(largest.dtype)
    return lax.reduce_precision(jnp.clip(largest, 4 * limits.tiny, limits.max / 4), limits.nexp, 0)


def _wide(leaf: Array, scale: Array | None) -> Array:
    leaf = leaf.astype(accumulator_dtype())
    return leaf if scale is None else leaf * column(scale, leaf)


@partial(jax.jit, static_argnames="blocked")
def _product(a: Array, b: Array, rows: Array | None, columns: Array | None, *, blocked: bool) -> Array:
    """Return the (K, L) product of two leaves, whose rows are first multiplied by the given scales."""

    def dot(x: Array, y: Array, batch: tuple[int, ...] = ()) -> Array:
        axes = tuple(range(1 + len(batch), a.ndim + len(batch)))  # no reshape: it would gather sharded leaves
        dimensions = ((axes, axes), (batch, batch))
        return lax.dot_general(x, y, dimensions, precision=lax.Precision.HIGHEST, out_sharding=_replicated(a))

    if not blocked:
        x, y = _wide(a, rows), _wide(b, columns)
        batch = _batch_axes(a.shape)
        if not batch or _replicated(a) or jax.device_count() > 1:
            return dot(x, y)
        return lax.platform_dependent(x, y, cuda=partial(_batched_dot, batch), default=dot)

    def runs(start: Array | int, width: int) -> Array:
        """Return the products of runs of columns; XLA:CPU sums each run sequentially."""
        count = -(-width // _RUN)

        def cut(leaf: Array, scale: Array | None) -> Array:
            part = _wide(lax.dynamic_slice_in_dim(leaf, start, width, 1), scale)
            return jnp.pad(part, ((0, 0), (0, -width % count))).reshape(len(leaf), count, -1).swapaxes(0, 1)

        return dot(cut(a, rows), cut(b, columns), batch=(0,))

    block = _RUN * max(1, _BLOCK // (_RUN * max(len(a), len(b))))
    whole, rest = divmod(a.shape[1], block)
    products = [runs(whole * block, rest)] if rest else []
    if whole:
        zero = jnp.zeros_like(runs(0, block))  # of the products' type, also inside shard_map
        products += lax.fori_loop(0, whole, lambda i, sums: _two_sum(sums, runs(i * block, block)), (zero, zero))
    return _pairwise(lax.add, [product.sum(axis=0) for product in products] or [jnp.zeros((len(a), len(b)))])


def _batch_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first axes of a leaf's parameters, of which enough are left to contract; none of a small leaf."""
    sizes = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    enough = max(_LEAST_BATCHED, 8 * shape[0])
    return tuple(axis for axis, size in enumerate(sizes, 1) if math.prod(shape[1:]) >= _BLOCK and size >= enough)


def _batched_dot(batch: tuple[int, ...], x: Array, y: Array) -> Array:
    """Return the (K, L) product of two leaves, as many products of slices: cuBLAS does a single one slowly."""
    axes = tuple(range(len(batch) + 1, x.ndim))
    products = lax.dot_general(x, y, ((axes, axes), (batch, batch)), precision=lax.Precision.HIGHEST)
    return products.sum(axis=range(len(batch)))


def _two_sum(sums: tuple[Array, ...], term: Array) -> tuple[Array, ...]:
    """Add a term to a sum in two parts, where the second holds the rounding error of the first."""
    high, low = sums
    total = high + term
    added = total - high
    return total, low + ((high - (total - added)) + (term - added))


def _replicated(leaf: Array) -> NamedSharding | None:
    """Return the output sharding that sums over explicitly sharded axes require; None if the compiler decides."""
    mesh = jax.typeof(leaf).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None
