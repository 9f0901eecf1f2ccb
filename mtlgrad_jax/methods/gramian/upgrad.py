"""UPGrad, Jacobian descent without conflict (Quinton & Rey 2024, arXiv 2406.16232).

The projections are exact. TorchJD adds 1e-4 of the Gramian's trace to its diagonal, as `regularization=1e-4` does. It
also returns the plain mean if the trace is below 1e-4; there is no such threshold here.
"""

import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, LINEAR, NON_CONFLICTING, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, uniform
from mtlgrad_jax.solvers import project_rows


def upgrad(preference: PyTree = None, regularization: Number = 0.0) -> Method:
    r"""Project every gradient onto the dual cone of all, in which nothing conflicts, and combine the projections.

    .. math:: d = \sum_i p_i \, \pi(g_i), \qquad \pi(g) = \arg\min_{G d \ge 0} \|d - g\|

    No task ascends, up to rounding of the terms that sum to d. If no two gradients conflict, d is the preferred mean.

    Args:
      preference: :math:`p` >= 0, not all 0, (K,) or a pytree under the tasks' names; 1/K over those present for None.
      regularization: fraction of the Gramian's trace added to its diagonal; the guarantee then holds up to this much.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.upgrad()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.2924, 1.9006, 1.9006]
    """
    check_number("regularization", regularization, at_least=0)
    check_numbers("preference", preference, optional=True, nonzero=True, at_least=0)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        p = of_tasks("preference", preference, present, uniform(present))
        ridge = jnp.sum(regularization * jnp.diagonal(gramian)) * present
        return project_rows(gramian + jnp.diag(ridge), p)

    return from_kernel(kernel, per_task={"preference": preference}, mean_like=preference is None)


ROW = Row(
    upgrad,
    scale="mean",
    papers=(
        Paper(
            "Jacobian Descent for Multi-Objective Optimization",
            "Pierre Quinton, Valérian Rey",
            2024,
            arxiv="2406.16232",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION, LINEAR}),
    checked="support enumeration and scipy's NNLS; optimality conditions; published values; formula from TorchJD",
)
