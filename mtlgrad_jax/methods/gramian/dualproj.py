"""DualProj, the dual-cone projection of the mean gradient (GEM projects the newest one, Lopez-Paz & Ranzato 2017).

TorchJD's regularisation, 1e-4 of the Gramian's trace, is an option here; its absolute threshold on the trace is not.
"""

import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, NON_CONFLICTING, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, uniform
from mtlgrad_jax.methods.gramian.upgrad import ROW as UPGRAD
from mtlgrad_jax.solvers import project_weights


def dualproj(preference: PyTree = None, regularization: Number = 0.0) -> Method:
    r"""Project the preferred mean onto the cone of directions that conflict with no task.

    .. math:: d = \arg\min_{G d \ge 0} \Bigl\| d - \sum_i p_i g_i \Bigr\|

    No task ascends, up to rounding of the terms that sum to d.

    Args:
      preference: :math:`p` >= 0, not all 0, (K,) or a pytree under the tasks' names; 1/K over those present for None.
      regularization: fraction of the Gramian's trace added to its diagonal; the guarantee then holds up to this much.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.dualproj()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.5556, 1.1111, 1.1111]
    """
    check_number("regularization", regularization, at_least=0)
    check_numbers("preference", preference, optional=True, nonzero=True, at_least=0)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        p = of_tasks("preference", preference, present, uniform(present))
        ridge = jnp.sum(regularization * jnp.diagonal(gramian)) * present
        return project_weights(gramian + jnp.diag(ridge), p)

    return from_kernel(kernel, per_task={"preference": preference}, mean_like=preference is None)


ROW = Row(
    dualproj,
    scale="mean",
    papers=(
        Paper(
            "Gradient Episodic Memory for Continual Learning",
            "David Lopez-Paz, Marc'Aurelio Ranzato",
            2017,
            booktitle="NeurIPS",
            arxiv="1706.08840",
        ),
        *UPGRAD.papers,
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION}),
    checked="support enumeration and scipy's NNLS; optimality conditions; TorchJD; published values",
)
