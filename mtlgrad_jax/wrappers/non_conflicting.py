"""Any method made non-conflicting by projecting its direction onto the dual cone (Hu, Ho & Yu 2026, 2605.30452)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.method import Method, fit, weights_of
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import mark_skipped, mark_solved
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax.methods.gramian.capped_mgda import ROW as CAPPED_MGDA
from mtlgrad_jax.solvers import project_weights
from mtlgrad_jax.solvers._solution import in_full_precision


def non_conflicting(method: Method) -> Method:
    r"""Replace a method's direction by the nearest one along which no task ascends.

    .. math:: d = \arg\min_{G d \ge 0} \Bigl\| d - \sum_i w_i g_i \Bigr\|

    A direction without conflict stays unchanged. At Pareto-stationary points the only such direction may be zero.
    Around `mean`, this is `dualproj`.

    Args:
      method: one that combines the tasks by weights.

    Returns:
      A method with the wrapped method's state, whose `info` includes the projection.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.non_conflicting(mtl.sum())
      >>> grads = jnp.asarray([[1.0, 0.0], [-2.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.0, 1.0]
    """
    weigh = weights_of(method, "non_conflicting")

    def update(gramian: Any, state: PyTree, *, task_mask: Array, **extra: Any) -> tuple[Array, PyTree]:
        gramian = gramian() if callable(gramian) else gramian
        weights, new_state = weigh(gramian, state, task_mask=task_mask, **extra)
        M = jax.lax.stop_gradient(jnp.asarray(gramian, accumulator_dtype()))
        M = jnp.where(task_mask[:, None] & task_mask[None, :], M, 0)
        finite = jnp.isfinite(M).all()
        with in_full_precision():
            solved = project_weights(jnp.where(finite, M, 0), weights.astype(M.dtype))
        new_state = mark_solved(new_state, solved.residual, solved.steps, solved.result)
        finite &= fit(weights, M, task_mask) & fit(solved.value, M, task_mask)
        new_state = map_leaves(lambda new, old: jnp.where(finite, new, old), new_state, mark_skipped(state))
        return jnp.where(task_mask & finite, solved.value, 0), new_state

    return Method(method.init, weigh=update, like=method, looks=True)


ROW = Row(
    non_conflicting,
    scale="the method's, or less",
    state="the method's",
    papers=CAPPED_MGDA.papers,
    note="abstract only",
    wraps="mean",
)
