"""Weights solved for every k steps only (Navon et al. 2022; PSMGD, Xu et al. 2024, arXiv 2412.10961).

Both as in their official code; what momentum PSMGD's paper puts on the weights could not be verified, and is left out.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax._checks import check_count
from mtlgrad_jax._control import cond
from mtlgrad_jax._step import mark_idle, was_skipped
from mtlgrad_jax._tasks import accumulator_dtype, agree_num_tasks, check_num_tasks, present_tasks
from mtlgrad_jax.transforms._base import on_weightings
from mtlgrad_jax.weighting._base import Weighting


class UpdateEveryState(NamedTuple):
    """State of update_every."""

    weights: Float[Array, " K"]
    present: Bool[Array, " K"]  # in the last solve
    step: Int[Array, ""]  # steps since the last solve, modulo k
    inner: PyTree


@on_weightings
def update_every(method: Weighting, num_tasks: int, k: int) -> Weighting:
    """Solve for the weights in every k-th step and reuse them in between.

    Between solves neither the Gramian nor the solver runs: with `linearize` or `balanced_value_and_grad` such a step
    costs one plain backward pass. (Under vmap both branches run and nothing is saved.) Other tasks present than in the
    last solve, and a solve that was skipped, bring the next one forward.

    Args:
      method: a Weighting or a transformation made of one; the same kind comes back.
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
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("k", k, at_least=1)
    known_tasks = num_tasks

    def init(num_tasks: int | None = None) -> UpdateEveryState:
        K = agree_num_tasks(known_tasks, num_tasks)
        weights = jnp.zeros((known_tasks,), accumulator_dtype())
        return UpdateEveryState(weights, jnp.zeros((known_tasks,), bool), jnp.zeros((), jnp.int32), method.init(K))

    def update(
        gramian: Any, state: UpdateEveryState, *, losses: PyTree = None, task_mask: PyTree = None, **extra: Any
    ) -> tuple[Array, UpdateEveryState]:
        present = present_tasks(task_mask, known_tasks, losses)

        def solve() -> tuple[Array, UpdateEveryState]:
            weights, inner = method.update(gramian, state.inner, losses=losses, task_mask=task_mask, **extra)
            check_num_tasks(known_tasks, len(weights))
            weights = weights.astype(state.weights.dtype)
            solved = ~was_skipped(inner, state.inner)
            kept = jnp.where(solved, weights, state.weights)
            step = jnp.where(solved, 1 % k, 0).astype(jnp.int32)
            return weights, UpdateEveryState(kept, jnp.where(solved, present, state.present), step, inner)

        def reuse() -> tuple[Array, UpdateEveryState]:
            step = jnp.where(jnp.any(present), optax.safe_increment(state.step) % k, state.step)
            return jnp.where(present, state.weights, 0), state._replace(step=step, inner=mark_idle(state.inner))

        due = (state.step == 0) | jnp.any(present != state.present)
        return cond(due & jnp.any(present), solve, reuse)

    return Weighting(init, update, method.needs - {"gramian"})
