r"""The direction near a reference that improves the worst-off task most (CAGrad).

    max_d min_i <g_i, d>   subject to   ||d - g_0|| <= C,      g_0 the mean gradient

Let tau be the value. The nearest d that reaches a given tau is d = g_0 + sum_i t_i g_i, where t >= 0 solves
min t^T M t / 2 + (b - tau 1)^T t with b = M 1 / K. This leaves a single unknown: the tau at which ||G^T t|| = C. With
tau = rho - s 1^T t and s 11^T added to M, the program is bounded for every rho, and t is well conditioned even for
nearly opposite gradients. Either way t is piecewise linear, and ||G^T t|| grows with rho. On each piece the root is
that of a quadratic: a Newton method on rho, kept inside a bracket, ends after a few pieces. For few tasks, all pieces
are tried at once.

Nearly opposite gradients need a large t for a short d - g_0, and t^T M t then suffers from cancellation. So the squared
length is taken as t^T M t + blur (sum_i t_i ||g_i||)^2, where blur bounds the rounding of M: the true d stays in the
ball. For Pareto-stationary gradients only the blur term grows, and tau = 0 is the optimum: the answer is the d nearest
g_0 that reaches it. The answer is the best of the points found, judged by the duality gap: every w on the simplex
bounds tau by b^T w + C ||G^T w||, and the t of the optimum is a multiple of the best w.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax._core.control import once
from mtlgrad_jax.solvers._active_sets import by_sets, for_few
from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, masked, nonnegative_qp
from mtlgrad_jax.solvers._solution import Solution, compiled, inverse_sqrt, normalized, shift, smallest_row, solution

_MAX_PIECES = 41  # with the first, tau = 0
_GROWTH = 16  # limit on the growth of rho in one step
_BLUR = 2  # in eps of (sum_i t_i ||g_i||)^2: how much rounding may change ||G^T t||^2
_ENOUGH = 128  # in eps: a duality gap that counts as solved


@compiled("max_steps")
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
      present: rows that take part, also in the mean.
      max_steps: maximum number of factorisations in each of the quadratic programs of a search.
    """
    M, count = normalized(gramian), jnp.maximum(jnp.sum(present), 1)
    n = jnp.sqrt(jnp.maximum(jnp.diagonal(M), 0))
    b = jnp.sum(M, axis=1) / count
    blur = _BLUR * jnp.finfo(M.dtype).eps
    C = radius * jnp.sqrt(jnp.maximum(jnp.sum(b) / count - blur * (jnp.sum(n) / count) ** 2, 0))
    program = _Program(M, M + blur * n[:, None] * n[None, :], b, n, C, present)
    if len(M) == 1:
        return program.answer(C * inverse_sqrt(n**2), jnp.zeros_like(b), jnp.asarray(0))
    if len(M) == 2:
        return program.answer(_pair(program), _nearest_of_two(program), jnp.asarray(0))
    t, nearest, steps = for_few(len(M), _every_piece, partial(_search, max_steps=max_steps), program)
    return program.answer(t, nearest, steps)


class _Program(NamedTuple):
    """The problem, with its Gramian divided by the largest squared norm."""

    M: Float[Array, "K K"]
    N: Float[Array, "K K"]  # M plus the blur
    b: Float[Array, " K"]  # <g_i, g_0>
    n: Float[Array, " K"]  # ||g_i||
    C: Float[Array, ""]
    present: Bool[Array, " K"]

    def norm(self, t: Array) -> Array:
        """Return ||G^T t|| including the blur, an upper bound."""
        return jnp.sqrt(jnp.maximum(t @ self.N @ t, 0))

    def value(self, t: Array, rounding: float = 0) -> Array:
        """Return tau, the inner product of the worst-off task, or with the relative `rounding` a lower bound on it."""
        products = self.b + self.M @ t - rounding * (jnp.abs(self.M) @ t)
        return jnp.min(jnp.where(self.present, products, jnp.inf))

    def inside(self, t: Array) -> Array:
        """Return a multiple of t in the ball; half of the blur is a margin for rounding here."""
        half = _BLUR / 2 * jnp.finfo(t.dtype).eps
        norm = jnp.sqrt(jnp.maximum(t @ self.N @ t - half * (self.n @ t) ** 2, 0))
        return t * jnp.where(norm <= self.C, 1, self.C / jnp.where(norm == 0, 1, norm))

    def ahead(self, t: Array, q: Array) -> Array:
        """Return h with ||G^T (t + h q)|| = C, a root of a quadratic."""
        reach = self.norm(t)
        a2, a1, a0 = jnp.maximum(q @ self.N @ q, 0), t @ self.N @ q, (reach - self.C) * (reach + self.C)
        root = jnp.sqrt(jnp.maximum(a1 * a1 - a2 * a0, 0))
        return jnp.where(a1 > 0, -a0 / jnp.where(a1 > 0, a1 + root, 1), (root - a1) / jnp.where(a2 > 0, a2, 1))

    def better(self, t: Array, other: Array, rounding: float = 0) -> Array:
        """Return the point in the ball that improves the worst-off task more, or `other` if that may be rounding."""
        t, other = self.inside(t), self.inside(other)
        return jnp.where(self.value(t, rounding) > self.value(other, -rounding), t, other)

    def gap(self, t: Array, best: Array) -> Array:
        """Return the duality gap between a point and the w that t is a multiple of, relative to the terms of tau."""
        total, count = jnp.sum(t), jnp.maximum(jnp.sum(self.present), 1)
        w = t / jnp.where(total > 0, total, 1)
        hidden = 2 * _BLUR * jnp.finfo(t.dtype).eps * (self.n @ w) ** 2
        bound = jnp.where(total > 0, self.b @ w, jnp.inf) + self.C * jnp.sqrt(jnp.maximum(w @ self.M @ w - hidden, 0))
        bound = jnp.minimum(bound, jnp.min(jnp.where(self.present, self.b + self.C * self.n, jnp.inf)))
        size = jnp.max(jnp.abs(self.M) @ t) + jnp.sum(self.n**2) / count
        gap = jnp.maximum(bound - self.value(best), 0) / jnp.where(size > 0, size, 1)
        return jnp.where(jnp.any(self.present), gap, 0)

    def answer(self, t: Array, nearest: Array, steps: Int[Array, ""]) -> Solution:
        """Return t, or the nearest point if t does not improve the worst-off task more, with the duality gap."""
        eps = float(jnp.finfo(self.M.dtype).eps)
        best = self.better(t, nearest, 4 * eps)
        gap = self.gap(t, best)
        return solution(best, gap, steps, gap > _ENOUGH * eps)


