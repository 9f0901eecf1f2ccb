"""What docs/data.md says about precision, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlgrad_jax as mtl

PAIRS, P = 60, 256


def pairs(cosine):
    """Return pairs of gradients of unit length, rounded to bfloat16, with about this cosine."""
    rng = np.random.default_rng(0)
    first, other = rng.normal(size=(2, PAIRS, P))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    other -= np.sum(first * other, axis=1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    second = cosine * first + np.sqrt(1 - cosine**2) * other
    return jnp.asarray(np.stack([first, second], axis=1), jnp.bfloat16)


@pytest.mark.parametrize(
    ("route", "cosine", "kept"),
    [("stored", -0.9995, True), ("rows", -0.9995, True), ("not stored", -0.99, True), ("not stored", -0.9995, False)],
)
def test_non_conflict_with_bfloat16_inside(route, cosine, kept):
    """With float32 parameters and losses; the promise fails only where the Gramian passes through bfloat16."""
    gradients = pairs(cosine)

    def update(v):
        def losses_fn(params):
            return (v @ params.astype(jnp.bfloat16)).astype(jnp.float32)

        jacobian = mtl.linearize(losses_fn, jnp.ones(P), rows=1 if route == "rows" else None)
        given = jacobian.rows() if route == "stored" else jacobian
        method = mtl.upgrad()
        return method.update(given, method.init(None))[0]

    directions = np.asarray(jax.jit(jax.vmap(update))(gradients), np.float64)
    changes = np.einsum("nkp,np->nk", np.asarray(gradients, np.float64), directions)
    tolerance = 1e-5 * np.linalg.norm(directions, axis=1, keepdims=True)
    assert (changes >= -tolerance).all() == kept
