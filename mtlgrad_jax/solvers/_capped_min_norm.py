r"""The min-norm point of the hull of K gradients with no weight above a cap (capped MGDA).

With bounds on both sides, active sets take long to find; an interior-point method has no such problem.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._interior_point import interior_point
from mtlgrad_jax.solvers._solution import Solution, compiled, normalized, shift, solution

_MAX_STEPS = 100


@compiled("max_steps")
def capped_min_norm(
    gramian: Float[Array, "K K"],
    cap: Float[Array, ""],
    present: Bool[Array, " K"],
    *,
    max_steps: int = _MAX_STEPS,
) -> Solution:
    """Return the weights of the min-norm point under the cap.

    Args:
      gramian: inner products of the rows, zero for rows that are not present.
      cap: largest weight of a row; if K caps sum to at most 1, the result is the mean.
      present: rows that take part.
      max_steps: maximum number of factorisations.
    """
    M, eps = normalized(gramian), jnp.finfo(gramian.dtype).eps
    count = jnp.maximum(jnp.sum(present), 1)
    size = jnp.trace(M) / count
    safe = jnp.where(size > 0, size, 1)
    none = (cap * count <= 1 + 4 * eps) | (size == 0)  # no choice, or no difference

    def judge(w: Array) -> tuple[Array, Array]:
        """Return how far w^T M w / 2 can be above the optimum; the bound puts the caps on the smallest products."""
        slope = M @ w
        rank = jnp.argsort(jnp.argsort(jnp.where(present, slope, jnp.inf)))
        gap = slope @ (w - jnp.where(present, jnp.clip(1 - rank * cap, 0, cap), 0))
        return gap / safe, none | (gap <= 2 * eps * (w @ slope) + eps**2 * size)

    mean = jnp.where(present, 1 / count, 0).astype(M.dtype)
    w, gap, steps = interior_point(M, jnp.zeros_like(mean), present, mean, judge, max_steps, cap=cap)
    gap = jnp.where(none, 0, jnp.maximum(gap, 0))
    return solution(w, gap, steps, gap > 2 * shift(M))
