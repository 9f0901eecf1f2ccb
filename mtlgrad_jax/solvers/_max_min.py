r"""The direction near a reference that serves the worst-off task best (CAGrad).

    max_d min_i <g_i, d>   subject to   ||d - g_0|| <= C,      g_0 the mean gradient

Call the value tau. The nearest d that reaches a given tau is d = g_0 + sum_i t_i g_i, where t >= 0 solves
min t^T M t / 2 + (b - tau 1)^T t with b = M 1 / K. What is left is one number: the tau at which ||G^T t|| = C. With a
multiple s 11^T added to M the program is bounded whether tau can be reached or not, tau becomes rho - s 1^T t, t is
piecewise linear in rho and ||G^T t|| grows with rho. On one piece the root is that of a quadratic: a Newton method on
rho, kept inside a bracket, ends after a few pieces. Where the gradients are Pareto stationary, ||G^T t|| may stop
growing short of C: tau has then reached zero, its optimum, and d is the point nearest g_0 that reaches it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._nonnegative_qp import masked, nonnegative_qp, step_limit
from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, normalized, shift, smallest_row, solution

_MAX_PIECES = 40
_GROWTH = 16  # how much further rho may reach in one step


@partial(jax.jit, static_argnames="max_steps")
def max_min_direction(
    gramian: Float[Array, "K K"],
    radius: Float[Array, ""],
    present: Bool[Array, " K"],
    *,
    max_steps: int | None = None,
) -> Solution:
    """Return t >= 0 such that d = g_0 + sum_i t_i g_i solves the problem with C = radius ||g_0||.

    Args:
      gramian: inner products of the rows, zero for rows that are not present.
      radius: C / ||g_0||.
      present: rows that take part, in the mean too.
      max_steps: most factorisations in each of the quadratic programs.
    """
    K = gramian.shape[0]
    M, _ = normalized(gramian)
    b = jnp.sum(M, axis=1) / jnp.maximum(jnp.sum(present), 1)
    C = radius * jnp.sqrt(jnp.maximum(jnp.sum(jnp.where(present, b, 0)) / jnp.maximum(jnp.sum(present), 1), 0))
    if K == 1:
        t, residual, steps, short = jnp.zeros((K,), M.dtype), jnp.zeros(()), jnp.asarray(0), jnp.asarray(False)
        t = C * inverse_sqrt(jnp.diagonal(M)) * present
    elif K == 2:
        t, residual, steps, short = _pair(M, b, C, present), jnp.zeros(()), jnp.asarray(0), jnp.asarray(False)
    else:
        t, residual, steps, short = _search(M, b, C, present, step_limit(max_steps, K))
    reach = _norm(M, t)
    t = t * jnp.where(reach > C, C / jnp.where(reach > 0, reach, 1), 1)
    return solution(t, residual, steps, short)


def _norm(M: Array, t: Array) -> Array:
    return jnp.sqrt(jnp.maximum(t @ M @ t, 0))


def _search(M: Array, b: Array, C: Array, present: Array, max_steps: int) -> tuple[Array, Array, Array, Array]:
    eps, inverse = jnp.finfo(M.dtype).eps, inverse_sqrt(jnp.diagonal(M))
    rows = present & (inverse > 0)
    offset = smallest_row(M, rows)
    Q = M + offset
    worst = jnp.argmin(jnp.where(present, b, jnp.inf))
    lowest = b[worst]

    def body(carry: tuple) -> tuple:
        low, high, rho, _, reached, _, steps, pieces, _, _ = carry
        solved, passive = nonnegative_qp(Q, rho - b, present, max_steps)
        t = solved.value
        reach = _norm(M, t)
        over = reach > C
        # t grows by h q on this piece, ||G^T (t + h q)|| = C is a quadratic in h
        q = _masked_solve(Q, passive, jnp.ones_like(b))
        a2, a1, a0 = jnp.maximum(q @ M @ q, 0), t @ M @ q, (reach - C) * (reach + C)
        root = jnp.sqrt(jnp.maximum(a1 * a1 - a2 * a0, 0))
        h = jnp.where(a1 > 0, -a0 / (a1 + root), (root - a1) / jnp.where(a2 > 0, a2, 1))
        saturated = ~over & (reach - reached <= 64 * eps * C) & (rho - lowest >= 2 * (low - lowest)) & (low > lowest)
        overlong = ~over & (jnp.max(jnp.where(rows, t / jnp.where(rows, inverse, 1), 0)) > 1 / jnp.sqrt(eps))
        low, high = jnp.where(over, low, rho), jnp.where(over, rho, high)
        ceiling = jnp.where(jnp.isfinite(high), (low + high) / 2, rho + _GROWTH * (rho - lowest))
        newton = rho + h
        inside = (newton > low) & (newton < high) & jnp.any(passive)
        after = jnp.where(inside, jnp.where(jnp.isfinite(high), newton, jnp.minimum(newton, ceiling)), ceiling)
        closed = jnp.isfinite(high) & (high - low <= 2 * eps * jnp.abs(high))
        hit = jnp.abs(reach - C) <= 16 * eps * C
        return (
            low,
            high,
            after,
            t,
            jnp.where(over, reached, reach),
            jnp.maximum(solved.residual, jnp.where(over, reach / C - 1, 0)),
            steps + solved.steps,
            pieces + 1,
            solved.result > 0,
            hit | closed | saturated | overlong,
        )

    def going(carry: tuple) -> Array:
        return ~carry[-1] & (carry[-3] < _MAX_PIECES)

    zero, none = jnp.zeros((), M.dtype), jnp.asarray(0)
    first = lowest + (M[worst, worst] + offset) * C * jnp.where(rows[worst], inverse[worst], 1 / jnp.sqrt(offset))
    trivial = (C <= 0) | ~jnp.any(rows)
    carry = (lowest, jnp.asarray(jnp.inf, M.dtype), first, jnp.zeros_like(b), zero, zero, none, none, trivial, trivial)
    unbounded = jnp.asarray(jnp.inf, M.dtype)
    start = (lowest, unbounded, first, jnp.zeros_like(b), zero, zero, none, none, jnp.asarray(False), trivial)
    carry = lax.while_loop(going, body, start)
    *_, t, _, residual, steps, _, short, done = carry
    return t, residual, steps, short | ~done


def _masked_solve(Q: Array, rows: Array, rhs: Array) -> Array:
    """Solve Q x = rhs on some rows, shifted and scaled like the quadratic program's own systems."""
    d = jnp.where(rows, inverse_sqrt(jnp.diagonal(Q)), 0)
    factor = jnp.linalg.cholesky(masked(Q, rows) * d[:, None] * d[None, :] + jnp.diag(jnp.where(rows, shift(Q), 1)))
    return d * jsl.cho_solve((factor, True), d * rhs)


