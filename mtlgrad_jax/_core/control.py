"""Control flow that outside jit compiles nothing anew: there JAX would compile the closures of every call again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def cond(predicate: Bool[Array, ""], on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """Return what one of two functions returns: `jax.lax.cond`, and outside jit the call itself."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, on_true, on_false)
    return on_true() if predicate else on_false()


def loop(function: Callable[..., Any], stacked: PyTree, at_once: int = 1, *, unrolled: bool = False) -> Any:
    """Return the stacked results of a function of every row of `stacked`, a tuple of its arguments.

    That is `jax.lax.map`, and outside jit or `unrolled` the calls themselves.

    Args:
      function: of one row.
      stacked: its arguments, leaves with one more leading axis.
      at_once: rows under one vmap; 1 never uses vmap.
      unrolled: whether the calls are written out one after the other under jit too.
    """
    if not unrolled and isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.lax.map(lambda row: function(*row), stacked, batch_size=None if at_once == 1 else at_once)

    def rows(start: int) -> Any:
        if at_once == 1:
            return jax.tree.map(lambda out: out[None], function(*jax.tree.map(lambda leaf: leaf[start], stacked)))
        return jax.vmap(function)(*jax.tree.map(lambda leaf: leaf[start : start + at_once], stacked))

    parts = [rows(start) for start in range(0, len(jax.tree.leaves(stacked)[0]), at_once)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


def repeat(start: Any, stop: int, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Return what `carry = function(i, carry)` comes to: `jax.lax.fori_loop`, and outside jit the calls themselves."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.lax.fori_loop(start, stop, function, carry)
    for i in range(start, stop):
        carry = function(i, carry)
    return carry
