"""SLAW, scaled loss approximate weighting (Crawshaw & Kosecka 2021, arXiv 2109.08218).

Follows the official code (mtcrawshaw/meta, tag SLAW). Departures: the deviation is updated directly, not as a
difference of squares, which rounding can make negative; its floor of 1e-5 is relative here; and counts are per task, so
that a task has weight one in its own first step.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, over_mean


class SLAWState(NamedTuple):
    """State of slaw."""

    mean: Float[Array, " K"]  # of each loss
    deviation: Float[Array, " K"]  # standard deviation of each loss
    step: Int[Array, " K"]  # steps in which each task was present


def slaw(num_tasks: int, beta: Number = 0.99) -> Method:
    r"""Weight every loss by its inverse standard deviation over the steps, an estimate of its inverse gradient norm.

    .. math:: m_i \leftarrow m_i + a_k (l_i - m_i), \qquad
              s_i^2 \leftarrow (1 - a_k) \bigl( s_i^2 + a_k (l_i - m_i)^2 \bigr), \qquad
              w_i = K \frac{1 / s_i}{\sum_j 1 / s_j}

    with the old mean in the second formula and :math:`a_k = \max(1/k, 1 - \beta)` in a task's k-th step: averages over
    all losses so far, then, after 1/(1 - beta) steps, exponential averages (the official code rounds that number). The
    weights include the loss of the same step. A task in its first step has weight 1; the others share the rest. A
    deviation is floored at the dtype's eps times the loss's root mean square: a loss that never changes takes almost
    all the weight, as in the official code, and several such have weights proportional to `1/|l|`. A loss that has
    always been zero has weight 0.

    Args:
      num_tasks: K.
      beta: decay :math:`\beta` of the averages, in [0, 1]; 1 averages over all steps. With 0 all deviations are zero,
        so weights are proportional to `1/|l|`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.slaw(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> first, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([1.0, 9.0]))
      >>> second, state = tx.update(grads, state, losses=jnp.asarray([0.5, 7.5]))
      >>> first.tolist(), second.tolist()
      ([1.0, 3.0], [1.5, 1.5])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("beta", beta, at_least=0, at_most=1)

    def start(num_tasks: int) -> SLAWState:
        mean, deviation = (jnp.zeros((num_tasks,), accumulator_dtype()) for _ in range(2))
        return SLAWState(mean, deviation, jnp.zeros((num_tasks,), jnp.int32))

    def kernel(*, losses: Losses, present: Present, state: SLAWState) -> tuple[Weights, SLAWState]:
        step = optax.safe_increment(state.step)
        share = jnp.maximum(1 / step.astype(losses.dtype), 1 - beta)
        change = losses - state.mean
        mean = state.mean + share * change
        deviation = jnp.sqrt(1 - share) * jnp.hypot(state.deviation, jnp.sqrt(share) * change)
        spread = jnp.maximum(deviation, jnp.finfo(losses.dtype).eps * jnp.hypot(mean, deviation))
        known = step > 1
        least = jnp.min(spread, where=present & known & (spread > 0), initial=jnp.inf)
        inverse = jnp.where(spread > 0, least / jnp.where(spread > 0, spread, 1), 0)
        weights = jnp.where(known, over_mean(inverse, present & known), 1)
        return weights, SLAWState(mean, deviation, step)

    return from_kernel(kernel, start, num_tasks=num_tasks)


ROW = Row(
    slaw,
    scale="sum (weights sum to K)",
    state="K means and deviations of losses, K counts",
    papers=(
        Paper(
            "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning",
            "Michael Crawshaw, Jana Košecká",
            2021,
            arxiv="2109.08218",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the definition over all steps; formula from official code",
)
