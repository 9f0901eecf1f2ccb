"""A small network with five tasks, and what oracles are compared with: jax.jacrev and numpy in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flat(losses):
    return losses if isinstance(losses, jax.Array) else jnp.stack(jax.tree.leaves(losses))


def dense(losses_fn, params):
    """The Jacobian (K, P) by jacrev, in the order of ravel_pytree."""
    vector, unravel = ravel_pytree(params)
    return jax.jacrev(lambda v: flat(losses_fn(unravel(v))))(vector)


def matrix(stack):
    """A stacked pytree as (K, P)."""
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(stack)


def assert_gramian(got, J, tolerance):
    """Entries within `tolerance` of n_i n_j."""
    J = np.asarray(J, np.float64)
    norms = np.linalg.norm(J, axis=1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_less(np.abs(got - J @ J.T), tolerance * np.outer(norms, norms) + 1e-30)
    np.testing.assert_array_equal(got, np.asarray(got).T)


MLP = {"w": normal(0, 4, 5), "b": normal(1, 5), "head": normal(2, 5, 3)}
X = normal(3, 8, 4)


def outputs(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def five(params, x=X):
    o = outputs(params, x)
    return [jnp.mean(o[:, 0] ** 2), jnp.mean(jnp.sin(o[:, 1])), jnp.sum(o[:, 2]), jnp.mean(o), 1e3 * jnp.max(o)]


class Five(NamedTuple):
    z: jax.Array
    y: jax.Array
    x: jax.Array
    w: jax.Array
    v: jax.Array


FORMS = {
    "array": jnp.stack,
    "dict": lambda v: dict(zip("edcba", v, strict=True)),
    "nested dict": lambda v: {"z": {"b": v[0], "a": v[1]}, "y": [v[2], v[3]], "x": (v[4],)},
    "tuple": tuple,
    "NamedTuple": lambda v: Five(*v),
}
