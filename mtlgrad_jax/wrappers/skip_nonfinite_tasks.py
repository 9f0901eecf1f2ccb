"""Drop tasks with a NaN or inf for one step."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.method import Method, check_transformation, still_if_empty, update_without_task_axis
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import LOSSES
from mtlgrad_jax._core.tasks import Jacobian


class SkipNonfiniteTasksState(NamedTuple):
    """State of skip_nonfinite_tasks."""

    dropped: Int[Array, ""]  # tasks dropped so far, summed over the steps
    inner: PyTree


def skip_nonfinite_tasks(method: optax.GradientTransformation) -> Method:
    """Treat a task whose loss or gradient is NaN or inf as absent in this step, and count it.

    The same goes for a loss outside the method's domain: a loss <= 0 if the method takes its logarithm or divides by
    it, as for a task that has converged to zero loss.

    The other tasks train as if the task were absent; its own state does not change. This helps if a NaN stays
    within its task: with `task_value_and_grad` on named losses that are computed separately and
    `strategy="unrolled"`, or with a vmap over tasks. Otherwise one NaN label makes every row NaN, all tasks are
    dropped and the update is zero.

    With a TaskJacobian, it forms blocks of `rows` rows (see `linearize`), or single rows without `rows`. The latter
    takes K backward passes for the check, K for the sum, and K(K + 1)/2 for a Gramian.

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
    declared = [LOSSES, *(own for own in getattr(method, "arguments", ()) if own.name == "losses")]

    def init(params: PyTree) -> SkipNonfiniteTasksState:
        return SkipNonfiniteTasksState(jnp.zeros((), jnp.int32), method.init(params))

    def update(
        task_grads: PyTree,
        state: SkipNonfiniteTasksState,
        params: PyTree | None,
        *,
        task_mask: Array,
        losses: Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SkipNonfiniteTasksState]:
        task_grads = task_grads.by_rows() if isinstance(task_grads, Jacobian) else task_grads
        finite = stacks.finite_tasks(task_grads)
        if losses is not None:
            finite &= jnp.stack([argument.valid(losses) for argument in declared]).all(axis=0)
        gradient, inner = update_without_task_axis(
            "method", method, task_grads, state.inner, params, losses=losses, task_mask=task_mask & finite, **extra
        )
        inner = inner if isinstance(method, Method) else still_if_empty(inner, state.inner)
        dropped = jnp.sum(task_mask & ~finite, dtype=jnp.int32)
        room = jnp.iinfo(jnp.int32).max - state.dropped
        return gradient, SkipNonfiniteTasksState(state.dropped + jnp.minimum(dropped, room), inner)

    return Method(init, update, like=method, takes_jacobian=isinstance(method, Method))


ROW = Row(
    skip_nonfinite_tasks,
    scale="the method's",
    state="a counter",
    wraps="mean",
)
