r"""The direction near a reference that serves the worst-off task best (CAGrad).

    max_d min_i <g_i, d>   subject to   ||d - g_0|| <= C,      g_0 the mean gradient

Call the value tau. The nearest d that reaches a given tau is d = g_0 + sum_i t_i g_i, where t >= 0 solves
min t^T M t / 2 + (b - tau 1)^T t with b = M 1 / K. What is left is one number: the tau at which ||G^T t|| = C. Solved
for tau = 0 first, the program tells on which side of 0 that is. Below, it is bounded as it stands; above, a multiple
s 11^T added to M makes it so whether tau can be reached or not, and tau becomes rho - s 1^T t. Either way t is
piecewise linear in rho and ||G^T t|| grows with rho. On one piece the root is that of a quadratic: a Newton method on
rho, kept inside a bracket, ends after a few pieces. Where the gradients are Pareto stationary, ||G^T t|| may stop
growing short of C, or t grow until rounding hides it: tau = 0 is then the optimum, as it is where a row is zero, and d
is the point nearest g_0 that reaches it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, masked, nonnegative_qp
from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, normalized, shift, smallest_row, solution

_MAX_PIECES = 40
_GROWTH = 16  # how much further rho may reach in one step


@partial(jax.jit, static_argnames="max_steps")
def max_min_direction(
    gramian: Float[Array, "K K"],
    radius: Float[Array, ""],
    present: Bool[Array, " K"],
    *,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """Return t >= 0 such that d = g_0 + sum_i t_i g_i solves the problem with C = radius ||g_0||.

    Args:
      gramian: inner products of the rows, zero for rows that are not present.
      radius: C / ||g_0||.
      present: rows that take part, in the mean too.
      max_steps: most factorisations in each of the quadratic programs.
    """
    K = gramian.shape[0]
    M, count = normalized(gramian), jnp.maximum(jnp.sum(present), 1)
    b = jnp.sum(M, axis=1) / count
    C = radius * jnp.sqrt(jnp.maximum(jnp.sum(jnp.where(present, b, 0)) / count, 0))
    if K == 1:
        return solution(C * inverse_sqrt(jnp.diagonal(M)) * present, jnp.zeros(()), 0, False)
    if K == 2:
        return solution(_pair(M, b, C, present), jnp.zeros(()), 0, False)
    return _search(M, b, C, present, max_steps)


def _norm(M: Array, t: Array) -> Array:
    return jnp.sqrt(jnp.maximum(t @ M @ t, 0))


class _Search(NamedTuple):
    """State of the search for rho."""

    low: Array  # ||G^T t|| <= C here
    high: Array  # and > C here
    rho: Array  # where to look next
    solved: Solution  # t of the last look
    reached: Array  # ||G^T t|| at low
    pieces: Array  # looks taken
    saturated: Array  # ||G^T t|| has stopped growing short of C, or rounding hides it
    done: Array


def _search(M: Array, b: Array, C: Array, present: Array, max_steps: int) -> Solution:
    eps, inverse = jnp.finfo(M.dtype).eps, inverse_sqrt(jnp.diagonal(M))
    rows = present & (inverse > 0)
    n = jnp.where(rows, 1 / jnp.where(rows, inverse, 1), 0)
    worst = jnp.argmin(jnp.where(rows, b, jnp.inf))
    lowest = jnp.where(jnp.any(rows), b[worst], 0)

    # tau = 0: beyond it the program needs its bound, short of it the bound would only blur it.
    nearest, passive = nonnegative_qp(M, -b, rows, max_steps)
    beyond = _norm(M, nearest.value) < C
    offset = jnp.where(beyond, smallest_row(M, rows), 0)
    Q = M + offset

    def following(rho: Array, t: Array, reach: Array, passive: Array) -> Array:
        """Return the rho at which ||G^T (t + h q)|| = C, a quadratic in h, on the piece that t lies on."""
        q = _masked_solve(Q, passive, jnp.ones_like(b))
        a2, a1, a0 = jnp.maximum(q @ M @ q, 0), t @ M @ q, (reach - C) * (reach + C)
        root = jnp.sqrt(jnp.maximum(a1 * a1 - a2 * a0, 0))
        h = jnp.where(a1 > 0, -a0 / jnp.where(a1 > 0, a1 + root, 1), (root - a1) / jnp.where(a2 > 0, a2, 1))
        return jnp.where(jnp.any(passive), rho + h, rho)

    def choose(rho: Array, low: Array, high: Array, newton: Array) -> Array:
        bounded = jnp.isfinite(high)
        ceiling = jnp.where(bounded, (low + high) / 2, rho + _GROWTH * (rho - lowest))
        # Short of C with no bound above, a step within rounding is no progress.
        inside = (newton > low + jnp.where(bounded, 0, 16 * eps * jnp.abs(low))) & (newton < high)
        return jnp.where(inside, jnp.where(bounded, newton, jnp.minimum(newton, ceiling)), ceiling)

    def look(search: _Search) -> _Search:
        low, high, rho = search.low, search.high, search.rho
        solved, passive = nonnegative_qp(Q, rho - b, rows, max_steps, passive=search.solved.value > 0)
        t = solved.value
        reach, blur = _norm(M, t), 4 * eps * (n @ t) ** 2  # of reach^2, by rounding
        lost = blur > C**2
        over = jnp.where(lost, ~beyond, reach > C)
        flat = (reach - search.reached <= 64 * eps * C) & (rho - lowest >= 2 * (low - lowest)) & (low > lowest)
        saturated = beyond & ((~over & flat) | lost)
        low, high = jnp.where(over, low, rho), jnp.where(over, rho, high)
        after = choose(rho, low, high, following(rho, t, reach, passive))
        closed = jnp.isfinite(high) & (high - low <= 2 * eps * jnp.maximum(jnp.abs(high), jnp.abs(low)))
        hit = ~lost & (jnp.abs(reach - C) * C <= 16 * eps * C**2 + jnp.where(blur < C**2 / 64, blur, 0))
        return _Search(
            low=low,
            high=high,
            rho=after,
            solved=solved._replace(steps=search.solved.steps + solved.steps),
            reached=jnp.where(over, search.reached, reach),
            pieces=search.pieces + 1,
            saturated=saturated,
            done=hit | closed | saturated,
        )

    t = nearest.value
    reach = _norm(M, t)
    rho = offset * jnp.sum(t)
    low = jnp.where(beyond, jnp.maximum(rho, lowest), lowest)
    start = lowest + (M[worst, worst] + offset) * C * inverse[worst]
    newton = jnp.where(jnp.any(t > 0), following(rho, t, reach, passive), start)
    first = jnp.where(beyond, jnp.where(newton > low, newton, start), jnp.where(newton > low, newton, low / 2))
    trivial = (C <= 0) | ~jnp.any(rows) | (beyond & jnp.any(present & ~rows))
    search = _Search(
        low=low,
        high=jnp.where(beyond, jnp.inf, jnp.zeros((), M.dtype)),
        rho=first,
        solved=nearest,
        reached=jnp.where(beyond, reach, 0),
        pieces=jnp.asarray(0),
        saturated=jnp.asarray(False),
        done=trivial,
    )
    search = lax.while_loop(lambda s: ~s.done & (s.pieces < _MAX_PIECES), look, search)
    found = search.solved.value
    # Back from an excess of rounding's size towards a point that is no worse for the worst-off task than it must be.
    inner = jnp.where(beyond, nearest.value, 0)
    short_of, over_by = C - _norm(M, inner), jnp.maximum(_norm(M, found) - C, 0)
    back = over_by / jnp.where(over_by > 0, short_of + over_by, 1)
    t = jnp.where(search.saturated, nearest.value, found + back * (inner - found))
    residual = jnp.where(search.saturated, nearest.residual, search.solved.residual)
    short = (search.solved.result > 0) | (nearest.result > 0) | ~search.done
    return solution(t, residual, search.solved.steps, short)


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
