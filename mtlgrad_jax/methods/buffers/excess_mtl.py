"""ExcessMTL (He et al. 2024, arXiv 2402.02009).

Follows the official code (yifei-he/ExcessMTL), where the first step only sets the first excess risks and the weights
sum to K. The code's 1e-7 beside the squares is omitted: a coordinate that has always been zero contributes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_count, check_dtype, check_number
from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, on_simplex, share


class ExcessMTLState(NamedTuple):
    """State of excess_mtl."""

    root: PyTree  # of the sums of squares, leaves (K, *parameter shape)
    first_excess: Float[Array, " K"]  # 0 until a task has one
    weights: Float[Array, " K"]


def excess_mtl(num_tasks: int, learning_rate: Number = 1e-2, buffer_dtype: DTypeLike | None = None) -> Method:
    r"""Give more weight to tasks further from convergence, by an estimate of the excess risk that ignores label noise.

    .. math:: S_i \leftarrow S_i + g_i^2, \qquad e_i = \sum_j g_{ij}^2 / \sqrt{S_{ij}}, \qquad
              w_i \propto w_i \exp(\eta \, e_i / e_i^{(0)})

    with :math:`e_i^{(0)}` the task's first nonzero excess, in whose step its weight stays as it is. A step uses the new
    weights. Weights start equal and sum to K; none falls below the dtype's eps squared, so that it can come back.
    The paper recommends collecting :math:`e_i^{(0)}` over three epochs, which neither its code nor this does.

    The state holds K times the parameters.

    Args:
      num_tasks: K.
      learning_rate: :math:`\eta` >= 0 of the weights: 1e-2 in LibMTL, 1 in TorchJD.
      buffer_dtype: dtype of the K buffers; the parameters' for None. In 16 bits S soon stops growing.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.excess_mtl(num_tasks=2, learning_rate=1.0)
      >>> state, grads = tx.init(jnp.zeros(2)), jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> first, state = tx.update(grads, state)
      >>> second, state = tx.update(grads * jnp.asarray([[1.0], [0.1]]), state)  # the second task has almost converged
      >>> first.tolist(), state.method.weights.tolist()
      ([1.0, 1.0], [1.3351, 0.6649])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("learning_rate", learning_rate, at_least=0)
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> ExcessMTLState:
        first_excess, weights = (jnp.full((num_tasks,), value, accumulator_dtype()) for value in (0, 1))
        return ExcessMTLState(stacks.zeros(params, num_tasks, buffer_dtype), first_excess, weights)

    def rule(task_grads: PyTree, *, present: Present, state: ExcessMTLState) -> tuple[PyTree, ExcessMTLState]:
        constant = jax.lax.stop_gradient(task_grads)
        root = map_leaves(_grown, state.root, constant)
        excess = stacks.task_norms(map_leaves(_scaled, constant, root)) ** 2
        moving = present & (state.first_excess > 0)
        first_excess = jnp.where(state.first_excess > 0, state.first_excess, excess)

        limits = jnp.finfo(excess.dtype)
        gain = learning_rate * excess / jnp.where(moving, first_excess, 1)
        level = jnp.log(state.weights) + jnp.minimum(gain, limits.max / 2)
        top = jnp.max(level, where=moving, initial=-limits.max)
        grown = jnp.where(moving, jnp.exp(jnp.where(moving, level, top) - top), 0)
        moved = jnp.maximum(on_simplex(grown, moving) * share(state.weights, moving, num_tasks), limits.eps**2)
        weights = jnp.where(moving, moved, state.weights)
        used = on_simplex(weights, present) * jnp.sum(present)
        return stacks.combine(used, task_grads), ExcessMTLState(root, first_excess, weights)

    return from_rule(rule, init, num_tasks=num_tasks, leaves_alike=True)


def _grown(root: Array, row: Array) -> Array:
    """Return the root of the sum of squares with one square more, without overflow or underflow."""
    if not jnp.issubdtype(row.dtype, jnp.floating):
        return root
    wide = jnp.promote_types(jnp.promote_types(root.dtype, row.dtype), jnp.float32)
    return jnp.hypot(root.astype(wide), row.astype(wide)).astype(root.dtype)


def _scaled(row: Array, root: Array) -> Array:
    """Return g / S^(1/4), whose square is the excess of a coordinate."""
    if not jnp.issubdtype(row.dtype, jnp.floating):
        return row
    wide = jnp.promote_types(jnp.promote_types(root.dtype, row.dtype), jnp.float32)
    quarter = jnp.sqrt(root.astype(wide))
    return jnp.where(quarter > 0, row.astype(wide) / jnp.where(quarter > 0, quarter, 1), 0)


ROW = Row(
    excess_mtl,
    scale="sum (weights sum to K)",
    state="K gradients, K weights, K first excess risks",
    papers=(
        Paper(
            "Robust Multi-Task Learning with Excess Risks",
            "Yifei He, Shiji Zhou, Guojun Zhang, Hyokun Yun, Yi Xu, Belinda Zeng, Trishul Chilimbi, Han Zhao",
            2024,
            booktitle="ICML",
            arxiv="2402.02009",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD; formula from official code",
)
