"""Arithmetic on K weights that methods share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._core.checks import Number
from mtlgrad_jax._core.tasks import accumulator_dtype, task_vector

Present = Bool[Array, " K"]


def uniform(present: Present) -> Float[Array, " K"]:
    """Return weights of 1/K for the K tasks present."""
    return present / jnp.maximum(jnp.sum(present), 1).astype(accumulator_dtype())


def one_for_all(values: PyTree) -> bool:
    """Return whether a per-task argument of a factory is one number for all tasks."""
    return jax.tree_util.all_leaves([values]) and jnp.ndim(values) == 0


def of_tasks(name: str, values: PyTree, present: Present, default: Float[Array, " K"] | float) -> Float[Array, " K"]:
    """Return a per-task argument of a factory as an array, or the default for None; zero for absent tasks."""
    values = default if values is None else values if one_for_all(values) else task_vector(name, values)
    return jnp.where(present, values, 0).astype(accumulator_dtype())


def fit(weights: Float[Array, " K"], gramian: Float[Array, "K K"] | None, among: Present) -> Bool[Array, ""]:
    """Return whether a weighted sum of some tasks' gradients cannot overflow, whatever their angles."""
    lengths = 1 if gramian is None else jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    longest = jnp.sum(jnp.where(among, jnp.abs(weights) * lengths, 0))
    return jnp.isfinite(2 * longest)  # factor 2: margin for rounding


def ratios(values: Float[Array, " K"], by: Float[Array, " K"], among: Present) -> Float[Array, " K"]:
    """Return values / by, times the power of two that makes the largest among some tasks about 1.

    This keeps the ratios exact and finite, however far apart the scales are.
    """
    (numerators, up), (denominators, down) = jnp.frexp(values), jnp.frexp(by)
    exponents = up - down
    largest = jnp.max(exponents, where=among & (values != 0), initial=4 * jnp.finfo(values.dtype).minexp)
    return jnp.ldexp(numerators / denominators, jnp.minimum(exponents - largest, 0))


def unit(vectors: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """Return vectors at unit length, zeros as they are."""
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return scaled / jnp.where(length > 0, length, 1)


def mean_of(values: Float[Array, " K"], among: Present) -> Float[Array, ""]:
    """Return the mean over some tasks, or 0 if there are none."""
    return jnp.sum(jnp.where(among, values, 0)) / jnp.maximum(jnp.sum(among), 1)


def over_mean(values: Float[Array, " K"], among: Present) -> Float[Array, " K"]:
    """Return values divided by their mean over some tasks, so that over these they sum to the number of tasks."""
    mean = mean_of(values, among)
    return values / jnp.where(mean != 0, mean, 1)


def softmax(values: Float[Array, " K"], among: Present, temperature: Number = 1.0) -> Float[Array, " K"]:
    """Return exp(v/T) over its sum among some tasks, 0 for the others; finite even if v/T is not."""
    largest = jnp.max(values, where=among, initial=jnp.finfo(values.dtype).min)
    parts = jnp.where(among, jnp.exp(jnp.where(among, values - largest, 0) / temperature), 0)
    return parts / jnp.maximum(jnp.sum(parts), 1)


def share(weights: Float[Array, " K"], present: Present, whole: int = 1) -> Float[Array, ""]:
    """Return the part of the total weight that absent tasks leave to those present, so that rounding does not add up.

    It is at least eps squared times the whole, too little to change a sum, so that the ratios can still be learned.
    """
    absent = jnp.sum(jnp.where(present, 0, weights))
    return jnp.maximum(whole - absent, whole * jnp.finfo(weights.dtype).eps ** 2)


def on_simplex(weights: Float[Array, " K"], present: Present) -> Float[Array, " K"]:
    """Return weights that sum to 1 over the tasks present, in the given ratios, or equal if those are all zero."""
    kept = jnp.where(present, weights, 0)
    total = jnp.sum(kept)
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), uniform(present))
