"""Random keys of the methods that draw."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def make_key(key: int | Array) -> Array:
    """Return a fresh typed key from a seed, a typed key or a raw one; called by init, never by a factory."""
    if isinstance(key, int) or (jnp.ndim(key) == 0 and jnp.issubdtype(key.dtype, jnp.integer)):
        return jax.random.key(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.clone(key)
    return jax.random.wrap_key_data(jnp.array(key))


def draw_orders(key: Array, order: str, num_tasks: int) -> tuple[Array, Int[Array, "K K"]]:
    """Return the next key and an order of the tasks for every task, drawn ("random") or 0 to K-1 ("fixed")."""
    key, draw = jax.random.split(key)
    orders = jnp.broadcast_to(jnp.arange(num_tasks), (num_tasks, num_tasks))
    if order == "random":
        orders = jax.vmap(jax.random.permutation)(jax.random.split(draw, num_tasks), orders)
    return key, orders


def check_key(key: Any) -> None:
    """Raise unless `key` is a seed, a typed key or a raw one of the default kind."""
    if isinstance(key, int) and not isinstance(key, bool):
        return
    dtype, shape = getattr(key, "dtype", np.dtype(object)), np.shape(key)
    seed, typed = jnp.issubdtype(dtype, jnp.integer), jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape == () and (seed or typed):
        return
    if dtype != jnp.uint32 or shape != jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape:
        raise ValueError(f"`key` must be an int or one random key, got key={key!r}.")
