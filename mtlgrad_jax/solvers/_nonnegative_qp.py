r"""Non-negative quadratic programs, the engine of the min-norm, dual-cone and max-min problems.

    min_{x >= 0}  x^T Q x / 2 - q^T x          Q positive semidefinite, K×K

The optimality conditions are a linear complementarity problem: x >= 0, Qx - q >= 0, x^T (Qx - q) = 0. Which
variables are positive (the passive set) is found by exchanging all that violate their sign at once (block principal
pivoting, Portugal, Judice & Vicente 1994; a handful of steps), and where that stops making progress by a primal
active-set method, which decreases the objective in every step and so cannot cycle (Lawson & Hanson 1974).

Q is scaled to unit diagonal first: weights of tasks whose gradients differ by orders of magnitude come out equally
well. Singular Q are handled by the proximal point method: the diagonal is shifted by (K + SHIFT) eps, approached
through larger shifts from which the passive set is warm-started, and the last solve is repeated to take the shift's
bias off.
"""

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, shift, solution

_SHIFTS = (1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-11)  # on the way to the last one
_PATIENCE = 3  # block exchanges without fewer violations before the active-set method takes over


def nonnegative_qp(
    Q: Float[Array, "K K"], q: Float[Array, " K"], allowed: Bool[Array, " K"], max_steps: int
) -> tuple[Solution, Bool[Array, " K"]]:
    """Solve the program above.

    Args:
      Q: symmetric, positive semidefinite up to rounding.
      q: linear term.
      allowed: variables outside are held at zero.
      max_steps: most factorisations.

    Returns:
      The solution and its passive set.
    """
    d = inverse_sqrt(jnp.diagonal(Q))
    allowed = allowed & (d > 0)
    C, q = Q * d[:, None] * d[None, :], q * d
    size = jnp.max(jnp.abs(q))
    size = jnp.where(size > 0, size, 1)
    q = q / size
    last = accuracy = shift(Q)

    def solve(passive: Array, rhs: Array, delta: Array) -> Array:
        factor = jnp.linalg.cholesky(masked(C, passive) + jnp.diag(jnp.where(passive, delta, 1)))
        return jnp.where(passive, jsl.cho_solve((factor, True), jnp.where(passive, rhs, 0)), 0)

    def stage(passive: Array, y: Array, steps: Array, delta: Array) -> tuple[Array, Array, Array, Array]:
        rhs = q + delta * y

        def body(carry: tuple) -> tuple:
            passive, y, fewest, patience, steps, _ = carry
            target = solve(passive, rhs, delta)
            tolerance = accuracy * jnp.maximum(jnp.max(jnp.abs(target)), 1)
            slack = jnp.where(passive | ~allowed, 0, C @ target - rhs)
            negative, violated = passive & (target < -tolerance), slack < -tolerance
            wrong = negative | violated
            count = jnp.sum(wrong)
            patience = jnp.where(count < fewest, _PATIENCE, patience - 1)
            # The active-set step: as far towards the target as y stays non-negative, else one variable enters.
            ratio = jnp.where(negative, y / jnp.where(negative, y - target, 1), jnp.inf)
            blocking = negative & (ratio <= jnp.min(ratio))
            length = jnp.minimum(jnp.min(ratio), 1)
            blocked = jnp.any(negative)
            entering = violated & (jnp.arange(len(q)) == jnp.argmin(slack))
            single = jnp.where(blocked, passive & ~blocking, passive | entering)
            stepped = jnp.where(passive & ~blocking, jnp.maximum(y + length * (target - y), 0), 0)
            block = patience > 0
            done = count == 0
            passive = jnp.where(done, passive, jnp.where(block, passive ^ wrong, single))
            y = jnp.where(blocked & ~block, stepped, jnp.maximum(target, 0))
            return passive, y, jnp.minimum(count, fewest), patience, steps + 1, done

        def going(carry: tuple) -> Array:
            return ~carry[-1] & (carry[-2] < max_steps)

        start = (passive, y, jnp.asarray(len(q) + 1), jnp.asarray(_PATIENCE), steps, jnp.asarray(False))
        passive, y, _, _, steps, done = lax.while_loop(going, body, start)
        return passive, y, steps, done

    def approach(carry: tuple, delta: Array) -> tuple[tuple, None]:
        passive, y, steps, _ = carry
        return stage(passive, y, steps, delta), None

    deltas = jnp.asarray([*(delta for delta in _SHIFTS if delta > 4 * last), last, last], Q.dtype)
    carry = (allowed & (q > 0), jnp.zeros_like(q), jnp.asarray(0), jnp.asarray(False))
    (passive, y, steps, done), _ = lax.scan(approach, carry, deltas)
    slack = C @ y - q
    residual = jnp.max(jnp.where(allowed, jnp.where(y > 0, jnp.abs(slack), jnp.maximum(-slack, 0)), 0))
    return solution(d * y * size, residual / jnp.maximum(jnp.max(y), 1), steps, ~done), passive


def masked(matrix: Float[Array, "K K"], rows: Bool[Array, " K"]) -> Float[Array, "K K"]:
    """Return a matrix whose other rows and columns are zero."""
    return jnp.where(rows[:, None] & rows[None, :], matrix, 0)


def step_limit(max_steps: int | None, num_tasks: int) -> int:
    """Return the most steps of a solve; ten per task suffice on every Gramian family of the tests."""
    return 10 * num_tasks + 50 if max_steps is None else max_steps
