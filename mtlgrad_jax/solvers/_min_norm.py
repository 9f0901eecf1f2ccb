r"""The min-norm point of the convex hull of K gradients: min_w w^T M w over the simplex (MGDA).

Solved as a non-negative program: for any s > 0, the minimiser of x^T (M + s 11^T) x / 2 - s 1^T x over x >= 0 is a
positive multiple of the simplex minimiser. With s the smallest squared row norm, an upper bound of the optimum, the
multiple lies between 1/2 and 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, nonnegative_qp
from mtlgrad_jax.solvers._solution import Solution, centred, compiled, smallest_row, solution


@compiled("max_steps")
def min_norm(
    gramian: Float[Array, "K K"], present: Bool[Array, " K"] | None = None, *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return the weights of the min-norm point in the convex hull of the rows.

    Args:
      gramian: inner products of the rows.
      present: rows that take part.
      max_steps: maximum number of factorisations of a search, which few tasks do not need.

    Returns:
      Weights on the simplex. If the minimiser is not unique, any minimiser.
    """
    K = gramian.shape[0]
    present = jnp.ones((K,), bool) if present is None else present
    M = centred(jnp.where(present[:, None] & present[None, :], gramian, 0), present)
    if K == 1:
        return solution(present.astype(M.dtype), jnp.zeros(()), 0, False)
    if K == 2:
        return solution(_pair(M, present), jnp.zeros(()), 0, False)
    offset = smallest_row(M, present)
    solved, _ = nonnegative_qp(M + offset, jnp.full((K,), offset), present, max_steps)
    total = jnp.sum(solved.value)
    value = solved.value / jnp.where(total > 0, total, 1)
    zero = present & (jnp.diagonal(M) <= 0)  # such a row is itself the min-norm point
    return solved._replace(value=jnp.where(jnp.any(zero), jnp.arange(K) == jnp.argmax(zero), value))


def _pair(M: Float[Array, "2 2"], present: Bool[Array, "2"]) -> Float[Array, "2"]:
    """Solve for two rows: the projection of zero onto a segment."""
    parts = jnp.diagonal(M)[::-1] - M[0, 1]
    distance = jnp.sum(parts)
    shorter = jnp.heaviside(jnp.stack([M[1, 1] - M[0, 0], M[0, 0] - M[1, 1]]), 0.5)  # if rounding hides the distance
    weights = jnp.where(distance > 0, parts / jnp.where(distance > 0, distance, 1), shorter)
    return jnp.where(present[0] & present[1], jnp.clip(weights, 0, 1), present.astype(M.dtype))
