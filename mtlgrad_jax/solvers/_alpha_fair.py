r"""The alpha-fair equation M w = w^(-1/alpha), w > 0 (FairGrad; Nash-MTL for alpha = 1).

It is the stationarity of the strictly convex  w^T M w / 2 - sum_i w_i^(1-1/alpha) / (1-1/alpha).  With w = v / n, n the
row norms, it reads  C v = p v^(-1/alpha)  for the cosines C and p = n^(1/alpha-1): the tasks' scales are out of the
matrix. Damped Newton on x = log v; a coordinate moves multiplicatively where it falls and additively where it rises,
so neither overshoots. The line search asks the derivative along the path, which rounding does not blur, not the value.

At a Pareto-stationary point the equation has no solution; the shift of the diagonal by SHIFT K eps then bounds w, and
G^T w is as small as the shift allows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Float

from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, shift, solution

_MAX_STEPS = 100
_SMALLEST_STEP = 1e-3
_PATIENCE = 3  # steps that do not halve the residual before it is taken for rounding


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
    log_norm = jnp.where(rows, -jnp.log(jnp.where(rows, inverse, 1)), 0)
    log_scale = jnp.max(jnp.where(rows, log_norm, -jnp.inf), initial=-jnp.inf)
    log_scale = jnp.where(jnp.isfinite(log_scale), log_scale, 0)
    diagonal = 1 + shift(gramian)
    off = gramian * inverse[:, None] * inverse[None, :] * (1 - jnp.eye(K, dtype=dtype))
    log_p = jnp.where(rows, (1 - beta) * (log_scale - log_norm), 0)

    def sides(x: Array) -> tuple[Array, Array, Array]:
        v = jnp.exp(x)
        return v, off @ v + diagonal * v, jnp.exp(log_p - beta * x)

    def residual_of(v: Array, left: Array, right: Array) -> Array:
        return jnp.max(jnp.abs(left - right) / (jnp.abs(off) @ v + v + right))

    def move(x: Array, dx: Array, length: Array) -> Array:
        return x + jnp.where(dx < 0, length * dx, jnp.log1p(length * jnp.maximum(dx, 0)))

    def body(carry: tuple) -> tuple:
        x, residual, best_x, best, stalled, steps, _ = carry
        v, left, right = sides(x)
        curvature = diagonal * v + beta * right
        theta = jnp.sqrt(v / curvature)
        factor = jnp.linalg.cholesky(off * theta[:, None] * theta[None, :] + jnp.eye(K, dtype=dtype))
        dv = theta * jsl.cho_solve((factor, True), theta * (right - left))
        # One Jacobi sweep gives dx = dv / v to full precision also where v underflows.
        dx = jnp.maximum((right - left - off @ dv) / curvature, -4 / beta)
        slope = jnp.abs(jnp.sum(v * (left - right) * dx))

        def too_long(length: Array) -> Array:
            v, left, right = sides(move(x, dx, length))
            speed = jnp.where(dx < 0, dx, dx / (1 + length * jnp.maximum(dx, 0)))
            flat = jnp.sum(v * (left - right) * speed) <= slope / 2
            return ~(flat | (residual_of(v, left, right) < 0.9 * residual)) & (length > _SMALLEST_STEP)

        length = lax.while_loop(too_long, lambda length: length / 2, jnp.ones((), dtype))
        x = move(x, dx, length)
        residual = residual_of(*sides(x))
        stalled = jnp.where(residual < best / 2, 0, stalled + 1)
        better = residual < best
        best_x, best = jnp.where(better, x, best_x), jnp.where(better, residual, best)
        done = (best <= 2 * eps) | ((best < 64 * K * eps) & (stalled >= _PATIENCE))
        return x, residual, best_x, best, stalled, steps + 1, done

    def going(carry: tuple) -> Array:
        return ~carry[-1] & (carry[-2] < max_steps)

    x = log_p / (1 + beta)
    start = residual_of(*sides(x))
    carry = (x, start, x, start, jnp.asarray(0), jnp.asarray(0), start <= 2 * eps)
    _, _, x, residual, _, steps, done = lax.while_loop(going, body, carry)
    w = jnp.where(rows, jnp.exp(x - (1 - beta) / (1 + beta) * log_scale - log_norm), 0)
    return solution(w, residual, steps, ~done)