def _pair(M: Array, b: Array, C: Array, present: Array) -> Array:
    """Two rows: minimise a w + C ||w g_1 + (1 - w) g_2|| over w in [0, 1] by completing the square."""
    distance = jnp.maximum(M[0, 0] + M[1, 1] - 2 * M[0, 1], 0)
    safe = jnp.where(distance > 0, distance, 1)
    height = jnp.sqrt(jnp.maximum(M[0, 0] * M[1, 1] - M[0, 1] ** 2, 0)) / safe
    steepness = jnp.where(C > 0, (b[0] - b[1]) / jnp.where(C > 0, C * jnp.sqrt(safe), 1), 0)
    offset = -height * steepness / jnp.sqrt(jnp.maximum(1 - steepness**2, jnp.finfo(M.dtype).tiny))
    w = jnp.where(distance > 0, jnp.clip((M[1, 1] - M[0, 1]) / safe + offset, 0, 1), 0.5)
    w = jnp.where(jnp.abs(steepness) >= 1, (steepness < 0).astype(M.dtype), w)
    w = jnp.where(present[0] & present[1], w, present[0].astype(M.dtype))
    t = jnp.stack([w, 1 - w])
    reach = _norm(M, t)
    return t * jnp.where(reach > 0, C / jnp.where(reach > 0, reach, 1), 0)
