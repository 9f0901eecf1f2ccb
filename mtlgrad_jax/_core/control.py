"""Control flow that does not recompile outside jit, and arithmetic that the user's configuration of JAX leaves alone.

Outside jit, JAX would compile the closures of its control flow again on every call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def cond(predicate: Bool[Array, ""], on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """Return the result of one of two functions: `jax.lax.cond` under jit, a plain call outside it."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, on_true, on_false)
    return on_true() if predicate else on_false()


def loop(function: Callable[..., Any], stacked: PyTree, at_once: int = 1, *, unrolled: bool = False) -> Any:
    """Apply a function to every row of `stacked`, a tuple of its arguments, and stack the results.

    Uses `jax.lax.map` under jit, and plain calls outside it or if `unrolled`.

    Args:
      function: takes the arguments of one row.
      stacked: its arguments; leaves have an additional leading axis.
      at_once: rows per vmap; 1 never uses vmap.
      unrolled: whether to write out the calls one after the other under jit too.
    """
    if not unrolled and isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.lax.map(lambda row: function(*row), stacked, batch_size=None if at_once == 1 else at_once)

    def row(i: int) -> Any:
        return function(
            *jax.tree.map(
                lambda leaf: jax.lax.index_in_dim(leaf, i, keepdims=False)
                if isinstance(leaf, jax.core.Tracer)
                else leaf[i],
                stacked,
            )
        )

    def rows(start: int) -> Any:
        return jax.vmap(function)(*jax.tree.map(lambda leaf: leaf[start : start + at_once], stacked))

    count = len(jax.tree.leaves(stacked)[0])
    if at_once == 1:
        return stack_rows([row(i) for i in range(count)])
    return map_leaves(lambda *parts: jnp.concatenate(parts), *map(rows, range(0, count, at_once)))


def stack_rows(rows: Sequence[PyTree]) -> PyTree:
    """Return trees stacked along a new leading axis."""

    def stacked(*rows: PyTree, blocked: bool) -> PyTree:
        if not blocked:
            return map_leaves(lambda *parts: jnp.stack(parts), *rows)
        # Flat, as Gramians read it: XLA:CPU stores a copy of the stack for every shape in which it is read.
        return map_leaves(
            lambda *parts: jnp.stack([*map(jnp.ravel, parts)]).reshape(len(parts), *parts[0].shape), *rows
        )

    return by_platform(stacked, *rows) if isinstance(jnp.zeros(()), jax.core.Tracer) else stacked(*rows, blocked=False)


def repeat(start: Any, stop: int, function: Callable[[Any, Any], Any], carry: Any, *, unrolled: bool = False) -> Any:
    """Return the result of repeating `carry = function(i, carry)`.

    Uses `jax.lax.fori_loop` under jit, and plain calls outside it or if `unrolled`.
    """
    if not unrolled and isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.lax.fori_loop(start, stop, function, carry)
    for i in range(start, stop):
        carry = function(i, carry)
    return carry


def after(earlier: Array, value: Array) -> Array:
    """Return `value`, but make it depend on `earlier`: XLA then computes one after the other, in the memory of one."""
    never = jnp.ravel(earlier)[0] > jnp.inf  # XLA does not find out that this is false
    return value + never.astype(value.dtype)


def map_leaves(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Do what `jax.tree.map` does, with leaves as arrays; under jit, trace the function once per shape, not per leaf.

    The function must depend on nothing that differs between leaves but its arguments.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.tree.map(jax.jit(function), tree, *rest)
    return jax.tree.map(lambda *leaves: function(*map(jnp.asarray, leaves)), tree, *rest)


@jax.custom_jvp
@jax.jit
def once(value: Array) -> Array:
    """Return a small array unchanged, but make XLA compute it only once.

    XLA duplicates a chain of cheap operations into every loop that uses its result. A chain over all leaves, duplicated
    into at least one loop per leaf, takes quadratic compile time; and each use may see another rounding. XLA does not
    duplicate a reduction with an index, here one that picks the first of two copies.
    """
    copies = jnp.stack([value, value])
    places = jax.lax.broadcasted_iota(jnp.int32, copies.shape, 0)

    def first(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        before = a[1] < b[1]
        return jax.lax.select(before, a[0], b[0]), jax.lax.select(before, a[1], b[1])

    return jax.lax.reduce((copies, places), (jnp.zeros((), value.dtype), jnp.int32(2)), first, (0,))[0]


once.defjvps(lambda tangent, *_: tangent)


def by_platform(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args, blocked=...)`, where `blocked` tells whether leaves may be cut and joined.

    Blocks are faster on CPU and round less, but on several devices they would gather sharded leaves. The choice depends
    on the platform that a program is lowered for, not on the one that lowers it.
    """
    whole = functools.partial(function, blocked=False)
    explicit = any(jax.typeof(leaf).sharding.mesh.explicit_axes for leaf in jax.tree.leaves(args))
    if explicit or jax.device_count("cpu") > 1:
        return whole(*args)
    return jax.lax.platform_dependent(*args, cpu=functools.partial(function, blocked=True), default=whole)


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that promotes dtypes as JAX does by default, as the optax optimizers inside methods need."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call
