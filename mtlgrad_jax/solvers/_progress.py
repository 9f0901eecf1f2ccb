r"""The direction nearest to one gradient that makes some progress on the others (PCD).

    min_d ||d - g_p||^2 / 2   subject to   <g_j, d> >= tau_j ||g_j||^2,  j != p

d = g_p + sum_j y_j g_j with multipliers y >= 0 gives the non-negative program Q = M, q_j = tau_j M_jj - M_jp over
j != p. It is unbounded if the constraints contradict each other; then for every d some task makes no progress at all.
So the constraints count as feasible if at least half of the required progress is reached.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, nonnegative_qp
from mtlgrad_jax.solvers._solution import INFEASIBLE, Solution, compiled, inverse_sqrt, normalized, solution


@compiled("primary", "max_steps")
def progress_direction(
    gramian: Float[Array, "K K"], primary: int, progress: Float[Array, " K"], *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return w such that G^T w is the direction with the norm of g_p; g_p itself and INFEASIBLE if there is none.

    Args:
      gramian: inner products of the rows.
      primary: p.
      progress: tau, in [0, 1]; the entry of p is ignored.
      max_steps: maximum number of factorisations of a search, which few tasks do not need.
    """
    gramian = normalized(gramian)
    K, diagonal = len(gramian), jnp.diagonal(gramian)
    inverse = inverse_sqrt(diagonal)
    others = jnp.arange(K) != primary
    asked = jnp.where(others, progress * diagonal, 0)
    solved, _ = nonnegative_qp(gramian, asked - gramian[:, primary], others & (inverse > 0), max_steps)
    own = jnp.zeros(K, gramian.dtype).at[primary].set(1)
    w = own + solved.value
    products = gramian @ w
    square, rounding = w @ products, jnp.finfo(gramian.dtype).eps * (jnp.abs(w) @ jnp.sqrt(diagonal)) ** 2
    size = jnp.sqrt(jnp.maximum(square, 0))
    slightly = jnp.sqrt(jnp.finfo(gramian.dtype).eps) * size * jnp.sqrt(diagonal)
    some = square > 16 * rounding
    # Progress of zero is always feasible, if only by the zero direction.
    possible = ~jnp.any(asked > 0) | (some & ~jnp.any(others & (products < asked / 2 - slightly)))
    scale = jnp.where(some, jnp.sqrt(diagonal[primary]) / jnp.where(some, size, 1), 0)
    value, residual = jnp.where(possible, w * scale, own), jnp.where(possible, solved.residual, 0)
    answer = solution(value, residual, solved.steps, solved.result > 0)
    return answer._replace(result=jnp.where(possible | (diagonal[primary] <= 0), answer.result, INFEASIBLE))
