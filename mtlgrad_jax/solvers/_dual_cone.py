r"""Projection on the dual cone of K gradients: the direction nearest to u^T G that conflicts with none of them.

The projection of u^T G on {d : G d >= 0} is v^T G with v = argmin_{v >= u} v^T M v (Quinton & Rey 2024, Prop. 1).
With v = u + x this is the non-negative program Q = M, q = -M u, whose optimality conditions are the normal map

    C max(z, 0) + rho min(z, 0) = q,        x = max(z, 0),  slack = -rho min(z, 0),       for any rho > 0,

C being M scaled to unit diagonal. Douglas-Rachford splitting steps along (C + rho I)^-1 times its residual: one inverse
serves every right-hand side, and an iteration for all of them is a single product of K×K matrices. Some twenty find
which tasks conflict and solve all but the ill-conditioned problems. Where many are left over because the gradients
cancel, G^T v = 0 for some v > 0, the dual cone is their orthogonal complement, each projection zero, and v corrects
all of them. What is left then goes, one by one, to the exchanges of `_nonnegative_qp`, started from there. The
workspace is some ten K×K matrices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax.solvers._interior_point import interior_point
from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, nonnegative_qp
from mtlgrad_jax.solvers._solution import Solution, inverse_sqrt, shift, solution

_SWEEP = 8  # iterations from one look at the residual to the next
_RELAXATION = 1.8  # of at most 2
_RHO = 0.5
_BALANCING = 5  # sweeps in which rho follows the residuals; after them it is lowered, to where flat problems move
_LOWERING = 3  # sweeps from one lowering to the next
_LOWEST = 0.01
_MANY = 8  # columns left over, for which an interior point is worth its factorisations
_CANCELLED = 0.01  # largest entry of Cv over the least of v, from where a least-squares correction leaves v positive
_SOFT = 1e-3  # shift of that correction: smaller ones carry more rounding into the null space
_ENOUGH = 5  # times the residual aimed at is not worth the exchanges


@partial(jax.jit, static_argnames="max_steps")
def project_rows(
    gramian: Float[Array, "K K"], preference: Float[Array, " K"], *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return the weights of the sum of the projections of preference_i g_i (UPGrad), all solved together.

    Args:
      gramian: inner products of the rows.
      preference: non-negative weights of the rows before projection.
      max_steps: most sweeps of the splitting, and most factorisations for a right-hand side that it leaves over.
    """
    solved = _raise(gramian, jnp.diag(preference), max_steps)
    return solved._replace(value=solved.value.sum(axis=1))


