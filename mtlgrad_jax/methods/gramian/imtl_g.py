"""IMTL-G, impartial gradients (Liu et al. 2021, ICLR, "Towards Impartial Multi-task Learning").

The paper's closed form inverts a matrix of differences; here the same conditions are solved on the cosines, which may
have any rank.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax.solvers import Solution, cosines, direction_of_products
from mtlgrad_jax.solvers._solution import closed_form


def imtl_g(sign: Literal["paper", "descent"] = "paper") -> Method:
    r"""Find the combination onto which all unit gradients have the same projection.

    .. math:: \langle d, g_i / \|g_i\| \rangle = \langle d, g_j / \|g_j\| \rangle, \qquad d = \sum_i w_i g_i, \qquad
              \sum_i w_i = 1

    With :math:`C` the cosines, :math:`z = C^+ 1` and :math:`v_i = z_i / \|g_i\|` this is :math:`w = v / \sum_j v_j`.
    The common projection is positive for v, but the sum of v can be negative, and then d **ascends on every task**. As
    the sum approaches zero, the weights grow without bound; at zero the mean is used instead and counted. If the unit
    gradients cancel, w is proportional to their inverse norms and d is zero. Tasks with zero gradient take no part.

    Args:
      sign: "paper", or "descent" to divide by the absolute value of the sum, so that no task ascends.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.imtl_g()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.0767, 1.0, 1.0]
    """
    check_choice("sign", sign, ("paper", "descent"))

    def kernel(*, gramian: Gramian) -> Weights:
        return impartial_weights(gramian, sign)

    return from_kernel(kernel, mean_like=True)


def impartial_weights(gramian: Gramian, sign: str, scale: Float[Array, " K"] | float = 1.0) -> Solution:
    """Return the weights of imtl_g, or those that sum to 1 once divided by `scale`."""
    C, inverse_norms = cosines(gramian)
    # In units of the smallest row norm, so that neither v nor its sum overflows.
    unit = inverse_norms / jnp.maximum(jnp.max(inverse_norms), jnp.finfo(C.dtype).tiny)
    ones = (unit > 0).astype(C.dtype)
    z = direction_of_products(C, ones)[0]
    v = jnp.where(jnp.any(z != 0), z, ones) * unit
    parts = v / scale
    total = jnp.sum(parts)
    rounding = 4 * jnp.sum(unit > 0) * jnp.finfo(C.dtype).eps * jnp.sum(jnp.abs(parts))
    total = jnp.abs(total) if sign == "descent" else total
    defined = (jnp.abs(total) > rounding) | ~jnp.any(unit > 0)
    return closed_form(v / jnp.where(defined & (total != 0), total, 1), defined)


ROW = Row(
    imtl_g,
    scale="weights sum to 1",
    papers=(
        Paper(
            "Towards Impartial Multi-task Learning",
            "Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao, Wayne Zhang",
            2021,
            booktitle="ICLR",
            openreview="IMPnRXEWpvr",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    checked="the paper's closed form; equal projections; TorchJD; published values",
)
