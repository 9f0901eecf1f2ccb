r"""A primal-dual interior-point method for quadratic programs with bounds and at most one equation.

    min_x  x^T C x / 2 - q^T x   subject to   x >= 0,  x <= cap,  sum x = 1          (the last two where a cap is given)

Mehrotra's predictor-corrector (1992). With the distance r to every bound (x itself and cap - x) and the bounds'
multipliers z, a Newton step on the optimality conditions takes one factorisation of C + diag(sum z/r). Scaling it to
unit diagonal keeps variables that differ by orders of magnitude equally accurate. Each iteration takes two such steps:
one to see how far the products r z can fall, one towards that with a second-order correction. It takes ten to forty
iterations, however ill-conditioned C is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax.solvers._solution import inverse_sqrt, shift

_TO_THE_WALL = 0.995  # fraction of the way to the nearest bound
_PATIENCE = 10  # steps that do not lower the products by a tenth before they count as rounding


class _Point(NamedTuple):
    """An interior point, with a row of room and of multipliers per kind of bound; all 1 for variables not allowed."""

    x: Float[Array, " K"]
    room: Float[Array, "bounds K"]
    multiplier: Float[Array, "bounds K"]
    best: Float[Array, " K"]  # x with the least residual so far
    residual: Float[Array, ""]
    products: Float[Array, ""]  # the least sum of all r z so far
    stalled: Int[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def interior_point(
    C: Float[Array, "K K"],
    q: Float[Array, " K"],
    allowed: Bool[Array, " K"],
    start: Float[Array, " K"],
    judge: Callable[[Array], tuple[Array, Array]],
    max_steps: int,
    *,
    cap: Float[Array, ""] | None = None,
) -> tuple[Float[Array, " K"], Float[Array, ""], Int[Array, ""]]:
    """Return the best point seen, its residual and the steps taken.

    Args:
      C: symmetric, positive semidefinite up to rounding, zero outside the allowed variables.
      q: linear term, zero outside the allowed variables.
      allowed: the other variables are held at zero.
      start: an interior point.
      judge: returns the residual of an x, and whether it is good enough.
      max_steps: maximum number of factorisations.
      cap: upper bound of every variable; the variables then sum to 1.
    """
    on, eps = allowed.astype(C.dtype), jnp.finfo(C.dtype).eps
    side = jnp.asarray([[1]] if cap is None else [[1], [-1]], C.dtype)  # direction in which each kind of bound pushes
    count = len(side) * jnp.maximum(jnp.sum(allowed), 1)

    def reach(values: Array, steps: Array) -> Array:
        """Return how far values may move along their steps, at most 1, before one becomes zero."""
        walls = jnp.where(steps < 0, values / jnp.where(steps < 0, -steps, 1), jnp.inf)
        return jnp.minimum(_TO_THE_WALL * jnp.min(walls), 1)

    def body(p: _Point) -> _Point:
        H = C + jnp.diag(jnp.sum(p.multiplier / p.room, axis=0))
        d = inverse_sqrt(jnp.diagonal(H))
        factor = jnp.linalg.cholesky(H * d[:, None] * d[None, :] + shift(C) * jnp.eye(len(C), dtype=C.dtype))

        def solve(rhs: Array) -> Array:
            return on * d * jsl.cho_solve((factor, True), on * d * rhs)

        descent = q - C @ p.x
        along = None if cap is None else solve(on)

        def newton(products: Array) -> tuple[Array, Array]:
            """Return steps of x and of the multipliers after which, to first order, r z equals `products`."""
            dx = solve(descent + jnp.sum(side * products / p.room, axis=0))
            if along is not None:
                dx += (1 - on @ p.x - jnp.sum(dx)) / jnp.sum(along) * along
            return dx, on[None] * ((products - p.multiplier * side * dx[None]) / p.room - p.multiplier)

        def left(dx: Array, dz: Array) -> tuple[Array, Array, Array]:
            """Return how far room and multipliers may move, and the sum of their products afterwards."""
            far, dual_far = reach(p.room, side * dx[None]), reach(p.multiplier, dz)
            return far, dual_far, jnp.sum(on[None] * (p.room + far * side * dx[None]) * (p.multiplier + dual_far * dz))

        now = jnp.sum(on[None] * p.room * p.multiplier)
        dx, dz = newton(jnp.zeros_like(p.room))
        target = (left(dx, dz)[2] / now) ** 3 * now / count
        dx, dz = newton(target - side * dx[None] * dz)
        far, dual_far, products = left(dx, dz)
        x = p.x + far * dx
        residual, enough = judge(on * x)
        better = residual < p.residual
        stalled = jnp.where(products < 0.9 * p.products, 0, p.stalled + 1)
        return _Point(
            x=x,
            room=p.room + far * side * dx[None],
            multiplier=p.multiplier + dual_far * dz,
            best=jnp.where(better, on * x, p.best),
            residual=jnp.where(better, residual, p.residual),
            products=jnp.minimum(products, p.products),
            stalled=stalled,
            steps=p.steps + 1,
            done=enough | (stalled >= _PATIENCE) | (products <= eps**2 * first.products),
        )

    slope = on * (C @ start - q)
    slope = slope if cap is None else on * (slope - slope @ start)
    wide = jnp.maximum(jnp.max(jnp.abs(slope)), jnp.max(jnp.diagonal(C)) / 1000) / 10
    residual, enough = judge(start)
    room = start[None] if cap is None else jnp.stack([start, cap - start])
    room = jnp.where(allowed, room, 1)
    multiplier = jnp.where(allowed, jnp.maximum(side * slope[None], 0) + wide, 1)
    first = _Point(
        x=jnp.where(allowed, start, 1),
        room=room,
        multiplier=multiplier,
        best=start,
        residual=residual,
        products=jnp.sum(on[None] * room * multiplier),
        stalled=jnp.asarray(0),
        steps=jnp.asarray(0),
        done=enough,
    )
    end = lax.while_loop(lambda p: ~p.done & (p.steps < max_steps), body, first)
    return end.best, end.residual, end.steps
