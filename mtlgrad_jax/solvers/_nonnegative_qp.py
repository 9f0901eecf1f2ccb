r"""Non-negative quadratic programs, the engine of the min-norm, dual-cone and max-min problems.

    min_{x >= 0}  x^T Q x / 2 - q^T x          Q positive semidefinite, K×K

The optimality conditions are a linear complementarity problem: x >= 0, Qx - q >= 0, x^T (Qx - q) = 0. Once the positive
variables (the passive set) are known, only a linear system is left. For few tasks, all sets are tried at once
(`_active_sets`); `max_steps` limits the search that follows, for more tasks. From a good guess, exchanging all
variables with the wrong sign at once (block principal pivoting, Portugal, Judice & Vicente 1994) finds the set in a few
steps. If it cycles, an interior-point method provides the guess; if it cycles again, only the last violated variable is
exchanged (Murty 1974), which cannot cycle. The interior-point method solves for Q + qq^T, whose solution x/(1 + q^T x)
stays moderate even if x is large.

Q is first scaled to unit diagonal, so that weights are equally accurate for gradients that differ by orders of
magnitude. Singular Q are handled by the proximal point method: the diagonal is shifted by (K + SHIFT) eps, and the
solve on the passive set is repeated to remove the bias of the shift. Rounding lets a long x along which Q vanishes meet
the conditions even if q^T x < 0; a solution has q^T x = x^T Q x >= 0, so from such a point the search starts again.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax.solvers._active_sets import REPEATS, by_sets, for_few
from mtlgrad_jax.solvers._interior_point import interior_point
from mtlgrad_jax.solvers._solution import SHIFT, Solution, inverse_sqrt, shift, solution

MAX_STEPS = 100  # the Gramians in the tests take less than two thirds of this, whatever K
_PATIENCE = 4  # exchanges without fewer violations before they count as a cycle


class _Exchange(NamedTuple):
    """State of the exchanges."""

    passive: Bool[Array, " K"]
    fewest: Int[Array, ""]  # fewest violations so far
    patience: Int[Array, ""]
    y: Float[Array, " K"]  # point with the least residual so far
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def nonnegative_qp(
    Q: Float[Array, "K K"],
    q: Float[Array, " K"],
    allowed: Bool[Array, " K"],
    max_steps: int = MAX_STEPS,
    *,
    start: Float[Array, " K"] | None = None,
    passive: Bool[Array, " K"] | None = None,
) -> tuple[Solution, Bool[Array, " K"]]:
    """Solve the program above.

    Args:
      Q: symmetric, positive semidefinite up to rounding.
      q: linear term.
      allowed: the other variables are held at zero.
      max_steps: maximum number of factorisations of a search, and of the interior-point method if that gives up. Few
        tasks need neither.
      start: a point near the solution, for the search.
      passive: a guess of the passive set, used without `start`.

    Returns:
      The solution and its passive set.
    """
    known = jnp.all(jnp.isfinite(Q)) & jnp.all(jnp.isfinite(q))
    d = inverse_sqrt(jnp.diagonal(Q))
    allowed = allowed & (d > 0)
    C, q = masked(Q * d[:, None] * d[None, :], allowed), jnp.where(allowed, q * d, 0)
    size = jnp.max(jnp.maximum(q, 0))
    size = jnp.where(size > 0, size, 1)
    q = q / size
    y = jnp.zeros_like(q) if start is None else jnp.where(allowed, start / jnp.where(d > 0, d * size, 1), 0)
    guess = passive if passive is not None else (q if start is None else y) > 0
    search = partial(_search, max_steps=max_steps)
    y, residual, steps = for_few(len(C), _every_set, search, C, q, allowed, y, guess)
    residual = jnp.where(known, residual, jnp.nan)
    return solution(d * y * size, residual, steps, residual > 4 * _accuracy(C)), y > 0


def _accuracy(C: Float[Array, "K K"]) -> float:
    """Return the rounding error of a product with C."""
    return (SHIFT + len(C) ** 0.5) * float(jnp.finfo(C.dtype).eps)


def _residual(C: Float[Array, "K K"], q: Float[Array, " K"], y: Float[Array, " K"]) -> Float[Array, ""]:
    slack = C @ y - q
    worst = jnp.max(jnp.where(y > 0, jnp.abs(slack), jnp.maximum(-slack, 0)))
    return worst / jnp.maximum(jnp.max(y), 1)


def _rise(q: Float[Array, " K"], y: Float[Array, " K"]) -> Float[Array, ""]:
    return -(q @ y) / jnp.maximum(jnp.max(y), 1)


def _every_set(
    C: Float[Array, "K K"], q: Float[Array, " K"], allowed: Bool[Array, " K"], *_: Array
) -> tuple[Float[Array, " K"], Float[Array, ""], Int[Array, ""]]:
    """Return the shortest point that meets the conditions, or else that with the least residual; its residual; 1."""
    points = jnp.maximum(jnp.concatenate(by_sets(C, allowed)(q[None, :, None]))[:, :, 0], 0)
    residuals = jax.vmap(lambda y: jnp.maximum(_residual(C, q, y), _rise(q, y)))(points)
    residuals = jnp.where(jnp.isfinite(residuals), residuals, jnp.inf)
    solves = residuals <= _accuracy(C) / 4
    lengths = jnp.where(solves, jnp.max(points, axis=1), jnp.inf)
    best = jnp.argmin(jnp.where(jnp.any(solves), lengths, residuals))
    return points[best], residuals[best], jnp.asarray(1)


def _search(
    C: Float[Array, "K K"],
    q: Float[Array, " K"],
    allowed: Bool[Array, " K"],
    y: Float[Array, " K"],
    guess: Bool[Array, " K"],
    *,
    max_steps: int,
) -> tuple[Float[Array, " K"], Float[Array, ""], Int[Array, ""]]:
    """Return the solution, its residual and the factorisations taken, from a point and a guess of the passive set."""
    accuracy = _accuracy(C)

    def exchange(e: _Exchange) -> _Exchange:
        factor = jnp.linalg.cholesky(masked(C, e.passive) + jnp.diag(jnp.where(e.passive, shift(C), 1)))

        def solve(rhs: Array) -> Array:
            return jnp.where(e.passive, jsl.cho_solve((factor, True), jnp.where(e.passive, rhs, 0)), 0)

        target = solve(q + shift(C) * jnp.where(e.passive, e.y, 0))
        tolerance = accuracy * jnp.maximum(jnp.max(jnp.abs(target)), 1)
        wrong = jnp.where(e.passive, target < -tolerance, allowed & (C @ target - q < -tolerance))
        count = jnp.sum(wrong)
        refined = target
        for _ in range(REPEATS):
            refined = refined + solve(q - C @ refined)
        y, residual = e.y, e.residual
        for candidate in (target, refined):
            candidate = jnp.maximum(candidate, 0)
            found = _residual(C, q, candidate)
            y, residual = jnp.where(found < residual, candidate, y), jnp.minimum(found, residual)
        patience = jnp.where(count < e.fewest, _PATIENCE, e.patience - 1)
        single = wrong & (jnp.arange(len(q)) == len(q) - 1 - jnp.argmax(wrong[::-1]))
        return _Exchange(
            passive=e.passive ^ jnp.where(patience > 0, wrong, single),
            fewest=jnp.minimum(count, e.fewest),
            patience=patience,
            y=y,
            residual=residual,
            steps=e.steps + 1,
            done=(count == 0) | (residual <= accuracy / 4),
        )

    def pivot(passive: Array, y: Array, steps: Array, done: Array, least_patience: int) -> _Exchange:
        best = jnp.where(passive, y, 0)
        start = _Exchange(
            passive, jnp.asarray(len(q) + 1), jnp.asarray(_PATIENCE), best, _residual(C, q, best), steps, done
        )
        return lax.while_loop(
            lambda e: ~e.done & (e.patience > least_patience) & (e.steps < max_steps), exchange, start
        )

    first = pivot(allowed & guess, y, jnp.asarray(0), jnp.asarray(False), 0)
    first = first._replace(residual=jnp.maximum(first.residual, _rise(q, first.y)))
    good = (first.residual <= accuracy) | (first.steps >= max_steps)

    bounded = C + q[:, None] * q[None, :]

    def judge(x: Array) -> tuple[Array, Array]:
        """Return how far a point is from separating zero variables from zero slacks."""
        residual = jnp.max(jnp.abs(jnp.minimum(x, bounded @ x - q)))
        return residual, good | (residual <= jnp.finfo(C.dtype).eps)

    def restart() -> _Exchange:
        x, _, steps = interior_point(bounded, q, allowed, allowed.astype(C.dtype), judge, max_steps)
        inside, y = x > jnp.maximum(bounded @ x - q, 0), x / jnp.maximum(1 - q @ x, jnp.finfo(C.dtype).eps)
        second = pivot(inside, y, jnp.minimum(first.steps + steps, max_steps - 1), good, -max_steps)
        better = second.residual < first.residual
        return second._replace(
            y=jnp.where(better, second.y, first.y), residual=jnp.where(better, second.residual, first.residual)
        )

    # Under vmap both branches run; `good` then stops the loops of the restart at once.
    found = lax.cond(good, lambda: first, restart)
    return found.y, found.residual, found.steps


def masked(matrix: Float[Array, "K K"], rows: Bool[Array, " K"]) -> Float[Array, "K K"]:
    """Return the matrix with all other rows and columns set to zero."""
    return jnp.where(rows[:, None] & rows[None, :], matrix, 0)
