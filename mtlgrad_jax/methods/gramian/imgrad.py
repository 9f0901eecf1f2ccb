"""IMGrad, imbalance-sensitive gradients (Zhou, Liu, Zhao & Gong, IJCAI 2025, arXiv 2503.08006).

Follows the official NYUv2 code (zzpustc/IMGrad), solved exactly; its `offset` of 3/2 is 1 in the paper's (11). The code
for Cityscapes scales only a part of the inner product.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import Number, check_choice, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, uniform
from mtlgrad_jax.methods.gramian.cagrad import Rescale
from mtlgrad_jax.solvers import max_min_direction, min_norm, normalized


def imgrad(c: Number = 0.8, rescale: Rescale = "none", offset: Number = 1.5) -> Method:
    r"""Turn the mean gradient towards the worst-off task, the more so the less it agrees with the min-norm point.

    .. math:: w = \arg\min_w (o - \phi) \langle g_w, g_0 \rangle + \phi \, c \, \|g_0\| \|g_w\|, \qquad
              d = g_0 + c \, \|g_0\| \frac{g_w}{\|g_w\|}, \qquad \phi = \cos(g_0, g_{mn})

    with w on the simplex, :math:`g_w = \sum_i w_i g_i`, :math:`g_0` the mean gradient and :math:`g_{mn}` the min-norm
    point of the gradients' convex hull. So w is that of CAGrad with the radius :math:`c \phi / (o - \phi)`, the same
    for :math:`\phi = o/2`. The smaller :math:`\phi` is, a sign of conflicts or of very different lengths, the more the
    worst-off tasks count. d stays in the ball of radius c. The least value of :math:`\phi` and :math:`o - \phi` is the
    root of the dtype's eps, below which they cannot be told from zero. Where :math:`g_w = 0`, and its direction
    undefined, :math:`d - g_0` is that of CAGrad with the smaller radius, times :math:`(o - \phi) / \phi`.

    Args:
      c: radius of the ball around the mean gradient, divided by its norm, >= 0: 0.8 in the official scripts. With
        values below 1 the mean loss descends.
      rescale: "none", or divide by "1+c^2" (official code) or "1+c", as in `cagrad`.
      offset: :math:`o` >= 1; 1 in the paper.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.imgrad()
      >>> grads = jnp.asarray([[2.0, 0.0], [-1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.4625, 1.0644]
    """
    check_number("c", c, at_least=0)
    check_choice("rescale", rescale, ("none", "1+c^2", "1+c"))
    check_number("offset", offset, at_least=1)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        radius = jnp.asarray(c, gramian.dtype)
        agreement = _agreement(gramian, present)
        share = agreement / jnp.maximum(offset - agreement, jnp.sqrt(jnp.finfo(gramian.dtype).eps))
        solved = max_min_direction(gramian, radius * share, present)
        weights = uniform(present) + solved.value / share
        divisor = {"none": 1, "1+c^2": 1 + radius**2, "1+c": 1 + radius}[rescale]
        return solved._replace(value=weights / divisor)

    return from_kernel(kernel, mean_like=True)


def _agreement(gramian: Gramian, present: Present) -> Float[Array, ""]:
    """Return the cosine of the mean gradient with the min-norm point."""
    M, mean = normalized(gramian), uniform(present)
    shortest, eps = min_norm(M, present).value, jnp.finfo(M.dtype).eps
    square, size = shortest @ M @ shortest, mean @ M @ mean
    rounding = 4 * len(M) * eps * (shortest @ jnp.sqrt(jnp.diagonal(M))) ** 2
    defined = (square > rounding) & (size > 0)
    cosine = (mean @ M @ shortest) / jnp.where(defined, jnp.sqrt(square) * jnp.sqrt(size), 1)
    return jnp.clip(jnp.where(defined, cosine, 0), jnp.sqrt(eps), 1)


ROW = Row(
    imgrad,
    scale="mean",
    papers=(
        Paper(
            "Injecting Imbalance Sensitivity for Multi-Task Learning",
            "Zhipeng Zhou, Liu Liu, Peilin Zhao, Wei Gong",
            2025,
            booktitle="IJCAI",
            arxiv="2503.08006",
        ),
    ),
    note="default offset from the official code",
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
    checked="numpy float64 of the dual; formula from official code",
)
