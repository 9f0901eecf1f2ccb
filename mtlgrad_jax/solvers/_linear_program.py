r"""Small linear programs over a simplex, solved exactly: max_x c^T x over x >= 0, p^T x = 1, A x >= b.

The dual simplex method (Lemke 1954). A vertex is where the equation and K - 1 of the inequalities hold with equality.
Without A, the best vertex is that of the largest c_k/p_k; from there, each step makes the worst violated inequality
active and drops the one whose multiplier first falls to zero. The objective falls until no inequality is violated: the
multipliers then prove that the vertex is optimal. If none can be dropped, they prove that no x is feasible. Towards the
end of the allowed steps, choices go by number (Bland 1977), which cannot cycle.

Each step inverts the K×K matrix of active rows anew, so that rounding errors do not add up. The result is judged after
negative entries, which may be rounding errors, are set to zero: by its violations, relative to the terms of each row,
and by how far its objective is below that of the multipliers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax.solvers._solution import INFEASIBLE, MAX_STEPS, SOLVED, Solution, compiled, shift

_ENOUGH = 16  # times the rounding error: a residual up to this counts as solved
_PIVOT = 8  # times the rounding error: the least coefficient of an inequality that can be dropped


class _Vertex(NamedTuple):
    """State of the dual simplex method."""

    active: Int[Array, " K"]  # rows that hold with equality
    x: Float[Array, " K"]  # the vertex with the least violation so far
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    result: Int[Array, ""]
    done: Bool[Array, ""]


@compiled("max_steps")
def linear_program(
    c: Float[Array, " K"],
    A: Float[Array, "R K"],
    b: Float[Array, " R"],
    p: Float[Array, " K"],
    allowed: Bool[Array, " K"],
    *,
    max_steps: int | None = None,
) -> Solution:
    """Return the best x, INFEASIBLE if there is none.

    Args:
      c: objective.
      A: rows of the inequalities.
      b: their lower bounds; -inf for no bound.
      p: coefficients of the equation, > 0.
      allowed: the other variables are held at zero.
      max_steps: maximum number of factorisations, 20 + 10 (K + R) for None.
    """
    K, R = len(c), len(b)
    max_steps = 20 + 10 * (K + R) if max_steps is None else max_steps
    accuracy = shift(jnp.eye(K, dtype=c.dtype))
    size = jnp.max(jnp.abs(A), axis=1)
    size = jnp.where(size > 0, size, 1)
    rows = jnp.concatenate([jnp.eye(K, dtype=c.dtype), A / size[:, None], p[None]])
    floors = jnp.concatenate([jnp.zeros(K, c.dtype), b / size, jnp.ones(1, c.dtype)])
    bounded, floors = jnp.isfinite(floors), jnp.where(jnp.isfinite(floors), floors, 0)
    may_leave = jnp.concatenate([allowed, jnp.ones(R, bool), jnp.zeros(1, bool)])

    def relative(amounts: Array, terms: Array) -> Array:
        return jnp.where(terms > 0, amounts / jnp.where(terms > 0, terms, 1), 0)

    def judge(point: Array, bound: Array) -> Array:
        """Return how far a point of the simplex violates an inequality or falls short of the dual bound."""
        violations = relative(floors - rows @ point, jnp.abs(rows) @ point + jnp.abs(floors))
        gap = relative(bound - c @ point, jnp.abs(c) @ point)
        return jnp.maximum(jnp.max(jnp.where(bounded, violations, 0).at[-1].set(0)), gap)

    def body(v: _Vertex) -> _Vertex:
        basis, level = rows[v.active], floors[v.active]
        inverse = jnp.linalg.inv(basis)
        x = inverse @ level
        x = x + inverse @ (level - basis @ x)
        x = jnp.where(jnp.zeros(K + R + 1, bool).at[v.active].set(True)[:K], 0, x)
        short = relative(
            floors - rows @ x,
            (jnp.abs(rows) @ jnp.abs(x) + jnp.abs(floors))
            .at[:K]
            .set(jnp.abs(inverse) @ (jnp.abs(basis) @ jnp.abs(x) + jnp.abs(level))),
        )
        short = jnp.where(bounded, short, 0).at[v.active].set(0)
        point = jnp.maximum(x, 0)
        point = point / jnp.maximum(p @ point, jnp.finfo(c.dtype).tiny)
        residual = judge(point, c @ x)
        enough = residual <= accuracy
        by_number = v.steps > max_steps // 2
        entering = jnp.where(by_number, jnp.argmax(short > accuracy), jnp.argmax(short))

        share = rows[entering] @ inverse
        leaving = may_leave[v.active] & (share > _PIVOT * accuracy * (jnp.abs(rows[entering]) @ jnp.abs(inverse)))
        multipliers, size = jnp.maximum(-(c @ inverse), 0), jnp.where(leaving, share, 1)
        noise = accuracy * (jnp.abs(c) @ jnp.abs(inverse))
        least = jnp.min(jnp.where(leaving, (multipliers + noise) / size, jnp.inf))
        ties = leaving & (multipliers / size <= least)
        dropped = jnp.where(
            by_number, jnp.argmin(jnp.where(ties, v.active, len(rows))), jnp.argmax(jnp.where(ties, share, -1))
        )
        better = residual < v.residual
        settled = jnp.max(short) <= accuracy
        stuck = ~jnp.any(leaving) & ~settled
        return _Vertex(
            active=v.active.at[dropped].set(entering),
            x=jnp.where(better, point, v.x),
            residual=jnp.where(better, residual, v.residual),
            steps=v.steps + 1,
            result=jnp.where(enough, SOLVED, jnp.where(stuck, INFEASIBLE, MAX_STEPS)),
            done=enough | settled | stuck,
        )

    first = jnp.argmax(jnp.where(allowed, c / p, -jnp.inf))
    at_first = jnp.arange(K) == first
    start = _Vertex(
        active=jnp.where(at_first, K + R, jnp.arange(K)),
        x=at_first / p,
        residual=jnp.asarray(jnp.inf, c.dtype),
        steps=jnp.asarray(0),
        result=jnp.asarray(MAX_STEPS),
        done=jnp.asarray(False),
    )
    end = lax.while_loop(lambda v: ~v.done & (v.steps < max_steps), body, start)
    infeasible = end.result == INFEASIBLE
    result = jnp.where(infeasible, INFEASIBLE, jnp.where(end.residual <= _ENOUGH * accuracy, SOLVED, MAX_STEPS))
    return Solution(end.x, jnp.where(infeasible, 0, end.residual), end.steps, result)
