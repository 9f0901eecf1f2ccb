r"""The alpha-fair equation M w = (q/w)^(1/alpha), w > 0 (FairGrad; Nash-MTL for alpha = 1; PIVRG with priorities q).

It is the stationarity condition of the strictly convex  w^T M w / 2 - sum_i q_i^(1/alpha) w_i^(1-1/alpha) /
(1-1/alpha).  In terms of w = v / n, n the row norms, it is  C v = p v^(-1/alpha)  with the cosines C and
p = q^(1/alpha) n^(1/alpha-1): the matrix no longer holds the tasks' scales. Newton's method predicts the contribution
of the other tasks to each row; each v_i then solves its own scalar equation, in log v, with that contribution. Weights
wrong by orders of magnitude are thus corrected in one step. The line search uses the derivative along the path, which
suffers less from rounding than the value; a step that is too long is taken again from the same point, halved.

At a Pareto-stationary point the equation has no solution; the shift of the diagonal by (K + SHIFT) eps then bounds w,
and G^T w is as small as the shift allows. Newton's method alone would at most double so long a w in each step, so each
step ends at the best multiple of v if that is longer: s v with s^(1+1/alpha) = v^T right / v^T left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Float, Int

from mtlgrad_jax.solvers._solution import Solution, compiled, inverse_sqrt, shift, solution

_MAX_STEPS = 1000
_SMALLEST_STEP = 1e-3
_SCALAR_STEPS = 4  # Newton steps on the scalar equations
_NEAR = 64  # in eps, with the 2/alpha of the right side: a smaller residual may be rounding
_SMALL = 0.1  # largest change of the logs at which Newton's method converges quadratically, down to rounding
_PATIENCE = 4  # steps near the solution without halving the least residual before it counts as rounding


class _Newton(NamedTuple):
    """State of Newton's method."""

    x: Float[Array, " K"]  # log v, as precise as it is known
    v: Float[Array, " K"]
    left: Float[Array, " K"]  # the sides of the equation at v
    right: Float[Array, " K"]
    residual: Float[Array, ""]
    length: Float[Array, ""]  # of the next step, in Newton steps: 1, or less if longer ones were rejected
    best_v: Float[Array, " K"]  # the v with the least residual so far
    best: Float[Array, ""]
    stalled: Int[Array, ""]  # steps near the solution since the least residual was halved
    steps: Int[Array, ""]


