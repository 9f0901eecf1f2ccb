"""FAMO, fast adaptive multitask optimization (Liu et al. 2023, arXiv 2306.03792).

Follows Algorithm 2 of the paper with its decay of 1e-3; its benchmark code has 1e-5, its package 0.01. The epsilon that
the code adds to losses is left out: losses at or below their bounds are outside the method's domain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_number, check_numbers
from mtlgrad_jax._core.learned import Learned, descend, learn
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import LAGGED, Argument
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, of_tasks, on_simplex, ratios, softmax


class FAMOState(NamedTuple):
    """State of famo."""

    logits: Learned
    losses: Float[Array, " K"]  # each task's losses when it was last present
    last: Int[Array, " K"]  # the step in which that was
    step: Int[Array, ""]


def famo(num_tasks: int, learning_rate: Number = 0.025, gamma: Number = 1e-3, min_losses: PyTree = None) -> Method:
    r"""Learn weights with which all log-losses fall at the same rate, from the losses alone.

    .. math:: w_i = c \, \frac{z_i}{l_i - b_i}, \quad \sum_i w_i = 1, \quad z = \operatorname{softmax}(\xi), \qquad
              \xi \leftarrow \operatorname{Adam}\bigl(\xi,\; J_z^T \delta + \gamma \xi\bigr), \quad
              \delta_i = \log \frac{l_i - b_i}{l_i' - b_i}

    with the Jacobian :math:`J_z` of the softmax and the losses :math:`l'` after the step, on the same batch. A step
    begins with the update of :math:`\xi` for the step before: pass `new_losses`, the losses of the **previous** batch
    at the present parameters. Without them the losses of this step stand in, which saves a forward pass but mixes the
    progress with the difference of two batches; `info` then says so. Tasks that were absent in the previous step, or
    are absent in this one, take no part in the update of :math:`\xi`.

    Args:
      num_tasks: K.
      learning_rate: learning rate of Adam for :math:`\xi`.
      gamma: decay :math:`\gamma` >= 0 of :math:`\xi`, which is added to its gradient.
      min_losses: lower bounds :math:`b`, (K,) or a pytree under the tasks' names; 0 for None. Losses must exceed them.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.famo(num_tasks=2)
      >>> grads = jnp.eye(2)
      >>> before, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([1.0, 3.0]))
      >>> after, state = tx.update(
      ...     grads, state, losses=jnp.asarray([1.0, 1.0]), new_losses=jnp.asarray([0.5, 3.0])
      ... )
      >>> before.tolist(), after.tolist()
      ([0.75, 0.25], [0.4875, 0.5125])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("learning_rate", learning_rate, at_least=0)
    check_number("gamma", gamma, at_least=0)
    check_numbers("min_losses", min_losses, optional=True)
    inner = optax.adam(learning_rate)

    def start(num_tasks: int) -> FAMOState:
        ones, none = jnp.ones((num_tasks,), accumulator_dtype()), jnp.full((num_tasks,), -2, jnp.int32)
        return FAMOState(learn(num_tasks, 0.0, inner), ones, none, jnp.zeros((), jnp.int32))

    def kernel(*, losses: Losses, new_losses: Losses, present: Present, state: FAMOState) -> tuple[Weights, FAMOState]:
        bounds = of_tasks("min_losses", min_losses, present, 0.0)
        excess = jnp.where(present, losses - bounds, 1)
        moved = present & (state.last == state.step - 1)
        old = state.logits.value
        shares = softmax(old, moved)
        before, after = (jnp.log(jnp.where(moved, seen - bounds, 1)) for seen in (state.losses, new_losses))
        change = before - after
        slope = jnp.where(moved, shares * (change - shares @ change) + gamma * old, 0)
        learned = descend(state.logits, slope, inner)
        logits = jax.tree.map(lambda new, previous: jnp.where(moved, new, previous), learned, state.logits)
        z = softmax(logits.value, present)
        weights = on_simplex(ratios(z, excess, present), present)
        return weights, FAMOState(
            logits, losses, jnp.full_like(state.last, state.step), optax.safe_increment(state.step)
        )

    least = 0 if min_losses is None else min_losses
    bounded = Argument("losses", above=least)
    new = Argument("new_losses", above=least, stand_in="losses", missing=LAGGED)
    per_task = {"min_losses": min_losses}
    return from_kernel(kernel, start, num_tasks=num_tasks, arguments=(bounded, new), per_task=per_task, mean_like=True)


ROW = Row(
    famo,
    scale="mean (weights sum to 1)",
    state="K logits and their Adam state, K losses, counts",
    papers=(
        Paper(
            "FAMO: Fast Adaptive Multitask Optimization",
            "Bo Liu, Yihao Feng, Peter Stone, Qiang Liu",
            2023,
            booktitle="NeurIPS",
            arxiv="2306.03792",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD",
)
