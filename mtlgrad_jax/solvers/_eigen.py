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
    values, vectors = jnp.linalg.eigh(normalized(matrix))
    largest = jnp.max(values)
    count = jnp.sum(jnp.diagonal(matrix) > 0)  # absent tasks must not affect the cut-off
    return values, vectors, (values > (count + SHIFT) * jnp.finfo(matrix.dtype).eps * largest) & (largest > 0)


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
