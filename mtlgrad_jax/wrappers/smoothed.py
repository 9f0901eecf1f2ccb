"""CR-MOGM: exponentially averaged weights (Zhou et al., NeurIPS 2022).

Constant decay and, by default, the start at the first weights follow TorchJD, not the paper's schedule.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_number, check_numbers
from mtlgrad_jax._core.method import Method, fit, weights_of
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import was_skipped
from mtlgrad_jax._core.tasks import accumulator_dtype, task_vector


class SmoothedState(NamedTuple):
    """State of smoothed."""

    weights: Float[Array, " K"]
    seen: Bool[Array, " K"]  # whether the task has been present before
    inner: PyTree


def smoothed(method: Method, num_tasks: int, decay: Number = 0.9, init: PyTree = None) -> Method:
    r"""Average the weights of a method over time, so that they do not follow the noise of single batches.

    .. math:: \bar w \leftarrow \lambda \bar w + (1 - \lambda) w

    Each average starts at the task's first weight, or at the one given. If the method looks at the gradients and their
    sum with the averaged weights could overflow, the averages restart. Absent tasks keep their averages, as do all
    tasks in a step that the method skips; the averages of the tasks present are not rescaled.

    `update_every(smoothed(method, ...), ...)` averages once per solve; the reverse order averages in every step.

    Args:
      method: one that combines the tasks by weights.
      num_tasks: K.
      decay: :math:`\lambda` in [0, 1).
      init: the averages before the first step, (K,) or a pytree under the tasks' names; None for the first weights.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.smoothed(mtl.mgda(), num_tasks=2, decay=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), state)
      >>> _, state = tx.update(jnp.asarray([[1.0, 0.0], [2.0, 0.0]]), state)
      >>> state.weights.tolist()
      [0.75, 0.25]
    """
    weigh = weights_of(method, "smoothed")
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("decay", decay, at_least=0, below=1)
    check_numbers("init", init, optional=True)
    known_tasks = num_tasks

    def start(params: PyTree) -> SmoothedState:
        weights = jnp.zeros((known_tasks,), accumulator_dtype())
        return SmoothedState(weights, jnp.zeros((known_tasks,), bool), method.init(params))

    def update(
        gramian: Any, state: SmoothedState, *, task_mask: Array, task_names: Any, **extra: Any
    ) -> tuple[Array, SmoothedState]:
        gramian = gramian() if method.looks and callable(gramian) else gramian
        weights, inner = weigh(gramian, state.inner, task_mask=task_mask, task_names=task_names, **extra)
        present = task_mask & ~was_skipped(inner)
        average = decay * state.weights + (1 - decay) * weights
        first = weights
        if init is not None:
            given = task_vector("init", init, num_tasks=known_tasks, names=task_names)
            first = decay * given.astype(weights.dtype) + (1 - decay) * weights
        average = jnp.where(state.seen, average, first)
        average = jnp.where(fit(average, gramian if method.looks else None, present), average, weights)
        average = jnp.where(present, average, state.weights)
        return jnp.where(present, average, 0), SmoothedState(average, state.seen | present, inner)

    return Method(start, weigh=update, like=method, looks=method.looks, num_tasks=known_tasks)


ROW = Row(
    smoothed,
    scale="the method's",
    state="K weights",
    papers=(
        Paper(
            "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond",
            "Shiji Zhou, Wenpeng Zhang, Jiyan Jiang, Wenliang Zhong, Jinjie Gu, Wenwu Zhu",
            2022,
            booktitle="NeurIPS",
        ),
    ),
    kwargs=lambda num_tasks: {"num_tasks": num_tasks},
    wraps="mgda",
)
