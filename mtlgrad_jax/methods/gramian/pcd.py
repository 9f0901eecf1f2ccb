"""PCD, priority-constrained descent (TMLR 2026, arXiv 2606.29521; formulas from TorchJD 0.18).

TorchJD adds 1e-8 to the moving averages; here nothing is added, and a gradient that has always been zero gives no
constraint.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_number, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, LINEAR, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, of_tasks, one_for_all
from mtlgrad_jax.solvers import progress_direction
from mtlgrad_jax.solvers._solution import FAILED


class PCDState(NamedTuple):
    """State of pcd."""

    norm: Float[Array, " K"]  # root of the moving average of the squared norms, bias corrected
    step: Int[Array, " K"]  # steps in which both the task and the primary task were present


def pcd(num_tasks: int, primary: int | PyTree = 0, progress: PyTree = 0.02, decay: Number = 0.999) -> Method:
    r"""Follow the primary task as closely as a guaranteed progress of the others allows.

    .. math:: d \propto \arg\min_d \|d - \tilde g_p\| \quad \text{s.t.} \quad
              \langle \tilde g_j, d \rangle \ge \tau \|\tilde g_j\|^2, \; j \ne p, \qquad
              \tilde g_i = g_i / \sqrt{\hat v_i}

    with :math:`\hat v_i` a bias-corrected moving average of :math:`\|g_i\|^2`. d has the norm of :math:`g_p`. If the
    constraints are infeasible, d is :math:`g_p`, and this is counted. If the primary task is absent, d is the mean of
    the tasks present.

    Args:
      num_tasks: K.
      primary: index of the primary task (in sorted order for named tasks), or a pytree of bool under the tasks' names
        that is True only for the primary task.
      progress: :math:`\tau` in [0, 1], one for all or one per task; the primary task's value has no effect.
      decay: decay of the moving average, in [0, 1).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.pcd(num_tasks=2, progress=0.5)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.8944, 0.4472]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    named = {} if isinstance(primary, int) else {"primary": primary}
    if named:
        flags = jax.tree.leaves(primary)
        if not all(isinstance(flag, (bool, np.bool_)) for flag in flags) or flags.count(True) != 1:
            raise ValueError(
                f"`primary` must be a static index, or a pytree of bool of which one is True, got primary={primary!r}. "
                "Under optax.inject_hyperparams, list it: static_args=('primary',)."
            )
        primary = flags.index(True)
    check_count("primary", primary, at_least=0)
    if primary >= num_tasks:
        raise ValueError(f"`primary` must be < num_tasks={num_tasks}, got primary={primary}.")
    check_numbers("progress", progress, at_least=0, at_most=1)
    check_number("decay", decay, at_least=0, below=1)

    def init(num_tasks: int) -> PCDState:
        return PCDState(jnp.zeros((num_tasks,), accumulator_dtype()), jnp.zeros((num_tasks,), jnp.int32))

    def kernel(*, gramian: Gramian, present: Present, state: PCDState) -> tuple[Weights, PCDState]:
        shares = of_tasks("progress", progress, present, 0.0)
        step = optax.safe_increment(state.step)
        now = jnp.sqrt(jnp.diagonal(gramian))
        largest = jnp.maximum(state.norm, now)
        safe = jnp.where(largest > 0, largest, 1)
        keep = jnp.asarray(decay, now.dtype)
        share = jnp.where(keep < 1, (1 - keep) / -jnp.expm1(step * jnp.log(jnp.where(keep < 1, keep, 0))), 1 / step)
        norm = largest * jnp.sqrt((1 - share) * (state.norm / safe) ** 2 + share * (now / safe) ** 2)
        scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
        solved = progress_direction(gramian * scale[:, None] * scale[None, :], primary, shares.astype(now.dtype))
        weights = solved.value * scale / jnp.where(scale[primary] > 0, scale[primary], 1)
        result = jnp.where(present[primary], solved.result, FAILED)
        return solved._replace(value=weights, result=result), PCDState(norm, step)

    per_task = named if one_for_all(progress) else {**named, "progress": progress}
    return from_kernel(kernel, init, num_tasks=num_tasks, per_task=per_task)


ROW = Row(
    pcd,
    scale="norm of the primary gradient",
    state="K root mean square norms, K counts",
    papers=(
        Paper(
            "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective "
            "Optimization",
            "Dara Varam, Mohamed I. Alhajri",
            2026,
            journal="Transactions on Machine Learning Research",
            arxiv="2606.29521",
        ),
    ),
    note="formulas from TorchJD 0.18",
    promises=frozenset({HOMOGENEOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="an independent solve; TorchJD",
)
