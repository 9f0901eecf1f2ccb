"""DB-MTL, dual-balancing multi-task learning (Lin et al. 2023, arXiv 2308.12029, Algorithm 1).

Omits the paper's epsilons of 1e-8: a task with zero momentum contributes nothing, and losses must be positive.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_count, check_dtype, check_number
from mtlgrad_jax._core.method import Losses, Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.weights import Present


class DBMTLState(NamedTuple):
    """State of db_mtl."""

    momentum: PyTree  # leaves (K, *parameter shape)
    step: Int[Array, " K"]  # steps in which each task was present


def db_mtl(num_tasks: int, beta: Number = 0.9, sigma: Number = 0.0, buffer_dtype: DTypeLike | None = None) -> Method:
    r"""Balance losses by their logarithm and gradients by their norm.

    .. math:: q_i \leftarrow \beta_k q_i + (1 - \beta_k) \, g_i / l_i, \qquad
              d = \max_j \|q_j\| \sum_i q_i / \|q_i\|, \qquad \beta_k = \beta / k^\sigma

    :math:`g_i / l_i` is the gradient of :math:`\log l_i`, so losses must be positive; a step with a loss <= 0 is
    skipped and counted. Without bias correction the first step is shorter by a factor of 1 - beta. Task-specific
    parameters should get the gradient of the log loss too.

    The state holds K times the parameters.

    Args:
      num_tasks: K.
      beta: momentum, in [0, 1). The paper tries 0.1, 0.5 and 0.9.
      sigma: decay of the momentum in the step number k, >= 0: 0 (official code) or 0.5 (also tried in the paper).
      buffer_dtype: dtype of the K buffers; the parameters' for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.db_mtl(num_tasks=2, beta=0.0)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.5, 1.0]))
      >>> update.tolist()
      [3.0, 3.0]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("beta", beta, at_least=0, below=1)
    check_number("sigma", sigma, at_least=0)
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> DBMTLState:
        momentum = stacks.zeros(params, num_tasks, buffer_dtype)
        return DBMTLState(momentum, jnp.zeros((num_tasks,), jnp.int32))

    def rule(task_grads: PyTree, *, losses: Losses, present: Present, state: DBMTLState) -> tuple[PyTree, DBMTLState]:
        step = optax.safe_increment(state.step)
        decay = beta / step.astype(losses.dtype) ** sigma
        momentum = stacks.mix(decay, state.momentum, (1 - decay) / losses, task_grads)
        norms = jnp.where(present, stacks.task_norms(jax.lax.stop_gradient(momentum)), 0)
        weights = jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 0)
        return stacks.combine(weights, momentum), DBMTLState(momentum, step)

    return from_rule(rule, init, arguments=(POSITIVE_LOSSES,), num_tasks=num_tasks, leaves_alike=True)


ROW = Row(
    db_mtl,
    scale="sum of K gradients, each scaled to the largest norm",
    state="K gradients",
    papers=(
        Paper(
            "Dual-Balancing for Multi-Task Learning",
            "Baijiong Lin, Weisen Jiang, Feiyang Ye, Yu Zhang, Pengguang Chen, Ying-Cong Chen, Shu Liu, Ivor W. "
            "Tsang, James T. Kwok",
            2023,
            arxiv="2308.12029",
        ),
    ),
    note="accepted by Neural Networks",
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    kwargs=num_tasks_only,
)
