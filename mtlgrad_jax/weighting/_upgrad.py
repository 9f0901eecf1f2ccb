"""UPGrad, Jacobian descent without conflict (Quinton & Rey 2024, arXiv 2406.16232).

The projections are exact. TorchJD adds 1e-4 of the Gramian's trace to its diagonal and, where the trace is below 1e-4,
returns the plain mean; `regularization=1e-4` reproduces the first, nothing reproduces the second.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._checks import Number, check_number, check_numbers
from mtlgrad_jax.solvers import project_rows
from mtlgrad_jax.weighting._base import Gramian, Present, Weighting, Weights, from_kernel, of_tasks, uniform


def upgrad(preference: PyTree = None, regularization: Number = 0.0) -> Weighting:
    r"""Project every gradient on the dual cone of all, where nothing conflicts, and combine the projections.

    .. math:: d = \sum_i p_i \, \pi(g_i), \qquad \pi(g) = \arg\min_{G d \ge 0} \|d - g\|

    No task ascends, up to rounding of the summands of d, and where no two gradients conflict d is the preferred mean.

    Args:
      preference: :math:`p` >= 0, not all 0, (K,) or a pytree under the tasks' names; 1/K over those present for None.
      regularization: this much of the Gramian's trace is added to its diagonal; the guarantee then holds to that much.

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

    def kernel(gramian: Gramian, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        p = of_tasks("preference", preference, present, uniform(present))
        ridge = jnp.sum(regularization * jnp.diagonal(gramian)) * present
        return project_rows(gramian + jnp.diag(ridge), p), state

    return from_kernel(kernel, per_task={"preference": preference})
