"""Algebra of stacked pytrees: every sum over the P parameters is in this file.

A stack is a pytree whose leaves have the shape (K, *parameter shape): row i is the gradient of task i. Gramians are
accumulated leaf by leaf, never from a concatenated copy, in float32 at the highest matmul precision (float64 under
x64) whatever the gradients' dtype. Leaves that are not floating (integer parameters) count as zero gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._checks import leaf_name
from mtlgrad_jax._tasks import accumulator_dtype, present_tasks, task_flags, task_vector

_BLOCK = 8192  # columns of a block that stays in cache on CPU
_UNROLLED_ROWS = 16  # rows of a weighted sum that one fused loop adds up

AxisName = str | Sequence[str] | None


def num_tasks(task_grads: PyTree, params: PyTree | None = None, *, name: str = "task_grads") -> int:
    """Return K, the leading axis that all leaves of a stack share.

    Args:
      task_grads: the stack.
      params: where given, every leaf must have the shape (K, *parameter shape).
      name: what errors call the stack.

    Raises:
      ValueError: a leaf has no leading axis, another K than the first leaf, or does not match its parameter.
    """
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
        got = jnp.shape(leaf)
        if not got or (shape is not None and got[1:] != shape):
            wanted = "(K, *parameter shape)" if shape is None else str(("K", *shape)).replace("'", "")
            raise ValueError(
                f"`{name}` must be stacked per-task gradients: {leaf_name(path)} has shape {got}, expected "
                f"{wanted}. mtlgrad_jax.task_value_and_grad makes such a stack."
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


@partial(jax.jit, static_argnames="axis_name")
def gramian(
    task_grads: PyTree, task_mask: Bool[Array, " K"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "K K"]:
    """Return the Gramian M_ij = <g_i, g_j> of the K stacked gradients.

    For row norms from 1e-18 to 1e18 in float32 every entry is as exact as float32 holds it, that is to rounding of
    n_i n_j or to its smallest normal number: where squares underflow or overflow on the way, the product is formed
    again from rows scaled by powers of two.

    Args:
      task_grads: stack of K gradients.
      task_mask: tasks that are absent get a zero row and column.
      axis_name: inside shard_map, the mesh axes over which parameters are split; never a data axis.
    """
    K = num_tasks(task_grads)
    present = present_tasks(task_mask, K)
    leaves = _floating(task_grads)
    if not leaves:
        return jnp.zeros((K, K), accumulator_dtype())

    def trusted(plain: Array) -> Array:
        diagonal = jnp.diagonal(plain)
        return ~jnp.any(present & ~_representable(diagonal, leaves))

    product = _inner(leaves, leaves, trusted, axis_name)
    product = (product + product.T) / 2
    return jnp.where(present[:, None] & present[None, :], product, 0)


@partial(jax.jit, static_argnames="axis_name")
def cross_gramian(first: PyTree, second: PyTree, *, axis_name: AxisName = None) -> Float[Array, "K L"]:
    """Return <a_i, b_j> for the rows of two stacks over the same parameters, for instance of two batches.

    As exact as `gramian`; an entry of zero makes the products be formed again too.

    Args:
      first: stack of K gradients.
      second: stack of L gradients over the same parameters.
      axis_name: as in `gramian`.
    """
    K, L = num_tasks(first, name="first"), num_tasks(second, name="second")
    check_like("second", second, first)
    pairs = [
        (jnp.asarray(a), jnp.asarray(b)) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    ]
    pairs = [pair for pair in pairs if all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in pair)]
    if not pairs:
        return jnp.zeros((K, L), accumulator_dtype())
    rows, columns = ([pair[i] for pair in pairs] for i in range(2))
    return _inner(rows, columns, lambda plain: jnp.all(_representable(plain, rows)), axis_name)


def project(task_grads: PyTree, direction: PyTree, *, axis_name: AxisName = None) -> Float[Array, " K"]:
    """Return J d: the inner product of every task's gradient with one direction."""
    num_tasks(task_grads)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], direction)
    check_like("direction", row, task_grads)
    return cross_gramian(task_grads, row, axis_name=axis_name)[:, 0]


