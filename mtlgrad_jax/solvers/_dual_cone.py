r"""Projection on the dual cone of K gradients: the direction nearest to u^T G that conflicts with none of them.

The projection of u^T G on {d : G d >= 0} is v^T G with v = argmin_{v >= u} v^T M v (Quinton & Rey 2024, Prop. 1).
With v = u + x this is the non-negative program Q = M, q = -M u, whose optimality conditions are the normal map

    C max(z, 0) + rho min(z, 0) = q,        x = max(z, 0),  slack = -rho min(z, 0),       for any rho > 0,

where C is M scaled to unit diagonal. Douglas-Rachford splitting steps along (C + rho I)^-1 times the residual: one
inverse serves all right-hand sides, and one iteration for all of them is a single product of K×K matrices. About twenty
iterations find which tasks conflict and solve all but ill-conditioned problems. If many problems remain because the
gradients cancel, G^T v = 0 for some v > 0, then the dual cone is their orthogonal complement, each projection is zero,
and v corrects all of them. The rest are solved one by one by the exchanges of `_nonnegative_qp`, starting from the
current point. The workspace is about ten K×K matrices. For few tasks, all sets of tasks that conflict are tried at
once for all right-hand sides.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax.solvers._active_sets import for_few
from mtlgrad_jax.solvers._interior_point import interior_point
from mtlgrad_jax.solvers._nonnegative_qp import MAX_STEPS, nonnegative_qp
from mtlgrad_jax.solvers._solution import Solution, compiled, inverse_sqrt, shift, solution

_SWEEP = 8  # iterations between checks of the residual
_RELAXATION = 1.8  # must be below 2
_RHO = 0.5
_BALANCING = 5  # sweeps in which rho balances the residuals; then rho is lowered, so that flat problems move
_LOWERING = 3  # sweeps between two reductions of rho
_LOWEST = 0.01
_MANY = 8  # remaining columns from which an interior-point solve is worth its factorisations
_CANCELLED = 0.01  # largest max |Cv| / min v for which a least-squares correction leaves v positive
_SOFT = 1e-3  # shift of that correction; a smaller one carries more rounding into the null space
_ENOUGH = 5  # times the target residual: up to this, the exchanges are not worth it


@compiled("max_steps")
def project_rows(
    gramian: Float[Array, "K K"], preference: Float[Array, " K"], *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return the weights of the sum of the projections of preference_i g_i (UPGrad), all solved together.

    Args:
      gramian: inner products of the rows.
      preference: non-negative weights of the rows before projection.
      max_steps: maximum number of sweeps of the splitting, and of factorisations for each remaining right-hand side.
    """
    solved = _raise(gramian, jnp.diag(preference), max_steps)
    return solved._replace(value=solved.value.sum(axis=1))


@compiled("max_steps")
def project_weights(
    gramian: Float[Array, "K K"], weights: Float[Array, " K"], *, max_steps: int = MAX_STEPS
) -> Solution:
    """Return the weights of the projection of the weighted sum of the rows (DualProj).

    Args:
      gramian: inner products of the rows.
      weights: weights of the sum before projection, of any sign.
      max_steps: as in `project_rows`.
    """
    solved = _raise(gramian, weights[:, None], max_steps)
    return solved._replace(value=solved.value[:, 0])


def _raise(M: Float[Array, "K K"], U: Float[Array, "K R"], max_steps: int) -> Solution:
    """Return the (K, R) weights of the projection of every column of U; the other fields are the worst over columns."""
    inverse = inverse_sqrt(jnp.diagonal(M))[:, None]
    C = M * inverse * inverse.T
    q = -C @ (U * jnp.where(inverse > 0, 1 / jnp.where(inverse > 0, inverse, 1), 0))
    if len(M) <= 2:
        return solution(jax.vmap(partial(_of_two, C, inverse[:, 0]), 1, 1)(U, q), jnp.zeros(()), 0, False)
    size = jnp.max(jnp.abs(q), axis=0, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    q = q / size
    y, residual, steps, failed = for_few(len(C), _every_set, partial(_search, max_steps=max_steps), C, q)
    return solution(U + y * size * inverse, jnp.max(residual), steps, failed)


def _every_set(C: Float[Array, "K K"], q: Float[Array, "K R"]) -> tuple[Array, Array, Array, Array]:
    """Return what `_search` does."""
    solved, _ = jax.vmap(lambda q: nonnegative_qp(C, q, jnp.diagonal(C) > 0), in_axes=1)(q)
    return solved.value.T, solved.residual, solved.steps[0], jnp.any(solved.result > 0)


def _search(C: Float[Array, "K K"], q: Float[Array, "K R"], *, max_steps: int) -> tuple[Array, Array, Array, Array]:
    """Return the solutions, their residuals, the steps taken and whether any column failed."""
    split = _split(C, q, max_steps)
    many = jnp.sum(split.left) > _MANY
    split = lax.cond(many, lambda: _cancel(C, q, split, max_steps), lambda: split)
    y, residual, steps, failed = _finish(C, q, split, max_steps)
    return y, residual, split.sweeps + steps, failed


class _Splitting(NamedTuple):
    """State of the splitting, one column per right-hand side."""

    z: Float[Array, "K R"]
    rho: Float[Array, ""]
    inverse: Float[Array, "K K"]  # rho (C + rho I)^-1
    offset: Float[Array, "K R"]  # makes the step exact at the last check, whatever the rounding error of the inverse
    best: Float[Array, "K R"]  # for each column, the solution with the least residual so far
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
    most = min(4 + q.shape[1] // 3, max_steps)  # sweeps; each rho costs an inverse, not worth it for few columns

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
        # Residual balancing (Boyd et al. 2011, §3.4.1), then smaller and smaller values of rho.
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
    """Solve the remaining columns, C y = q, if C v = 0 for some v > 0: adding enough of v makes y positive."""
    allowed = jnp.diagonal(C) > 0

    def judge(v: Array) -> tuple[Array, Array]:
        """Return max |Cv| / min v, and whether to stop: it is small, or v is a direction without conflict."""
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
    """Solve the remaining columns one by one from the current point, since their step counts differ."""

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
    """Project u^T G for at most two rows: adding one of them removes the conflict, or the projection is zero."""
    if len(u) == 1:
        return jnp.maximum(u, 0)
    alone = jnp.diag(jnp.maximum(q, 0))  # one candidate per row
    worst = jnp.min(alone @ C - q[None], axis=1)
    none = jnp.where(jnp.all(u <= 0), 0, -jnp.inf)
    return jnp.where(none > jnp.max(worst), 0, u + alone[jnp.argmax(worst)] * inverse)
