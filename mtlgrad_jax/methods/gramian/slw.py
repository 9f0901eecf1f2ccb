"""Weights by inverse gradient norm, the exact version of SLAW (Crawshaw & Kosecka 2021, arXiv 2109.08218).

The official code takes the norms of the last shared layer (as `gram_over` does) and floors them at 1e-5.
"""

import jax.numpy as jnp

from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, over_mean
from mtlgrad_jax.methods.losses.slaw import ROW as SLAW
from mtlgrad_jax.solvers import inverse_sqrt


def slw() -> Method:
    r"""Weight every gradient by its inverse norm.

    .. math:: w_i = K \frac{1 / \|g_i\|}{\sum_j 1 / \|g_j\|}

    The sum is over the tasks with nonzero gradient; the others get zero weight but count in K.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.slw()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.5, 1.5]
    """

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        return over_mean(inverse_sqrt(jnp.diagonal(gramian)), present)

    return from_kernel(kernel)


ROW = Row(
    slw,
    scale="sum (weights sum to K)",
    papers=SLAW.papers,
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
)
