"""Eigen-decompositions with relative cut-offs.

A float32 Gramian has an error of about K eps times its largest eigenvalue: components below (K + SHIFT) eps times that
are noise and are dropped. Nothing is sliced by rank; shapes are static.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._solution import SHIFT, in_full_precision, inverse_sqrt, normalized


def significant_eigh(
    matrix: Float[Array, "K K"],
) -> tuple[Float[Array, " K"], Float[Array, "K K"], Bool[Array, " K"]]:
    """Return eigenvalues in units of the largest diagonal entry, eigenvectors, and which are above the cut-off."""
    M = normalized(matrix)
    values, vectors = _eigh_of_two(M) if len(M) == 2 else jnp.linalg.eigh(M)
    largest = jnp.max(values)
    count = jnp.sum(jnp.diagonal(matrix) > 0)  # absent tasks must not affect the cut-off
    return values, vectors, (values > (count + SHIFT) * jnp.finfo(matrix.dtype).eps * largest) & (largest > 0)


def _eigh_of_two(M: Float[Array, "2 2"]) -> tuple[Float[Array, "2"], Float[Array, "2 2"]]:
    """Return what `jnp.linalg.eigh` does, without the call of a library, which is slow on a GPU."""
    half, b = (M[1, 1] - M[0, 0]) / 2, M[0, 1]
    radius, mean = jnp.hypot(half, b), (M[0, 0] + M[1, 1]) / 2
    x, y = jnp.where(half < 0, radius - half, b), jnp.where(half < 0, b, radius + half)
    length = jnp.hypot(x, y)
    x, y = jnp.where(length > 0, x, 0), jnp.where(length > 0, y, 1)
    length = jnp.where(length > 0, length, 1)
    return jnp.stack([mean - radius, mean + radius]), jnp.stack([jnp.stack([y, x]), jnp.stack([-x, y])]) / length


def cosines(gramian: Float[Array, "K K"]) -> tuple[Float[Array, "K K"], Float[Array, " K"]]:
    """Return the cosines between the rows, and the inverse row norms; both are zero for zero rows."""
    inverse = inverse_sqrt(jnp.diagonal(gramian))
    return gramian * inverse[:, None] * inverse[None, :], inverse


@in_full_precision()
def direction_of_products(
    cosines: Float[Array, "K K"], products: Float[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Return b = C^+ p and C b: the direction sum_i b_i u_i whose products with the unit rows u_i are nearly p.

    Zero if there is no such direction, that is if p vanishes on the range of C up to rounding.
    """
    values, vectors, kept = significant_eigh(cosines)
    b = vectors @ jnp.where(kept, (vectors.T @ products) / jnp.where(kept, values, 1), 0)
    found = cosines @ b
    rounding = 4 * jnp.sum(jnp.diagonal(cosines) > 0) * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(products))
    exists = jnp.max(jnp.abs(found)) > rounding
    return jnp.where(exists, b, 0), jnp.where(exists, found, 0)
