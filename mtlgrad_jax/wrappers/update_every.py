"""Weights solved for only every k steps (Navon et al. 2022; PSMGD, Xu et al. 2024, arXiv 2412.10961).

As in the official code of both; PSMGD's momentum on the weights is left out.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax._core.checks import check_count
from mtlgrad_jax._core.control import cond
from mtlgrad_jax._core.method import Method, weights_of
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import mark_idle, was_skipped
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax.methods.gramian.nash_mtl import ROW as NASH_MTL


class UpdateEveryState(NamedTuple):
    """State of update_every."""

    weights: Float[Array, " K"]
    present: Bool[Array, " K"]  # in the last solve
    step: Int[Array, ""]  # steps since the last solve, modulo k
    inner: PyTree


def update_every(method: Method, num_tasks: int, k: int) -> Method:
    """Solve for the weights in every k-th step and reuse them in between.

    Between solves neither the Gramian nor the solver runs: with `linearize` or `balanced_value_and_grad` such a step
    costs one plain backward pass. (Under vmap both branches run and nothing is saved.) The next solve comes early if
    the tasks present differ from those in the last solve, or if the last solve was skipped.

    Args:
      method: one that combines the tasks by weights.
      num_tasks: K.
      k: steps from one solve to the next, >= 1.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.update_every(mtl.mgda(), num_tasks=2, k=10)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), state)
      >>> update, state = tx.update(jnp.asarray([[1.0, 0.0], [2.0, 0.0]]), state)
      >>> update.tolist()
      [1.5, 0.0]
    """
    weigh = weights_of(method, "update_every")
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("k", k, at_least=1)
    known_tasks = num_tasks

    def init(params: PyTree) -> UpdateEveryState:
        weights = jnp.zeros((known_tasks,), accumulator_dtype())
        return UpdateEveryState(weights, jnp.zeros((known_tasks,), bool), jnp.zeros((), jnp.int32), method.init(params))

    def update(
        gramian: Any, state: UpdateEveryState, *, task_mask: Array, **extra: Any
    ) -> tuple[Array, UpdateEveryState]:
        def solve() -> tuple[Array, UpdateEveryState]:
            weights, inner = weigh(gramian, state.inner, task_mask=task_mask, **extra)
            weights = weights.astype(state.weights.dtype)
            solved = ~was_skipped(inner)
            kept = jnp.where(solved, weights, state.weights)
            step = jnp.where(solved, 1 % k, 0).astype(jnp.int32)
            return weights, UpdateEveryState(kept, jnp.where(solved, task_mask, state.present), step, inner)

        def reuse() -> tuple[Array, UpdateEveryState]:
            step = jnp.where(jnp.any(task_mask), optax.safe_increment(state.step) % k, state.step)
            return jnp.where(task_mask, state.weights, 0), state._replace(
                step=step, inner=mark_idle(state.inner, task_mask)
            )

        due = (state.step == 0) | jnp.any(task_mask != state.present)
        return cond(due & jnp.any(task_mask), solve, reuse)

    return Method(init, weigh=update, like=method, num_tasks=known_tasks)


ROW = Row(
    update_every,
    scale="the method's",
    state="K weights",
    papers=(
        *NASH_MTL.papers,
        Paper(
            "PSMGD: Periodic Stochastic Multi-Gradient Descent for Fast Multi-Objective Optimization",
            "Mingjing Xu, Peizhong Ju, Jia Liu, Haibo Yang",
            2025,
            booktitle="AAAI",
            arxiv="2412.10961",
        ),
    ),
    kwargs=lambda num_tasks: {"num_tasks": num_tasks, "k": 2},
    wraps="mgda",
)
