"""GLS, geometric loss strategy (Chennupati et al. 2019, arXiv 1904.08492).

The product is taken in logarithms, which neither overflow nor underflow.
"""

import jax
import jax.numpy as jnp

from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.weights import Present


def gls() -> Method:
    r"""Descend on the geometric mean of the losses, in which all losses count relative to their size.

    .. math:: \min_\theta \Bigl( \prod_i l_i \Bigr)^{1/K}, \qquad w_i = \frac{1}{K l_i} \Bigl( \prod_j l_j \Bigr)^{1/K}

    Losses must be positive.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.gls()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([1.0, 4.0]))
      >>> update.tolist()
      [1.0, 0.25]
    """

    def kernel(*, losses: Losses, present: Present) -> Weights:
        return jax.grad(lambda losses: jnp.exp(jnp.mean(jnp.log(losses), where=present)))(losses)

    return from_kernel(kernel, arguments=(POSITIVE_LOSSES,), mean_like=True)


ROW = Row(
    gls,
    scale="mean, relative to the losses' geometric mean",
    papers=(
        Paper(
            "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
            "Sumanth Chennupati, Ganesh Sistu, Senthil Yogamani, Samir A. Rawashdeh",
            2019,
            booktitle="CVPR Workshops",
            arxiv="1904.08492",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    checked="numpy float64 of the published formula; TorchJD",
)
