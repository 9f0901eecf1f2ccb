"""ConicGrad (Hassanpour et al. 2025, arXiv 2502.00217).

Reconstructed from the abstract: the program below follows from its statements and the norm bound that they imply. It is
solved exactly; the paper's closed form is unverified and not used.
"""

import jax.numpy as jnp

from mtlgrad_jax._core.checks import Number, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import conic_direction


def conicgrad(c: Number = 0.5) -> Method:
    r"""Follow the direction that improves the worst-off task most, within an angle of the mean gradient.

    .. math:: d = \|g_0\| \arg\max_{\|u\| \le 1} \min_i \langle g_i, u \rangle \quad \text{s.t.} \quad
              \langle g_0, u \rangle \ge c \|g_0\| \|u\|

    with :math:`g_0` the mean gradient. If no direction in the cone descends every task, d is :math:`g_0`, and this is
    counted.

    Args:
      c: cosine of the cone's half-angle, in [0, 1): 0 allows a half-space; towards 1 the result becomes the mean. The
        paper's values are unknown. If MGDA's direction lies in the cone, it is the result.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.conicgrad(c=0.9)
      >>> grads = jnp.asarray([[3.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.5, -1.0, 4.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.6582, 1.4112, 1.2214]
    """
    check_number("c", c, at_least=0, below=1)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        return conic_direction(gramian, jnp.asarray(c, gramian.dtype), present)

    return from_kernel(kernel, mean_like=True)


ROW = Row(
    conicgrad,
    scale="norm of the mean gradient",
    papers=(
        Paper(
            "Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone",
            "Negar Hassanpour, Muhammad Kamran Janjua, Kunlin Zhang, Sepehr Lavasani, Xiaowen Zhang, Chunhua "
            "Zhou, Chao Gao",
            2025,
            arxiv="2502.00217",
        ),
    ),
    note="abstract only; its closed form is unverified",
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
    checked="an independent solve of the dual; brute force over directions",
)