@partial(jax.jit, static_argnames="axis_name")
def task_norms(task_grads: PyTree, *, axis_name: AxisName = None) -> Float[Array, " K"]:
    """Return the Euclidean norm of every task's gradient, without overflow or underflow."""
    K = num_tasks(task_grads)
    leaves = _floating(task_grads)
    if not leaves:
        return jnp.zeros((K,), accumulator_dtype())

    def total(scale: Array) -> Array:
        rows = [leaf.astype(scale.dtype) / _column(scale, leaf) for leaf in leaves]
        return _psum(_add(jnp.sum(row**2, axis=range(1, row.ndim)) for row in rows), axis_name)

    def rescaled() -> Array:
        largest = _largest(leaves, axis_name)
        scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        return jnp.sqrt(total(scale)) * scale

    plain = total(jnp.ones((K,), accumulator_dtype()))
    trusted, root = _representable(plain, leaves), jnp.sqrt(plain)
    # No row's last digit may depend on what stands in another one.
    return lax.cond(jnp.all(trusted), lambda: root, lambda: jnp.where(trusted, root, rescaled()))


@jax.jit
def combine(weights: Float[Array, " L"], task_grads: PyTree) -> PyTree:
    """Return sum_i w_i g_i in the gradients' dtype.

    A task of weight zero is left out, not multiplied: its row may hold NaN.
    """
    weights = task_vector("weights", weights, num_tasks=num_tasks(task_grads) if jax.tree.leaves(task_grads) else None)
    used = weights != 0

    def leaf_sum(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        w = weights.astype(jnp.promote_types(leaf.dtype, jnp.float32))

        def rows_sum(start: Array | int, count: int) -> Array:
            chunk = [lax.dynamic_slice_in_dim(x, start, count) for x in (used, w, leaf)]
            return _add(jnp.where(u, x * row.astype(w.dtype), 0) for u, x, row in zip(*chunk, strict=True))

        whole, rest = divmod(leaf.shape[0], _UNROLLED_ROWS)
        total = rows_sum(whole * _UNROLLED_ROWS, rest) if rest else rows_sum(0, _UNROLLED_ROWS)
        if whole > (not rest):
            total = lax.fori_loop(
                0 if rest else 1, whole, lambda i, total: total + rows_sum(i * _UNROLLED_ROWS, _UNROLLED_ROWS), total
            )
        return total.astype(leaf.dtype)

    return jax.tree.map(leaf_sum, task_grads)


def mix(a: Float[Array, " K"], first: PyTree, b: Float[Array, " K"], second: PyTree) -> PyTree:
    """Return the stack of rows a_i x_i + b_i y_i of two stacks, in the dtypes of the first."""
    K = num_tasks(first, name="first")
    check_like("second", second, first, rows=True)
    a, b = task_vector("a", a, num_tasks=K), task_vector("b", b, num_tasks=K)

    def leaf_mix(x: Array, y: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (_column(a, x) * x + _column(b, y) * y).astype(x.dtype)

    return jax.tree.map(leaf_mix, first, second)


def select(tasks: Bool[Array, " K"], stack: PyTree, other: PyTree = None) -> PyTree:
    """Return a stack whose rows come from one stack for some tasks, and from another, or are zero, for the rest."""
    other = jax.tree.map(jnp.zeros_like, stack) if other is None else other
    check_like("other", other, stack, rows=True)
    tasks = task_flags("tasks", tasks, num_tasks=num_tasks(stack, name="stack") if jax.tree.leaves(stack) else None)
    return jax.tree.map(lambda x, y: jnp.where(_column(tasks, x), x, y), stack, other)


def check_like(name: str, stack: PyTree, like: PyTree, *, rows: bool = False) -> None:
    """Raise a ValueError in the name of a stack that is not over the same parameters as another, or of as many rows."""
    structure: Any = jax.tree.structure(stack)
    expected: Any = jax.tree.structure(like)
    if structure != expected:
        raise ValueError(f"`{name}` must have the structure of the other stack, {expected}, got {structure}.")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(stack), jax.tree.leaves(like), strict=True):
        got, wanted = jnp.shape(leaf), jnp.shape(other)
        expected = wanted if rows else (*got[:1], *wanted[1:])
        if got != expected:
            raise ValueError(
                f"`{name}` must fit the other stack: {leaf_name(path)} has shape {got}, expected {expected}."
            )


def finite_tasks(task_grads: PyTree) -> Bool[Array, " K"]:
    """Return for every task whether all of its gradient is finite."""
    K = num_tasks(task_grads)
    checks = [jnp.isfinite(leaf).all(axis=range(1, leaf.ndim)) for leaf in _floating(task_grads)]
    return jnp.stack(checks).all(axis=0) if checks else jnp.ones((K,), bool)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether every entry of a tree is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.asarray(True)]).all()


