"""The recipe for STCH in multi-task learning (Lin et al. 2024, arXiv 2402.19078; official code Xi-L/STCH, LibMTL).

The recipe counts in epochs; here it counts in steps, for each task those in which it was present.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_number, check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, of_tasks, softmax
from mtlgrad_jax.methods.losses.stch import ROW as STCH


class STCHMTLState(NamedTuple):
    """State of stch_mtl."""

    nadir: Float[Array, " K"]  # mean of each loss over its nadir steps so far
    step: Int[Array, " K"]  # steps in which each task was present


def stch_mtl(num_tasks: int, warmup_steps: int, nadir_steps: int, mu: Number = 1.0, nadir: PyTree = None) -> Method:
    r"""Descend on log-losses at first, then on a smooth maximum of the losses relative to a nadir point.

    .. math:: \min_\theta \sum_i \log l_i, \quad \text{then} \quad
              \min_\theta K \mu \log \sum_i \exp\bigl(\log(l_i / \bar l_i) / \mu\bigr), \qquad
              w_i = \frac1{l_i} \quad \text{and} \quad
              w_i = \frac{K}{l_i} \operatorname{softmax}\bigl(\log(l / \bar l) / \mu\bigr)_i

    The nadir point :math:`\bar l` is the mean of each loss over the steps between warm-up and second phase, in which
    the first objective still counts. With :math:`\mu = 1`, the weights of the second phase are proportional to
    :math:`1 / \bar l_i`: fixed weights, up to a common factor. A smaller :math:`\mu` is needed to favour the worst
    task. Losses must be positive.

    Args:
      num_tasks: K.
      warmup_steps: steps before the nadir point is measured; 4 epochs in the official code.
      nadir_steps: steps over which it is measured; one epoch in the official code. Unused if `nadir` is given.
      mu: smoothing :math:`\mu` > 0.
      nadir: :math:`\bar l` > 0 if known, (K,) or a pytree under the tasks' names; the second phase then follows the
        warm-up.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.stch_mtl(num_tasks=2, warmup_steps=0, nadir_steps=1)
      >>> losses = jnp.asarray([1.0, 4.0])
      >>> first, state = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)
      >>> second, state = tx.update(jnp.eye(2), state, losses=losses / 2)
      >>> first.tolist(), second.tolist()
      ([1.0, 0.25], [2.0, 0.5])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("warmup_steps", warmup_steps, at_least=0)
    check_count("nadir_steps", nadir_steps, at_least=1)
    check_number("mu", mu, above=0)
    check_numbers("nadir", nadir, optional=True, above=0)
    known_from = warmup_steps + (nadir_steps if nadir is None else 0)

    def start(num_tasks: int) -> STCHMTLState:
        return STCHMTLState(jnp.ones((num_tasks,), accumulator_dtype()), jnp.zeros((num_tasks,), jnp.int32))

    def kernel(*, losses: Losses, present: Present, state: STCHMTLState) -> tuple[Weights, STCHMTLState]:
        known = present & (state.step >= known_from)
        reference = state.nadir if nadir is None else of_tasks("nadir", nadir, known, 1.0)
        relative = jnp.log(losses) - jnp.log(jnp.where(known, reference, 1))
        second = jnp.sum(known) * softmax(relative, known, mu)
        count = state.step - warmup_steps + 1
        share = 1 / jnp.maximum(count, 1).astype(losses.dtype)
        mean = (1 - share) * state.nadir + share * losses
        measured = jnp.where((count > 0) & ~known, mean, state.nadir)
        return jnp.where(known, second, 1) / losses, STCHMTLState(measured, optax.safe_increment(state.step))

    return from_kernel(kernel, start, arguments=(POSITIVE_LOSSES,), num_tasks=num_tasks, per_task={"nadir": nadir})


ROW = Row(
    stch_mtl,
    scale="sum of the gradients of the log-losses",
    state="K losses and counts",
    papers=STCH.papers,
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"num_tasks": num_tasks, "warmup_steps": 1, "nadir_steps": 1},
    checked="numpy float64 of the official recipe",
)
