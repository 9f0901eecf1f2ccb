"""Random keys of randomized methods, kept as plain arrays that any checkpoint format can store."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32

Seed = int | Array
"""What `key` arguments accept: a seed, a typed key or a raw key."""


class Key(NamedTuple):
    """A random key in a state."""

    data: UInt32[Array, "..."]


def make_key(seed: Seed) -> Key:
    """Return the first key for a seed; called by init, never by a factory."""
    if isinstance(seed, int) or (jnp.ndim(seed) == 0 and jnp.issubdtype(seed.dtype, jnp.integer)):
        return Key(jax.random.key_data(jax.random.key(seed)))
    typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return Key(jnp.array(jax.random.key_data(seed) if typed else seed))


def draw_key(key: Key) -> tuple[Key, Array]:
    """Return the key of the next step, and a typed key to draw from in this step."""
    following, draw = jax.random.split(_typed(key))
    return Key(jax.random.key_data(following)), draw


def repeat_state(state: PyTree, count: int) -> PyTree:
    """Return the states of several copies of a method: leaves get a leading axis, and every copy its own keys."""

    def repeat(node: Any) -> Any:
        if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return jax.random.split(node, count)
        if not isinstance(node, Key):
            return jnp.repeat(jnp.asarray(node)[None], count, axis=0)
        keys = _typed(node)
        split = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys.reshape(-1))
        return Key(jax.random.key_data(split.reshape(count, *keys.shape)))

    return jax.tree.map(repeat, state, is_leaf=lambda node: isinstance(node, Key))


def _typed(key: Key) -> Array:
    return jax.random.wrap_key_data(key.data, impl="threefry2x32" if key.data.shape[-1] == 2 else "rbg")


def draw_orders(draw: Array, order: str, num_tasks: int) -> Int[Array, "K K"]:
    """Return an order of the tasks for every task: random ("random") or 0 to K-1 ("fixed")."""
    orders = jnp.broadcast_to(jnp.arange(num_tasks), (num_tasks, num_tasks))
    if order == "random":
        orders = jax.vmap(jax.random.permutation)(jax.random.split(draw, num_tasks), orders)
    return orders


def check_key(key: Any) -> None:
    """Raise unless `key` is a seed, a typed key or a raw key of the default kind."""
    if isinstance(key, int) and not isinstance(key, bool):
        return
    dtype, shape = getattr(key, "dtype", np.dtype(object)), getattr(key, "shape", None)
    seed, typed = jnp.issubdtype(dtype, jnp.integer), jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape == () and (seed or typed):
        return
    if dtype != jnp.uint32 or shape != jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape:
        raise ValueError(f"`key` must be an int or one random key, got key={key!r}.")
