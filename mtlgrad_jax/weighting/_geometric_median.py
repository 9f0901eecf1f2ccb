"""The geometric median of the gradients (robust aggregation, Pillutla, Kakade & Harchaoui 2022, arXiv 1912.13445).

Converged; the paper stops Weiszfeld's iteration after a few steps and smooths it by an absolute constant.
"""

from typing import Any

from mtlgrad_jax.solvers import geometric_median as solve
from mtlgrad_jax.weighting._base import Gramian, Present, Weighting, Weights, from_kernel


def geometric_median() -> Weighting:
    r"""Follow the vector with the least sum of distances to the gradients; less than half of them cannot carry it off.

    .. math:: d = \arg\min_x \sum_i \|g_i - x\|

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.geometric_median()
      >>> grads = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [100.0, 0.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.577, 0.0]
    """

    def kernel(gramian: Gramian, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return solve(gramian, present), state

    return from_kernel(kernel)
