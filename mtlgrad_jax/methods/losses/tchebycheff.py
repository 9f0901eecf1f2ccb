"""Weighted Tchebycheff scalarization (Bowman 1976; Miettinen 1999, section 3.4)."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, uniform


def tchebycheff(weights: PyTree = None, ideal: PyTree = None) -> Method:
    r"""Descend on the largest weighted loss; every point of a Pareto front is optimal for some weights.

    .. math:: \min_\theta \max_i \lambda_i (l_i - z_i), \qquad
              w_i = \lambda_i \; [i = \arg\max_j \lambda_j (l_j - z_j)]

    Tasks that share the maximum share the weight. `stch` is the smooth form.

    Args:
      weights: :math:`\lambda` >= 0, (K,) or a pytree under the tasks' names; 1/K for None.
      ideal: :math:`z`, lower bounds of the losses, in the same form; 0 for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.tchebycheff(weights=[1.0, 0.25])
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.5, 4.0]))
      >>> update.tolist()
      [0.0, 0.25]
    """
    check_numbers("weights", weights, optional=True, nonzero=True, at_least=0)
    check_numbers("ideal", ideal, optional=True)

    def kernel(*, losses: Losses, present: Present) -> Weights:
        coefficients = of_tasks("weights", weights, present, uniform(present))
        least = of_tasks("ideal", ideal, present, 0.0)
        return jax.grad(lambda losses: jnp.max(coefficients * (losses - least), where=present, initial=-jnp.inf))(
            losses
        )

    return from_kernel(kernel, per_task={"weights": weights, "ideal": ideal})


ROW = Row(
    tchebycheff,
    scale="one weighted gradient",
    papers=(
        Paper(
            "Nonlinear Multiobjective Optimization",
            "Kaisa Miettinen",
            1999,
            publisher="Springer",
            doi="10.1007/978-1-4615-5563-6",
        ),
    ),
    note="section 3.4",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
)
