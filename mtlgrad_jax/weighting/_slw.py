"""Weights by inverse gradient norm, the exact version of SLAW (Crawshaw & Kosecka 2021, arXiv 2109.08218).

The official code takes the norms of the last shared layer (`gram_over` does) and floors them at 1e-5.
"""

from typing import Any

import jax.numpy as jnp

from mtlgrad_jax.solvers import inverse_sqrt
from mtlgrad_jax.weighting._base import Gramian, Present, Weighting, Weights, from_kernel, over_mean


def slw() -> Weighting:
    r"""Weight every gradient by its inverse norm.

    .. math:: w_i = K \frac{1 / \|g_i\|}{\sum_j 1 / \|g_j\|}

    The sum is over the tasks whose gradient is not zero; the others get no weight, and count in K.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.slw()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.5, 1.5]
    """

    def kernel(gramian: Gramian, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return over_mean(inverse_sqrt(jnp.diagonal(gramian)), present), state

    return from_kernel(kernel)
