"""STCH, smooth Tchebycheff scalarization (Lin et al. 2024, arXiv 2402.19078).

For the recipe with logarithms, warm-up and nadir point that its authors use for multi-task learning, see `stch_mtl`.
"""

from jaxtyping import PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, softmax, uniform
from mtlgrad_jax.stacks import once


def stch(mu: Number, weights: PyTree = None, ideal: PyTree = None) -> Method:
    r"""Descend on a smooth maximum of the weighted losses, which reaches concave parts of a Pareto front too.

    .. math:: \min_\theta \mu \log \sum_i \exp\bigl(\lambda_i (l_i - z_i) / \mu\bigr), \qquad
              w_i = \lambda_i \operatorname{softmax}\bigl(\lambda (l - z) / \mu\bigr)_i

    A small :math:`\mu` approaches `tchebycheff`, a large one linear scalarization.

    Args:
      mu: smoothing :math:`\mu` > 0, in units of the weighted losses; the paper tries 0.01, 0.1, 0.5 and 1.
      weights: :math:`\lambda` >= 0, (K,) or a pytree under the tasks' names; 1/K for None.
      ideal: :math:`z`, lower bounds of the losses, in the same form; 0 for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.stch(mu=1.0, weights=[1.0, 1.0])
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.log(jnp.asarray([1.0, 3.0])))
      >>> update.tolist()
      [0.25, 0.75]
    """
    check_number("mu", mu, above=0)
    check_numbers("weights", weights, optional=True, nonzero=True, at_least=0)
    check_numbers("ideal", ideal, optional=True)

    def kernel(*, losses: Losses, present: Present) -> Weights:
        coefficients = of_tasks("weights", weights, present, uniform(present))
        least = of_tasks("ideal", ideal, present, 0.0)
        # Rounded once: XLA:CPU would join product and difference to the largest in some places and not in others.
        return coefficients * softmax(once(coefficients * (losses - least)), present, mu)

    return from_kernel(kernel, per_task={"weights": weights, "ideal": ideal})


ROW = Row(
    stch,
    scale="convex combination of the weighted gradients",
    papers=(
        Paper(
            "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
            "Xi Lin, Xiaoyuan Zhang, Zhiyuan Yang, Fei Liu, Zhenkun Wang, Qingfu Zhang",
            2024,
            booktitle="ICML",
            arxiv="2402.19078",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"mu": 1.0},
    checked="numpy float64 of the published formula; TorchJD",
)
