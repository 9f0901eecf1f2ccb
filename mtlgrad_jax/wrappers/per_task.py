"""An ordinary optax transformation for each task's gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count, check_state
from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.method import reject_masked
from mtlgrad_jax._core.random import repeat_state
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.tasks import check_num_tasks, present_tasks, task_names
from mtlgrad_jax._core.trees import row_shapes


class PerTaskState(NamedTuple):
    """State of per_task."""

    inner: PyTree  # the transformation's state, leaves with a leading axis K


def per_task(transform: optax.GradientTransformation, num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation to each task's gradient on its own, before a method combines them.

    For clipping, momentum or Adam per task: on its own, `optax.clip_by_global_norm` clips the norm of the whole stack.
    The task axis stays; chain a method after it. A task that is absent, or has a NaN or inf in its gradient, keeps its
    state, and its gradient is passed on unchanged.

    Args:
      transform: any optax transformation.
      num_tasks: K.

    Returns:
      A transformation from stacked gradients to stacked gradients; its state holds K states of `transform`.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), num_tasks=2), mtl.sum())
      >>> update, _ = tx.update(jnp.asarray([[3.0, 4.0], [0.0, 0.5]]), tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.6, 1.3]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(f"`transform` must be an optax transformation, got {type(transform).__name__}.")
    inner = optax.with_extra_args_support(transform)

    def init(params: PyTree) -> PerTaskState:
        reject_masked(params)
        return PerTaskState(repeat_state(inner.init(params), num_tasks))

    def update(
        task_grads: PyTree,
        state: PerTaskState,
        params: PyTree | None = None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, PerTaskState]:
        reject_masked(task_grads)
        check_num_tasks(num_tasks, stacks.num_tasks(task_grads, params))
        check_state(state, init, row_shapes(task_grads))
        kept = present_tasks(task_mask, num_tasks, task_names(losses)) & stacks.finite_tasks(task_grads)

        def select(new: Array, old: Array) -> Array:
            return jnp.where(kept.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        grads, new_state = jax.vmap(lambda grad, own: inner.update(grad, own, params, **extra))(task_grads, state.inner)
        return map_leaves(select, grads, task_grads), PerTaskState(map_leaves(select, new_state, state.inner))

    return optax.GradientTransformationExtraArgs(init, update)


ROW = Row(
    per_task,
    scale="the transformation's",
    state="K times the transformation's",
    kwargs=lambda num_tasks: {"transform": optax.identity(), "num_tasks": num_tasks},
)
