r"""The direction in a cone around the mean gradient that improves the worst-off task most (ConicGrad).

    max_u min_i <g_i, u>   subject to   ||u|| <= 1,  <g_0, u> >= c ||g_0|| ||u||,      g_0 the mean gradient

With a multiplier m >= 0 for the cone, the optimal u is that of max_u min_i <g_i + m g_0, u> over the ball: the
direction of the min-norm point of the gradients shifted by m g_0. Its cosine with g_0 grows with m, so a single number
is left: m = 0 if MGDA's direction lies inside the cone, else the m at which the cosine is c. As long as the same tasks
have nonzero weight, the min-norm point is linear in m, and the root between two such points is that of a quadratic.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax._core.control import once
from mtlgrad_jax.solvers._min_norm import min_norm
from mtlgrad_jax.solvers._solution import (
    INFEASIBLE,
    Solution,
    compiled,
    inverse_sqrt,
    normalized,
    shift,
    smallest_row,
    solution,
)

_MAX_STEPS = 100


@compiled("max_steps")
def conic_direction(
    gramian: Float[Array, "K K"], c: Float[Array, ""], present: Bool[Array, " K"], *, max_steps: int = _MAX_STEPS
) -> Solution:
    """Return w such that G^T w is the optimal direction with the norm of g_0; if none descends all tasks, g_0.

    Args:
      gramian: inner products of the rows, zero for rows that are not present.
      c: cosine of the cone's half-angle, in [0, 1).
      present: rows that take part, also in the mean.
      max_steps: maximum number of min-norm points computed.
    """
    M = normalized(gramian)
    mean = present / jnp.maximum(jnp.sum(present), 1).astype(M.dtype)
    n, least = jnp.sqrt(jnp.maximum(jnp.diagonal(M), 0)), jnp.sqrt(smallest_row(M, present))

    def rounding(k: Array) -> Array:
        """Return the size of rounding errors in M k, relative to the rows' norms."""
        return shift(M) * (n @ k) / len(M)

    products = M @ mean  # with g_0
    square = mean @ products
    square = jnp.where(square > rounding(mean) * (n @ mean), square, 0)  # if g_0 cancels, it has no direction
    length = jnp.sqrt(square)

    def point(multiplier: Array) -> tuple[Array, Solution]:
        """Return the coefficients of the min-norm point of the shifted gradients."""
        moved = M + multiplier * (products[:, None] + products[None, :]) + multiplier**2 * square
        solved = min_norm(moved, present)
        return solved.value + multiplier * mean, solved

    def excess(k: Array) -> Array:
        """Return how far inside the cone the direction is, negative outside and zero for no direction."""
        return k @ products - c * length * jnp.sqrt(jnp.maximum(k @ M @ k, 0))

    def crossing(low: Array, high: Array) -> Array:
        """Return the share of `high` in the mixture of a point outside and one inside that lies on the cone."""
        step = high - low
        a, b = low @ products, step @ products
        scale = (c * length) ** 2
        q2 = b * b - scale * (step @ M @ step)
        q1 = a * b - scale * (low @ M @ step)
        q0 = a * a - scale * (low @ M @ low)
        root = jnp.sqrt(jnp.maximum(q1 * q1 - q2 * q0, 0))
        shares = jnp.stack([-q0 / _nonzero(q1 + root), -q0 / _nonzero(q1 - root)])
        valid = (shares >= 0) & (shares <= 1) & (a + shares * b >= 0)
        return jnp.where(jnp.any(valid), jnp.min(jnp.where(valid, shares, 1)), 0.5)

    def body(carry: tuple) -> tuple:
        low, low_point, high, high_point, steps, *_ = carry
        first = steps == 0  # the direction of MGDA
        share = crossing(low_point, high_point)
        # Bisect in the logarithm.
        middle = jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), high / 64)
        between = jnp.where(steps % 3 == 2, middle, low + share * (high - low))
        multiplier = jnp.where(first, 0, between)
        found, solved = point(multiplier)
        over = once(excess(found))  # the flags below must agree on it
        # A root that rounds to `low`, which is already known, is close enough.
        close = (jnp.abs(over) <= accuracy * jnp.maximum(found @ products, 0)) | (multiplier <= low)
        hidden = over >= -rounding(found) * (n @ mean)  # for c = 0, only rounding can put it outside
        inside = (over >= 0) | jnp.where(first, hidden | undefined, close)
        low, low_point = jnp.where(inside, low, multiplier), jnp.where(inside, low_point, found)
        high_point = jnp.where(inside, found, jnp.where(first, found + high * mean, high_point))
        high = jnp.where(inside, multiplier, high)
        # sqrt(k M k) - m c ||g_0|| bounds the value from above: here no direction descends all tasks.
        size = jnp.sqrt(jnp.maximum(found @ M @ found, 0))
        bound = size * (size - multiplier * c * length)
        none = bound <= rounding(found) * least
        done = jnp.where(first, inside, close | none | (high - low <= accuracy * high))
        return low, low_point, high, high_point, steps + 1, done, solved.residual.astype(M.dtype), solved.result

    accuracy = 4 * jnp.finfo(M.dtype).eps
    undefined = (length == 0) | jnp.any(present & (jnp.diagonal(M) <= 0))
    far = (1 + c) / (1 - c) * inverse_sqrt(square[None])[0]  # always inside beyond this: row norms are at most 1
    zero = jnp.zeros((), M.dtype)
    start = (zero, mean, far, mean, jnp.asarray(0), jnp.asarray(False), zero, jnp.asarray(0))
    end = lax.while_loop(lambda carry: ~carry[5] & (carry[4] < max_steps), body, start)
    k, steps, done, residual, result = end[3:]
    size = jnp.sqrt(jnp.maximum(k @ M @ k, 0))
    serves = (size > 0) & jnp.all(~present | (M @ k > rounding(k) * n))
    direction = k * length / jnp.where(size > 0, size, 1)
    answer = solution(jnp.where(serves, direction, mean), residual, steps, ~done | (result > 0))
    return answer._replace(result=jnp.where(serves | (length == 0) | ~done, answer.result, INFEASIBLE))


def _nonzero(value: Array) -> Array:
    return jnp.where(value == 0, jnp.finfo(value.dtype).tiny, value)
