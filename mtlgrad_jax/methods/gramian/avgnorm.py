"""AvgNorm (Guo et al. 2025, arXiv 2509.23915, "Revisit the Imbalance Optimization in Multi-task Learning").

Formula from a summary of the paper. The paper takes the norms of the last shared layer; `gram_over` does the same.
"""

from typing import Literal

import jax.numpy as jnp

from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, mean_of
from mtlgrad_jax.solvers import inverse_sqrt, normalized


def avgnorm(scale: Literal["sum_norm", "mean_norm", "one"] = "sum_norm") -> Method:
    r"""Give every gradient the length of their sum.

    .. math:: d = S \sum_i \frac{g_i}{\|g_i\|}, \qquad S = \Bigl\| \sum_j g_j \Bigr\|

    Tasks with zero gradient take no part.

    With `scale="mean_norm"` this is the scheme "grad_norm" of jaxpi for physics-informed networks, which also averages
    the weights and refreshes them every 1000 steps:
    `update_every(smoothed(avgnorm("mean_norm"), K, decay=0.9, init=[1.0, ...]), K, k=1000)`.

    Args:
      scale: :math:`S`: the norm of the sum ("sum_norm", paper), which vanishes if the gradients cancel, the mean norm
        ("mean_norm"), or 1 ("one").

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.avgnorm()
      >>> grads = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [5.0, 5.0]
    """
    check_choice("scale", scale, ("sum_norm", "mean_norm", "one"))

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        norms = jnp.sqrt(jnp.diagonal(gramian))
        lengths = {
            "sum_norm": jnp.sqrt(jnp.maximum(jnp.sum(normalized(gramian)), 0)) * jnp.max(norms),
            "mean_norm": mean_of(norms, present),
            "one": jnp.ones((), gramian.dtype),
        }
        return lengths[scale] * inverse_sqrt(jnp.diagonal(gramian))

    return from_kernel(kernel)


ROW = Row(
    avgnorm,
    scale="sum of K gradients, each scaled to the norm of their sum",
    papers=(
        Paper(
            "Revisit the Imbalance Optimization in Multi-task Learning: An Experimental Analysis",
            "Yihang Guo, Tianyuan Yu, Liang Bai, Yanming Guo, Yirun Ruan, William Li, Weishi Zheng",
            2025,
            arxiv="2509.23915",
        ),
    ),
    note="formula from a summary",
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
)
