"""ReLoBRaLo, relative loss balancing with random look-back (Bischof & Kraus 2021, arXiv 2110.09813).

The formula is the paper's (11). How it starts follows the official code (rbischof/relative_balancing): weights of one
in the first step and no memory in the second. Departures from that code: "first" losses are those of the first step, as
in the paper, not of the second; counts are per task; and the 1e-12 in denominators is left out, as losses must be
positive.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, make_key
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, on_simplex, softmax


class ReLoBRaLoState(NamedTuple):
    """State of relobralo."""

    weights: Float[Array, " K"]
    first: Float[Array, " K"]  # losses in each task's first step
    last: Float[Array, " K"]  # and in its last
    step: Int[Array, " K"]  # steps in which each task was present
    key: Key  # for the next step's look-back


def relobralo(
    num_tasks: int, temperature: Number = 1.0, alpha: Number = 0.999, rho: Number = 0.999, key: Seed = 0
) -> Method:
    r"""Give the largest weights to the losses that have fallen least, since the last step and, at times, the first.

    .. math:: b_i(t, t') = K \frac{\exp \bigl( l_i(t) / (T \, l_i(t')) \bigr)}
                                  {\sum_j \exp \bigl( l_j(t) / (T \, l_j(t')) \bigr)}, \qquad
              w_i(t) = \alpha \bigl( \rho_t \, w_i(t-1) + (1 - \rho_t) \, b_i(t, 0) \bigr) + (1 - \alpha) \, b_i(t, t-1)

    with :math:`\rho_t` drawn in every step, the same for all tasks: 1 with probability `rho`, else 0, a look-back that
    forgets the weights so far. A task has weight 1 in its first step, and :math:`\alpha = 0` in its second. The weights
    sum to K, also over the tasks present. Losses must be positive; a step with a loss <= 0 is skipped and counted.
    Ratios of losses beyond the dtype's largest number count as that number.

    Args:
      num_tasks: K.
      temperature: :math:`T` > 0; high for equal weights. 1 is the official code's default.
      alpha: :math:`\alpha` in [0, 1], the memory; 0.999 in the official code.
      rho: the mean of :math:`\rho_t` ("expected saudade") in [0, 1], near 1. The official code's default of 1 means no
        look-back.
      key: seed or key; the same on every process. Under vmap over runs, make the method inside,
        `relobralo(..., key=key)`, with a key for each run: `vmap(tx.init)` gives all runs the same key.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.relobralo(num_tasks=2, temperature=0.5)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> first, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([2.0, 4.0]))
      >>> second, state = tx.update(grads, state, losses=jnp.asarray([2.0, 4.0 - 2 * jnp.log(3.0)]))
      >>> first.tolist(), second.tolist()
      ([1.0, 1.0], [1.5, 0.5])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("temperature", temperature, above=0)
    check_number("alpha", alpha, at_least=0, at_most=1)
    check_number("rho", rho, at_least=0, at_most=1)
    check_key(key)

    def start(num_tasks: int) -> ReLoBRaLoState:
        weights, first, last = (jnp.ones((num_tasks,), accumulator_dtype()) for _ in range(3))
        return ReLoBRaLoState(weights, first, last, jnp.zeros((num_tasks,), jnp.int32), make_key(key))

    def kernel(*, losses: Losses, present: Present, state: ReLoBRaLoState) -> tuple[Weights, ReLoBRaLoState]:
        following, draw = draw_key(state.key)
        remembers = jax.random.bernoulli(draw, rho)
        old = present & (state.step > 0)
        count = jnp.sum(old)
        weights = count * on_simplex(state.weights, old)
        since_first, since_last = (
            count * softmax(jnp.minimum(losses / then, jnp.finfo(losses.dtype).max), old, temperature)
            for then in (state.first, state.last)
        )
        memory = jnp.where(state.step > 1, alpha, 0)
        mixed = memory * jnp.where(remembers, weights, since_first) + (1 - memory) * since_last
        weights = jnp.where(old, count * on_simplex(mixed, old), 1)
        first = jnp.where(state.step > 0, state.first, losses)
        return weights, ReLoBRaLoState(weights, first, losses, optax.safe_increment(state.step), following)

    return from_kernel(kernel, start, arguments=(POSITIVE_LOSSES,), num_tasks=num_tasks)


ROW = Row(
    relobralo,
    scale="sum (weights sum to K)",
    state="K weights, K first and K last losses, K counts, a random key",
    papers=(
        Paper(
            "Multi-Objective Loss Balancing for Physics-Informed Deep Learning",
            "Rafael Bischof, Michael A. Kraus",
            2025,
            journal="Computer Methods in Applied Mechanics and Engineering",
            arxiv="2110.09813",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the definition, with and without look-back in every step; formula from official code",
    randomized=True,
)
