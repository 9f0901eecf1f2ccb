"""K numbers that a method learns, each with its own copy of an optax optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number
from mtlgrad_jax._core.tasks import accumulator_dtype

MOST = 1e4  # cap of a weighted loss, in multiples of its optimum


class Learned(NamedTuple):
    """One number for every task, and the states of their optimizers."""

    value: Float[Array, " K"]
    optimizer: PyTree


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is None or an optax transformation."""
    if not (optimizer is None or isinstance(optimizer, optax.GradientTransformation)):
        raise ValueError(f"`optimizer` must be an optax transformation, got optimizer={optimizer!r}.")


def learn(num_tasks: int, value: Number, optimizer: optax.GradientTransformation) -> Learned:
    """Return K equal numbers and the first states of their optimizers."""
    values = jnp.full((num_tasks,), value, accumulator_dtype())
    return Learned(values, jax.vmap(optimizer.init)(values))


def descend(learned: Learned, slope: Float[Array, " K"], optimizer: optax.GradientTransformation) -> Learned:
    """Return the numbers after one step of their optimizers along the derivatives `slope`."""
    steps, states = jax.vmap(optimizer.update)(slope, learned.optimizer, learned.value)
    return Learned(optax.apply_updates(learned.value, steps), states)