def _floating(tree: PyTree) -> list[Array]:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _add(terms: Iterable[Array]) -> Array:
    return reduce(jnp.add, terms)


def _column(values: Array, leaf: Array) -> Array:
    return values.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _psum(value: Array, axis_name: AxisName) -> Array:
    return value if axis_name is None else lax.psum(value, axis_name)


def _representable(product: Array, leaves: list[Array]) -> Array:
    """Return which entries of a product neither overflow nor lose squares to underflow: not below P tiny/eps."""
    limits = jnp.finfo(product.dtype)
    size = sum(leaf.size // leaf.shape[0] for leaf in leaves)
    return (jnp.abs(product) >= size * limits.tiny / limits.eps) & jnp.isfinite(product)


def _inner(
    first: list[Array], second: list[Array], trusted: Callable[[Array], Array], axis_name: AxisName
) -> Float[Array, "K L"]:
    """Return the products of the rows; where they are not to be trusted, from rows scaled by powers of two."""
    groups = [[_flat(leaf) for leaf in leaves] for leaves in ((first,) if first is second else (first, second))]
    first, second = groups[0], groups[-1]

    def total(scales: tuple[Array, Array] | None = None) -> Array:
        return _psum(_add(_product(a, b, scales) for a, b in zip(first, second, strict=True)), axis_name)

    plain = total()

    def rescaled() -> Array:
        exponents = [_exponents(leaves, axis_name) for leaves in groups]
        down = [jnp.ldexp(jnp.ones(e.shape, plain.dtype), -e) for e in exponents]
        up = [jnp.ldexp(jnp.ones(e.shape, plain.dtype), e) for e in exponents]
        return total((down[0], down[-1])) * up[0][:, None] * up[-1][None, :]

    return lax.cond(trusted(plain), lambda: plain, rescaled)


def _exponents(leaves: list[Array], axis_name: AxisName) -> Array:
    """Return the powers of two just above the largest entry of every row."""
    limits = jnp.finfo(accumulator_dtype())
    largest = _largest(leaves, axis_name)
    exponents = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1))[1]
    return jnp.clip(exponents, limits.minexp + 2, limits.maxexp - 2)


def _largest(leaves: list[Array], axis_name: AxisName) -> Float[Array, " K"]:
    dtype = accumulator_dtype()
    rows = [jnp.max(jnp.abs(leaf), axis=range(1, leaf.ndim), initial=0).astype(dtype) for leaf in leaves]
    largest = jnp.stack(rows).max(axis=0)
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def _flat(leaf: Array) -> Array:
    """Return a leaf as blocks are cut from it; reshaped for some of its products only, it would be held twice."""
    return leaf.reshape(leaf.shape[0], -1) if _blocked(leaf) else leaf


def _product(a: Array, b: Array, scales: tuple[Array, Array] | None = None) -> Array:
    """Return the (K, L) product of two leaves; `scales` multiply the rows of each on the way in."""

    def dot(x: Array, y: Array) -> Array:
        x, y = x.astype(accumulator_dtype()), y.astype(accumulator_dtype())
        if scales is not None:
            x, y = x * _column(scales[0], x), y * _column(scales[1], y)
        axes = tuple(range(1, x.ndim))  # contracted as they are: a reshape would gather sharded leaves
        dimensions = ((axes, axes), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=lax.Precision.HIGHEST, out_sharding=_replicated(x))

    if not _blocked(a):
        return dot(a, b)

    def block(start: Array | int, width: int) -> Array:
        return dot(*(lax.dynamic_slice_in_dim(x, start, width, 1) for x in (a, b)))

    whole, rest = divmod(a.shape[1], _BLOCK)
    first = block(whole * _BLOCK, rest) if rest else block(0, _BLOCK)
    return lax.fori_loop(0 if rest else 1, whole, lambda i, total: total + block(i * _BLOCK, _BLOCK), first)


def _replicated(leaf: Array) -> NamedSharding | None:
    """Return the sharding that sums over explicitly sharded axes must be given; elsewhere the compiler knows."""
    mesh = jax.typeof(leaf).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None


def _blocked(leaf: Array) -> bool:
    """Return whether blocks of columns pay off: they do on CPU in long rows, but gather leaves that are sharded."""
    return leaf.size > _BLOCK * leaf.shape[0] and jax.default_backend() == "cpu" and jax.device_count() == 1
