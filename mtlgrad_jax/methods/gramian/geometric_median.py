"""The geometric median of the gradients (robust aggregation, Pillutla, Kakade & Harchaoui 2022, arXiv 1912.13445).

Solved to convergence; the paper stops Weiszfeld's iteration after a few steps and smooths it by an absolute constant.
"""

from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import geometric_median as solve


def geometric_median() -> Method:
    r"""Follow the vector with the least sum of distances to the gradients, robust to outliers if fewer than half.

    .. math:: d = \arg\min_x \sum_i \|g_i - x\|

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.geometric_median()
      >>> grads = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [100.0, 0.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.577, 0.0]
    """

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        return solve(gramian, present)

    return from_kernel(kernel, mean_like=True)


ROW = Row(
    geometric_median,
    scale="mean (weights sum to 1)",
    papers=(
        Paper(
            "Robust Aggregation for Federated Learning",
            "Krishna Pillutla, Sham M. Kakade, Zaid Harchaoui",
            2022,
            journal="IEEE Transactions on Signal Processing",
            arxiv="1912.13445",
        ),
    ),
    promises=frozenset({HOMOGENEOUS}),
    checked="an independent solve; optimality conditions",
)