class _Search(NamedTuple):
    """State of the search for rho."""

    low: Array  # ||G^T t|| <= C here
    high: Array  # ||G^T t|| > C here
    ends: tuple[Array, Array]  # ||G^T t|| at low and high
    inner: Array  # t at low
    rho: Array  # next value to try
    t: Array  # t at the last value tried
    ahead: Array  # t of length C, if it lies on the same piece
    nearest: Array  # t at tau = 0, if it lies in the ball
    steps: Array
    pieces: Array  # values tried
    done: Array


def _search(program: _Program, *, max_steps: int) -> tuple[Array, Array, Array]:
    """Return the best point found, the nearest one to g_0 without conflicts if it lies in the ball, and the steps."""
    M, _, b, n, C, present = program
    eps, inverse = jnp.finfo(M.dtype).eps, inverse_sqrt(jnp.diagonal(M))
    rows = present & (inverse > 0)
    worst = jnp.argmin(jnp.where(rows, b, jnp.inf))
    lowest = jnp.where(jnp.any(rows), b[worst], 0)
    offset = smallest_row(M, rows)
    Q = M + offset
    alone = lowest + Q[worst, worst] * C * inverse[worst]  # rho if only the worst row is needed

    def choose(s: _Search, newton: Array, first: Array) -> Array:
        """Return the next rho: Newton's point if inside the bracket, else the secant's or the middle."""
        bounded = jnp.isfinite(s.high)
        secant = s.low + (s.high - s.low) * (C - s.ends[0]) / jnp.where(bounded, s.ends[1] - s.ends[0], 1)
        middle = jnp.where(s.low > 0, jnp.sqrt(s.low) * jnp.sqrt(s.high), (s.low + s.high) / 2)
        other = jnp.where((s.pieces % 2 == 0) & (secant > s.low) & (secant < s.high), secant, middle)
        limit = jnp.where(first, jnp.inf, s.rho + _GROWTH * (s.rho - lowest))
        # Below C and without an upper bound, a step as small as rounding is no progress.
        inside = (newton > s.low + jnp.where(bounded, 0, 16 * eps * jnp.abs(s.low))) & (newton < s.high)
        other = jnp.where(bounded, other, jnp.where(first, jnp.maximum(alone, s.rho), limit))
        return jnp.where(inside, jnp.where(bounded, newton, jnp.minimum(newton, limit)), other)

    def look(s: _Search) -> _Search:
        """Try a value; the first is tau = 0, without the offset."""
        first = s.pieces == 0
        solved, passive = nonnegative_qp(jnp.where(first, M, Q), s.rho - b, rows, max_steps, passive=s.t > 0)
        t = solved.value
        reach, rho = program.norm(t), jnp.where(first, offset * jnp.sum(t), s.rho)
        over = reach > C
        q = _masked_solve(Q, passive, jnp.ones_like(b))
        h = program.ahead(t, q)
        low, high = jnp.where(over, s.low, rho), jnp.where(over, rho, s.high)
        closed = jnp.isfinite(high) & (high - low <= 2 * eps * jnp.maximum(jnp.abs(high), jnp.abs(low)))
        hit = jnp.abs(reach - C) * (reach + C) <= 32 * eps * C**2 + eps * (n @ t) ** 2
        found = _Search(
            low=low,
            high=high,
            ends=(jnp.where(over, s.ends[0], reach), jnp.where(over, reach, s.ends[1])),
            inner=jnp.where(over, s.inner, t),
            rho=rho,
            t=t,
            ahead=jnp.maximum(t + h * q, 0),
            nearest=jnp.where(first & (reach < C), t, s.nearest),
            steps=s.steps + solved.steps + 1,
            pieces=s.pieces + 1,
            done=(hit | closed) & ~first,
        )
        newton = jnp.where(first & ~jnp.any(t > 0), alone, rho + h)
        return found._replace(rho=choose(found, newton, first))

    none = jnp.zeros_like(b)
    zero, infinity = (jnp.asarray(value, b.dtype) for value in (0, jnp.inf))
    begin = _Search(
        low=lowest,
        high=infinity,
        ends=(zero, infinity),
        inner=none,
        rho=zero,
        t=jnp.maximum(-b, 0),  # a guess of the passive set
        ahead=none,
        nearest=none,
        steps=jnp.asarray(0),
        pieces=jnp.asarray(0),
        done=(C <= 0) | ~jnp.any(rows),
    )
    end = lax.while_loop(lambda s: ~s.done & (s.pieces < _MAX_PIECES), look, begin)
    excess = program.norm(end.t) - C
    back = jnp.where(excess > 0, excess / jnp.where(excess > 0, excess + C - program.norm(end.inner), 1), 0)
    return program.better(end.ahead, end.t + back * (end.inner - end.t)), end.nearest, end.steps


