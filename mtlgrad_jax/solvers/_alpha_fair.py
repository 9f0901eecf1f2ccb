r"""The alpha-fair equation M w = w^(-1/alpha), w > 0 (FairGrad; Nash-MTL for alpha = 1).

It is the stationarity of the strictly convex  w^T M w / 2 - sum_i w_i^(1-1/alpha) / (1-1/alpha).  With w = v / n, n the
row norms, it reads  C v = p v^(-1/alpha)  for the cosines C and p = n^(1/alpha-1): the tasks' scales are out of the
matrix. Newton's method says what the other tasks will contribute to each row; each v_i then moves, in log v, to where
its own scalar equation holds with that, so that weights orders of magnitude off come right in one step. The line search
asks the derivative along the path, which rounding does not blur, not the value.

At a Pareto-stationary point the equation has no solution; the shift of the diagonal by (K + SHIFT) eps then bounds w,
and G^T w is as small as the shift allows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Float

from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, shift, solution

_MAX_STEPS = 200
_SMALLEST_STEP = 1e-3
_SCALAR_STEPS = 4  # Newton steps on the scalar equations
_NEAR = 64  # eps, below which the residual may be rounding, which no line search lowers
_PATIENCE = 4  # steps that do not halve the residual before it is taken for rounding


@partial(jax.jit, static_argnames="max_steps")
def alpha_fair(
    gramian: Float[Array, "K K"], alpha: Float[Array, ""] | float, *, max_steps: int = _MAX_STEPS
) -> Solution:
    """Return the solution of M w = w^(-1/alpha) on the rows that are not zero, and zero on those that are.

    Args:
      gramian: inner products of the rows.
      alpha: fairness, > 0. Weights below the smallest float, as large alpha asks for, come out as zero.
      max_steps: most factorisations.
    """
    dtype, K = gramian.dtype, gramian.shape[0]
    eps = jnp.finfo(dtype).eps
    beta = 1 / jnp.asarray(alpha, dtype)
    inverse = inverse_sqrt(jnp.diagonal(gramian))
    rows = inverse > 0
    smallest = jnp.min(jnp.where(rows, inverse, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    log_size = jnp.where(rows, -jnp.log(jnp.where(rows, inverse / smallest, 1)), 0)  # of the rows, 0 for the largest
    diagonal = 1 + shift(gramian)
    off = gramian * inverse[:, None] * inverse[None, :] * (1 - jnp.eye(K, dtype=dtype))
    log_p = (beta - 1) * log_size

    def sides(x: Array) -> tuple[Array, Array, Array]:
        v = jnp.exp(x)
        return v, off @ v + diagonal * v, jnp.exp(log_p - beta * x)

    def residual_of(v: Array, left: Array, right: Array) -> Array:
        return jnp.max(jnp.abs(left - right) / (jnp.abs(off) @ v + v + right))

    def solve_rows(x: Array, others: Array) -> Array:
        """Return the dx with `diagonal v + others = right` at x + dx: Newton on the difference of the sides' logs."""
        log_left, log_right = x + jnp.log(diagonal), log_p - beta * x
        log_plus, log_minus = jnp.log(jnp.maximum(others, 0)), jnp.log(jnp.maximum(-others, 0))

        def newton(_: Array | int, dx: Array) -> Array:
            left, right = jnp.logaddexp(log_left + dx, log_plus), jnp.logaddexp(log_right - beta * dx, log_minus)
            slope = jnp.exp(log_left + dx - left) + beta * jnp.exp(log_right - beta * dx - right)
            return dx - (left - right) / slope

        return lax.fori_loop(0, _SCALAR_STEPS, newton, jnp.zeros_like(x))

    def body(carry: tuple) -> tuple:
        x, residual, best_x, best, stalled, steps, _ = carry
        v, left, right = sides(x)
        curvature = diagonal * v + beta * right
        theta = jnp.sqrt(v / curvature)
        factor = jnp.linalg.cholesky(off * theta[:, None] * theta[None, :] + jnp.eye(K, dtype=dtype))
        dv = theta * jsl.cho_solve((factor, True), theta * (right - left))
        others, excess = off @ (v + dv), left - right + off @ dv
        slope = jnp.abs(jnp.sum(v * (left - right) * excess / curvature))
        near = residual < _NEAR * eps

        def move(length: Array) -> Array:
            return x + solve_rows(x, others - (1 - length) * excess)

        def too_long(length: Array) -> Array:
            v, left, right = sides(move(length))
            flat = -jnp.sum(v * (left - right) * excess / (diagonal * v + beta * right)) <= slope / 2
            return ~(flat | (residual_of(v, left, right) < 0.9 * residual)) & ~near & (length > _SMALLEST_STEP)

        length = lax.while_loop(too_long, lambda length: length / 2, jnp.ones((), dtype))
        x = move(length)
        residual = residual_of(*sides(x))
        stalled = jnp.where(residual < best / 2, 0, stalled + 1)
        better = residual < best
        best_x, best = jnp.where(better, x, best_x), jnp.where(better, residual, best)
        done = (best <= 2 * eps) | ((best < _NEAR * eps) & (stalled >= _PATIENCE))
        return x, residual, best_x, best, stalled, steps + 1, done

    def going(carry: tuple) -> Array:
        return ~carry[-1] & (carry[-2] < max_steps)

    x = log_p / (1 + beta)
    start = residual_of(*sides(x))
    carry = (x, start, x, start, jnp.asarray(0), jnp.asarray(0), start <= 2 * eps)
    _, _, x, residual, _, steps, done = lax.while_loop(going, body, carry)
    unit = jnp.exp((1 - beta) / (1 + beta) * jnp.log(smallest))
    return solution(jnp.exp(x) * unit * inverse, residual, steps, ~done)
