"""Random keys of randomized methods, kept as plain arrays that any checkpoint format can store."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree, UInt32

from mtlgrad_jax._core.control import by_platform

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


@partial(jax.jit, static_argnames=("shape", "dtype"))
def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Return `jax.random.uniform(key, shape, dtype)`; on a CPU in one loop, where JAX's writes each round to memory."""

    def draw(key: Array, *, blocked: bool) -> Array:
        if not blocked:
            return jax.random.uniform(key, shape, dtype)
        mantissa = _threefry(jax.random.key_data(key), math.prod(shape)) >> 9
        return lax.bitcast_convert_type(mantissa | np.uint32(0x3F800000), jnp.float32).reshape(shape) - 1

    threefry = jax.random.key_impl(key) == "threefry2x32" and jax.threefry_partitionable.value
    same = threefry and dtype == jnp.float32 and math.prod(shape) < 1 << 32
    return by_platform(draw, key) if same else draw(key, blocked=False)


def _threefry(key: UInt32[Array, "2"], count: int) -> UInt32[Array, " count"]:
    """Return the xor of the two words that Threefry-2x32 (Salmon et al. 2011) makes of each number below `count`."""
    keys = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    high, low = keys[0], lax.iota(jnp.uint32, count) + keys[1]
    for i in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            high += low
            low = high ^ ((low << distance) | (low >> (32 - distance)))
        high, low = high + keys[(i + 1) % 3], low + keys[(i + 2) % 3] + np.uint32(i + 1)
    return high ^ low


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
