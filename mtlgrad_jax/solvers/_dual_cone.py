r"""Projection on the dual cone of K gradients: the direction nearest to u^T G that conflicts with none of them.

The projection of u^T G on {d : G d >= 0} is v^T G with v = argmin_{v >= u} v^T M v (Quinton & Rey 2024, Prop. 1).
With v = u + x this is the non-negative program Q = M, q = -M u.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax.solvers._nonnegative_qp import nonnegative_qp, step_limit
from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, solution

_CHUNK = 32  # right-hand sides solved side by side


@partial(jax.jit, static_argnames="max_steps")
def project_rows(
    gramian: Float[Array, "K K"], preference: Float[Array, " K"], *, max_steps: int | None = None
) -> Solution:
    """Return the weights of the sum of the projections of preference_i g_i (UPGrad), all solved side by side.

    Args:
      gramian: inner products of the rows.
      preference: non-negative weights of the rows before projection.
      max_steps: most factorisations; by default ten per task and 50 more.
    """
    K = gramian.shape[0]
    if K <= 2:
        return solution(preference + _pairwise(gramian) @ preference, jnp.zeros(()), 0, False)
    limit = step_limit(max_steps, K)
    solved = jax.lax.map(lambda row: _project(gramian, row, limit), jnp.diag(preference), batch_size=min(K, _CHUNK))
    return Solution(solved.value.sum(0), solved.residual.max(), solved.steps.max(), solved.result.max())


def _project(M: Float[Array, "K K"], weights: Float[Array, " K"], max_steps: int) -> Solution:
    inverse = inverse_sqrt(jnp.diagonal(M))
    M = M * inverse[:, None] * inverse[None, :]
    weights_unit = weights * jnp.where(inverse > 0, 1 / jnp.where(inverse > 0, inverse, 1), 0)
    solved, _ = nonnegative_qp(M, -M @ weights_unit, inverse > 0, max_steps)
    return solved._replace(value=weights + solved.value * inverse)


def _pairwise(M: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """At most two rows: entry (i, j) is what row j in conflict needs of row i."""
    diagonal = jnp.diagonal(M)[:, None]
    return jnp.where((M < 0) & (diagonal > 0), -M / jnp.where(diagonal > 0, diagonal, 1), 0) * (1 - jnp.eye(len(M)))
