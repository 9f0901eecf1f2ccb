"""Dropping, for one step, the tasks that broke in it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.method import Method, check_transformation, update_without_task_axis
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.tasks import Jacobian, present_tasks, task_vector, unstack


class SkipNonfiniteTasksState(NamedTuple):
    """State of skip_nonfinite_tasks."""

    dropped: Int[Array, ""]  # tasks dropped so far, counted once a step
    inner: PyTree


def skip_nonfinite_tasks(method: optax.GradientTransformation) -> Method:
    """Treat a task whose loss or gradient is not finite as absent in this step, and count it.

    So is one whose loss lies outside the method's domain: a loss <= 0 where the method takes its logarithm or divides
    by it, as of a task that is finished.

    The other tasks train on as if it had not been there; its own state stays as it was. This helps where a NaN stays
    in its task: `task_value_and_grad` on named losses with `strategy="unrolled"`, or a vmap over tasks. Otherwise one
    NaN label spoils every row, all tasks are dropped and the update is zero.

    Of a TaskJacobian it forms blocks of rows: `rows` of `linearize` at a time, without it one, which takes K backward
    passes to look at them, K for the sum, and K(K + 1)/2 for a Gramian.

    Args:
      method: any transformation of this library, or a chain that begins with one.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.skip_nonfinite_tasks(mtl.mean())
      >>> update, state = tx.update(jnp.asarray([[1.0, 2.0], [jnp.nan, 0.0]]), tx.init(jnp.zeros(2)))
      >>> update.tolist(), int(state.dropped)
      ([1.0, 2.0], 1)
    """
    check_transformation(method)
    positive = any(argument.name == "losses" and argument.positive for argument in getattr(method, "arguments", ()))

    def init(params: PyTree) -> SkipNonfiniteTasksState:
        return SkipNonfiniteTasksState(jnp.zeros((), jnp.int32), method.init(params))

    def update(
        task_grads: PyTree,
        state: SkipNonfiniteTasksState,
        params: PyTree | None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, SkipNonfiniteTasksState]:
        task_grads = task_grads.by_rows() if isinstance(task_grads, Jacobian) else task_grads
        K = stacks.num_tasks(task_grads)
        present = present_tasks(task_mask, K, losses)
        finite = stacks.finite_tasks(task_grads)
        if losses is not None:
            values = task_vector("losses", losses, num_tasks=K)
            finite &= jnp.isfinite(values) & (values > 0) if positive else jnp.isfinite(values)
        kept = present & finite if losses is None else unstack(present & finite, like=losses)
        gradient, inner = update_without_task_axis(
            "method", method, task_grads, state.inner, params, losses=losses, task_mask=kept, **extra
        )
        dropped = jnp.sum(present & ~finite, dtype=jnp.int32)
        room = jnp.iinfo(jnp.int32).max - state.dropped
        return gradient, SkipNonfiniteTasksState(state.dropped + jnp.minimum(dropped, room), inner)

    return Method(init, update, like=method, takes_jacobian=isinstance(method, Method))


ROW = Row(
    skip_nonfinite_tasks,
    scale="the method's",
    state="a counter",
    paper="none",
    wraps="mean",
)