def _every_piece(program: _Program) -> tuple[Array, Array, Array]:
    """Return what `_search` does: of the points t = rho q + r with ||G^T t|| = C, one per piece, the best."""
    M, _, b, _, C, present = program
    rows = present & (jnp.diagonal(M) > 0)
    Q = M + smallest_row(M, rows)
    d = inverse_sqrt(jnp.diagonal(Q)) * rows
    solve = by_sets(masked(Q, rows) * d[:, None] * d[None, :], rows)

    def solved(rhs: Array) -> Array:
        return d[None, :, None] * solve(d[None, :, None] * rhs)[-1]

    q, t = jnp.moveaxis(solved(jnp.stack([jnp.ones_like(b), -b], axis=1)[None]), 2, 0)
    rho = jax.vmap(program.ahead)(t, q)
    t = solved((rho[:, None] - b[None])[:, :, None])[:, :, 0]  # more precise than their sum
    points = jax.vmap(program.inside)(jnp.maximum(t + jax.vmap(program.ahead)(t, q)[:, None] * q, 0))
    points = once(points)  # on a singular set rounding decides: what is judged must be what is returned
    gaps = jax.vmap(lambda t: program.gap(t, t))(points)
    t = points[jnp.argmin(jnp.where(jnp.isfinite(gaps), gaps, jnp.inf))]
    near = nonnegative_qp(M, -b, rows)[0].value
    return t, jnp.where(program.norm(near) < C, near, 0), jnp.asarray(2)


def _masked_solve(Q: Array, rows: Array, rhs: Array) -> Array:
    """Solve Q x = rhs on some rows, shifted and scaled like the systems of the quadratic program."""
    d = jnp.where(rows, inverse_sqrt(jnp.diagonal(Q)), 0)
    factor = jnp.linalg.cholesky(masked(Q, rows) * d[:, None] * d[None, :] + jnp.diag(jnp.where(rows, shift(Q), 1)))
    return d * jsl.cho_solve((factor, True), d * rhs)


def _pair(program: _Program) -> Array:
    """Solve for two rows: d is a multiple of the perpendicular from 0 to their line, or g_0 moved along one of them."""
    (M, _, _, n, C, present), half = program, jnp.full(2, 0.5, program.M.dtype)
    square = M[0, 0] + M[1, 1] - 2 * M[0, 1]  # squared distance of the rows
    across = jnp.stack([M[1, 1] - M[0, 1], M[0, 0] - M[0, 1]])
    foot = jnp.where(square > 0, across / jnp.where(square > 0, square, 1), half)
    length, along = program.norm(foot), (foot[0] - foot[1]) ** 2 * square / 4  # g_0 lies on the line too
    multiple = 1 + jnp.sqrt(jnp.maximum(C**2 - along, 0)) / jnp.where(length > 0, length, 1)
    both = jnp.maximum(multiple * foot - half, 0) * present
    alone = jnp.diag(C * inverse_sqrt(n**2) * present)
    return program.better(both, program.better(*alone))


def _nearest_of_two(program: _Program) -> Array:
    """Solve for two rows: remove the conflict of g_0 with one of them; it cannot conflict with both."""
    inverse = inverse_sqrt(program.n**2)
    return jnp.maximum(-program.b, 0) * inverse * inverse
