"""BMTL, balanced multi-task learning (Liang & Zhang 2020, arXiv 2002.04792).

The exponential follows an independent implementation (ponderbb/multitask-mayhem), which sums exp(l/T). As exp(l/T) can
overflow, the default is the same direction at the scale of the sum.
"""

import jax.numpy as jnp

from mtlgrad_jax._core.checks import Number, check_flag, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, softmax


def bmtl(temperature: Number = 1.0, normalize: bool = True) -> Method:
    r"""Descend on the sum of the losses' exponentials, which emphasizes the largest loss.

    .. math:: \min_\theta \sum_i e^{l_i / T}, \qquad w_i = K \frac{e^{l_i / T}}{\sum_j e^{l_j / T}}
              \quad \text{or} \quad \frac{e^{l_i / T}}{T}

    A high temperature gives equal weights; a low one gives all weight to the largest loss.

    Args:
      temperature: :math:`T` > 0, in units of the losses; 0.2 and 0.4 in the configurations of that implementation.
      normalize: whether the weights sum to K. If False, they are the objective's derivatives, which grow with the
        losses; if these overflow, the mean gradient is used and counted.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.bmtl()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.log(jnp.asarray([1.0, 3.0])))
      >>> update.tolist()
      [0.5, 1.5]
    """
    check_number("temperature", temperature, above=0)
    check_flag("normalize", normalize)

    def kernel(*, losses: Losses, present: Present) -> Weights:
        if not normalize:
            return jnp.exp(losses / temperature) / temperature
        return jnp.sum(present) * softmax(losses, present, temperature)

    return from_kernel(kernel)


ROW = Row(
    bmtl,
    scale="sum (weights sum to K)",
    papers=(
        Paper(
            "A Simple General Approach to Balance Task Difficulty in Multi-Task Learning",
            "Sicong Liang, Yu Zhang",
            2021,
            booktitle="IEEE BigData",
            arxiv="2002.04792",
        ),
    ),
    note="abstract only; formula from an implementation",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
)