@compiled("max_steps")
def alpha_fair(
    gramian: Float[Array, "K K"],
    alpha: Float[Array, ""] | float,
    priority: Float[Array, " K"] | None = None,
    *,
    max_steps: int = _MAX_STEPS,
) -> Solution:
    """Return the solution of M w = (q/w)^(1/alpha) on the nonzero rows, and zero on the zero rows.

    Args:
      gramian: inner products of the rows.
      alpha: fairness, > 0. Weights below the smallest float, as for large alpha, come out as zero.
      priority: q > 0; 1 for None.
      max_steps: maximum number of factorisations.
    """
    dtype, K = gramian.dtype, gramian.shape[0]
    eps = jnp.finfo(dtype).eps
    beta = 1 / jnp.asarray(alpha, dtype)
    inverse = inverse_sqrt(jnp.diagonal(gramian))
    rows = inverse > 0
    smallest = jnp.min(jnp.where(rows, inverse, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    log_size = jnp.where(rows, -jnp.log(jnp.where(rows, inverse / smallest, 1)), 0)  # row norms, 0 for the largest
    diagonal = 1 + shift(gramian)
    off = gramian * inverse[:, None] * inverse[None, :] * (1 - jnp.eye(K, dtype=dtype))
    log_p = (beta - 1) * log_size + (0 if priority is None else beta * jnp.log(priority))

    def sides(x: Array, v: Array) -> tuple[Array, Array]:
        return off @ v + diagonal * v, jnp.exp(log_p - beta * x)

    def residual_of(v: Array, left: Array, right: Array) -> Array:
        return jnp.max(jnp.abs(left - right) / (jnp.abs(off) @ v + v + right))

    def solve_rows(x: Array, v: Array, others: Array) -> tuple[Array, Array]:
        """Return the x and v with `diagonal v + others = right`, by Newton on the difference of the sides' logs.

        Both are divided by the current v: for nearly opposite rows, whose large v must cancel, x is too imprecise.
        """
        base = jnp.maximum(v, eps * jnp.max(v))
        log_base, others = jnp.log(base), others / base
        log_plus, log_minus = jnp.log(jnp.maximum(others, 0)), jnp.log(jnp.maximum(-others, 0))
        log_left, log_right = jnp.log(diagonal), log_p - (1 + beta) * log_base

        def newton(_: Array | int, t: Array) -> Array:
            left, right = jnp.logaddexp(log_left + t, log_plus), jnp.logaddexp(log_right - beta * t, log_minus)
            slope = jnp.exp(log_left + t - left) + beta * jnp.exp(log_right - beta * t - right)
            return t - (left - right) / slope

        t = lax.fori_loop(0, _SCALAR_STEPS, newton, x - log_base, unroll=True)
        return log_base + t, base * jnp.exp(t)

    def body(s: _Newton) -> _Newton:
        curvature = diagonal * s.v + beta * s.right
        theta = jnp.sqrt(s.v / curvature)
        factor = jnp.linalg.cholesky(off * theta[:, None] * theta[None, :] + jnp.eye(K, dtype=dtype))
        dv = theta * jsl.cho_solve((factor, True), theta * (s.right - s.left))
        others, excess = off @ (s.v + dv), s.left - s.right + off @ dv
        slope = jnp.abs(jnp.sum(s.v * (s.left - s.right) * excess / curvature))
        near = (s.residual < (_NEAR + 2 * beta) * eps) | jnp.all((1 + beta) * jnp.abs(dv) <= _SMALL * s.v)
        length = jnp.where(near, 1, s.length)

        x, v = solve_rows(s.x, s.v, others - (1 - length) * excess)
        left, right = sides(x, v)
        flat = -jnp.sum(v * (left - right) * excess / (diagonal * v + beta * right)) <= slope / 2
        u = jnp.where(rows, v, 0)
        longer = jnp.sum(u * right) / jnp.maximum(jnp.sum(u * left), shift(gramian) * jnp.sum(u * u))
        longer = jnp.where(rows & ~near & (longer > 1) & jnp.isfinite(longer), longer, 1)
        stretch = jnp.log(longer) / (1 + beta)
        x, v = x + stretch, v * jnp.exp(stretch)
        left, right = left * jnp.exp(stretch), right * jnp.exp(-beta * stretch)
        residual = residual_of(v, left, right)

        taken = (residual < jnp.where(flat, 1.5, 0.9) * s.residual) | near | (length <= _SMALLEST_STEP)
        better = residual < s.best
        moved = _Newton(
            x=x,
            v=v,
            left=left,
            right=right,
            residual=residual,
            length=jnp.ones_like(s.length),
            best_v=jnp.where(better, v, s.best_v),
            best=jnp.where(better, residual, s.best),
            stalled=jnp.where(residual < s.best / 2, 0, jnp.where(near, s.stalled + 1, s.stalled)),
            steps=s.steps,
        )
        after = jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, s._replace(length=length / 2))
        return after._replace(steps=s.steps + 1)

    def going(s: _Newton) -> Array:
        return (s.best > 2 * eps) & (s.stalled < _PATIENCE)

    alike = jnp.maximum(diagonal + off[0, 1], shift(gramian)) if K == 2 else jnp.asarray(diagonal, dtype)
    x = (log_p - jnp.log(alike)) / (1 + beta)  # of two rows with equal p, the solution
    v = jnp.exp(x)
    left, right = sides(x, v)
    residual = residual_of(v, left, right)
    one, zero = jnp.ones((), dtype), jnp.asarray(0)
    start = _Newton(x, v, left, right, residual, one, v, residual, zero, zero)
    end = lax.while_loop(lambda s: going(s) & (s.steps < max_steps), body, start)
    unit = smallest ** ((1 - beta) / (1 + beta))
    return solution(end.best_v * unit * inverse, end.best, end.steps, going(end))