@partial(jax.jit, static_argnames="max_steps")
def project_weights(
    gramian: Float[Array, "K K"], weights: Float[Array, " K"], *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return the weights of the projection of the weighted sum of the rows (DualProj).

    Args:
      gramian: inner products of the rows.
      weights: of the sum before projection, of any sign.
      max_steps: as in `project_rows`.
    """
    solved = _raise(gramian, weights[:, None], max_steps)
    return solved._replace(value=solved.value[:, 0])


def _raise(M: Float[Array, "K K"], U: Float[Array, "K R"], max_steps: int) -> Solution:
    """Return the weights of the projections of every column of U, (K, R); the other fields are the worst of all."""
    inverse = inverse_sqrt(jnp.diagonal(M))[:, None]
    C = M * inverse * inverse.T
    q = -C @ (U * jnp.where(inverse > 0, 1 / jnp.where(inverse > 0, inverse, 1), 0))
    if len(M) <= 2:
        return solution(jax.vmap(partial(_of_two, C, inverse[:, 0]), 1, 1)(U, q), jnp.zeros(()), 0, False)
    size = jnp.max(jnp.abs(q), axis=0, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    q = q / size
    split = _split(C, q, max_steps)
    many = jnp.sum(split.left) > _MANY
    split = lax.cond(many, lambda: _cancel(C, q, split, max_steps), lambda: split)
    y, residual, steps, failed = _finish(C, q, split, max_steps)
    return solution(U + y * size * inverse, jnp.max(residual), split.sweeps + steps, failed)


class _Splitting(NamedTuple):
    """State of the splitting, a column a right-hand side."""

    z: Float[Array, "K R"]
    rho: Float[Array, ""]
    inverse: Float[Array, "K K"]  # rho (C + rho I)^-1
    offset: Float[Array, "K R"]  # makes the step exact at the last look, whatever rounding the inverse has
    best: Float[Array, "K R"]  # solution so far, a column each from the sweep of its least residual
    residual: Float[Array, " R"]
    sweeps: Int[Array, ""]
    left: Bool[Array, " R"]


def _accuracy(C: Array) -> float:
    return (8 + len(C) / 16) * float(jnp.finfo(C.dtype).eps)


def _residual(C: Array, q: Array, y: Array) -> tuple[Array, Array]:
    """Return the slack, and for each column the larger of the worst conflict and the duality gap."""
    slack = C @ y - q
    return slack, jnp.maximum(jnp.max(-slack, axis=0), jnp.sum(y * jnp.abs(slack), axis=0))


def _split(C: Array, q: Array, max_steps: int) -> _Splitting:
    K, dtype, accuracy = len(C), C.dtype, _accuracy(C)
    most = min(4 + q.shape[1] // 3, max_steps)  # sweeps; each rho costs an inverse, which few columns do not pay for

    def inverse_at(rho: Array) -> Array:
        factor = jnp.linalg.cholesky(C + (shift(C) + rho) * jnp.eye(K, dtype=dtype))
        return jsl.cho_solve((factor, True), rho * jnp.eye(K, dtype=dtype))

    def sweep(s: _Splitting) -> _Splitting:
        def step(_: Array | int, z: Array) -> Array:
            return z - _RELAXATION * (jnp.maximum(z, 0) - s.inverse @ jnp.abs(z) - s.offset)

        before = lax.fori_loop(0, _SWEEP - 1, step, s.z, unroll=True)
        z = step(0, before)
        y = jnp.maximum(z, 0)
        slack, residual = _residual(C, q, y)
        better = residual < s.residual
        best, residual = jnp.where(better, y, s.best), jnp.where(better, residual, s.residual)
        left = residual > accuracy * jnp.where(s.sweeps < _BALANCING, 1, _ENOUGH)
        # Residual balancing (Boyd et al. 2011, §3.4.1), then smaller and smaller.
        primal = jnp.max(jnp.abs(z - before)) / _RELAXATION
        dual = s.rho * jnp.max(jnp.abs(y - jnp.maximum(before, 0)))
        ratio = jnp.sqrt(primal / jnp.where(dual > 0, dual, 1))
        balancing = s.sweeps < _BALANCING
        change = jnp.where(balancing, (ratio > 3) | (ratio < 1 / 3), (s.sweeps - _BALANCING) % _LOWERING == 0)
        rho = jnp.where(balancing, jnp.clip(s.rho * ratio, _LOWEST, 10), jnp.maximum(0.4 * s.rho, _LOWEST))
        rho = jnp.where(change & (dual > 0), rho, s.rho)
        inverse = lax.cond((rho != s.rho) & jnp.any(left), lambda: inverse_at(rho), lambda: s.inverse)
        z = jnp.where(z < 0, z * (s.rho / rho), z)
        offset = y - inverse @ (jnp.abs(z) + slack / rho + jnp.minimum(z, 0))
        return _Splitting(z, rho, inverse, offset, best, residual, s.sweeps + 1, left)

    rho = jnp.asarray(_RHO, dtype)
    inverse = inverse_at(rho)
    start = jnp.maximum(q, 0)
    begin = _Splitting(
        z=start,
        rho=rho,
        inverse=inverse,
        offset=inverse @ (q / rho),
        best=start,
        residual=_residual(C, q, start)[1],
        sweeps=jnp.asarray(0),
        left=jnp.any(q > 0, axis=0),
    )
    end = lax.while_loop(lambda s: jnp.any(s.left) & (s.sweeps < most), sweep, begin)
    return end._replace(left=end.residual > _ENOUGH * accuracy)


def _cancel(C: Array, q: Array, split: _Splitting, max_steps: int) -> _Splitting:
    """Solve the columns that are left, C y = q, where C v = 0 for a v > 0: enough of v makes up for any y < 0."""
    allowed = jnp.diagonal(C) > 0

    def judge(v: Array) -> tuple[Array, Array]:
        """Return how far from cancelled the least of v is; it is no use where v is a direction without conflict."""
        slack, least = C @ v, jnp.min(jnp.where(allowed, v, jnp.inf))
        residual = jnp.max(jnp.abs(slack)) / least
        return residual, (residual <= _CANCELLED) | jnp.all((slack > 0) | ~allowed)

    center = allowed / jnp.maximum(jnp.sum(allowed), 1).astype(C.dtype)
    one = jnp.ones((), C.dtype)
    v, cancelled, steps = interior_point(C, jnp.zeros_like(center), allowed, center, judge, max_steps, cap=one)
    factor = jnp.linalg.cholesky(C + _SOFT * jnp.eye(len(C), dtype=C.dtype))
    y = split.best
    for _ in range(2):
        v = v - jsl.cho_solve((factor, True), C @ v)
        y = y + jsl.cho_solve((factor, True), q - C @ y)
    lacking = jnp.max(jnp.maximum(-y, 0) / jnp.where(v > 0, v, 1)[:, None], axis=0, keepdims=True)
    y = jnp.maximum(y + lacking * v[:, None], 0)
    found = split.left & (cancelled <= _CANCELLED)
    residual = _residual(C, q, y)[1]
    better = found & (residual < split.residual)
    residual = jnp.where(better, residual, split.residual)
    return split._replace(
        z=jnp.where(found, y, split.z),
        best=jnp.where(better, y, split.best),
        residual=residual,
        sweeps=split.sweeps + steps,
        left=residual > _ENOUGH * _accuracy(C),
    )


def _finish(C: Array, q: Array, split: _Splitting, max_steps: int) -> tuple[Array, Array, Array, Array]:
    """Solve the columns that are left from where they are, one after the other: each takes another time."""

    def body(carry: tuple) -> tuple:
        y, residual, left, steps, failed = carry
        column = jnp.argmax(left)
        start = jnp.maximum(split.z[:, column], 0)
        solved, _ = nonnegative_qp(C, q[:, column], jnp.diagonal(C) > 0, max_steps, start=start)
        better = solved.residual <= residual[column]
        y = y.at[:, column].set(jnp.where(better, solved.value, y[:, column]))
        residual = residual.at[column].set(jnp.where(better, solved.residual, residual[column]))
        return y, residual, left.at[column].set(False), steps + solved.steps, failed | (solved.result > 0)

    carry = (split.best, split.residual, split.left, jnp.asarray(0), jnp.asarray(False))
    y, residual, _, steps, failed = lax.while_loop(lambda carry: jnp.any(carry[2]), body, carry)
    return y, residual, steps, failed


def _of_two(
    C: Float[Array, "K K"], inverse: Float[Array, " K"], u: Float[Array, " K"], q: Float[Array, " K"]
) -> Float[Array, " K"]:
    """Project u^T G: one of at most two rows makes up for the conflict, or the projection is zero."""
    if len(u) == 1:
        return jnp.maximum(u, 0)
    alone = jnp.diag(jnp.maximum(q, 0))  # a candidate a row
    worst = jnp.min(alone @ C - q[None], axis=1)
    none = jnp.where(jnp.all(u <= 0), 0, -jnp.inf)
    return jnp.where(none > jnp.max(worst), 0, u + alone[jnp.argmax(worst)] * inverse)
