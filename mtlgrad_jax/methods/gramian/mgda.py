"""MGDA, the multiple-gradient descent algorithm (Desideri 2012; Sener & Koltun 2018, arXiv 1810.04650).

The min-norm point is exact; the official code and TorchJD stop early. The normalisations are those of the official
code, not of the paper.
"""

from typing import Literal

import jax.numpy as jnp

from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, NON_CONFLICTING, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.weights import Present, ratios
from mtlgrad_jax.solvers import cosines, min_norm


def mgda(
    normalization: Literal["none", "l2", "loss", "loss+"] = "none", apply_to: Literal["raw", "normalized"] = "raw"
) -> Method:
    r"""Follow the min-norm point of the gradients' convex hull, along which every task descends unless it is zero.

    .. math:: w = \arg\min_{w \ge 0, \, 1^T w = 1} \Bigl\| \sum_i w_i g_i / s_i \Bigr\|^2

    With a normalisation, the guarantee holds for the normalised combination; with "raw", a task may ascend.

    Args:
      normalization: the scale :math:`s_i`: 1 ("none"), :math:`\|g_i\|` ("l2"), the loss :math:`l_i` ("loss") or
        :math:`l_i \|g_i\|` ("loss+"). The last two skip a step with a loss <= 0. With any but "none", tasks of zero
        scale count as zero rows, for which the min-norm point is zero.
      apply_to: whether the weights multiply the gradients themselves ("raw", official code) or the normalised ones
        ("normalized", LibMTL).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.mgda()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.0, 1.0, 1.0]
    """
    check_choice("normalization", normalization, ("none", "l2", "loss", "loss+"))
    check_choice("apply_to", apply_to, ("raw", "normalized"))
    by_norm, by_loss = normalization in ("l2", "loss+"), normalization in ("loss", "loss+")

    def kernel(*, gramian: Gramian, present: Present, losses: Losses | float = 1.0) -> Weights:
        if normalization == "none":
            return min_norm(gramian, present)
        C, inverse_norms = cosines(gramian)
        positive = inverse_norms > 0
        norms = jnp.where(positive, 1 if by_norm else 1 / jnp.where(positive, inverse_norms, 1), 0).astype(C.dtype)
        lengths = ratios(norms, jnp.broadcast_to(losses, norms.shape).astype(C.dtype), present)
        solved = min_norm(C * lengths[:, None] * lengths[None, :], present)
        if apply_to == "raw":
            return solved
        return solved._replace(value=solved.value * (inverse_norms if by_norm else 1) / losses)

    return from_kernel(kernel, arguments=(POSITIVE_LOSSES,) if by_loss else (), mean_like=True)


ROW = Row(
    mgda,
    scale="mean (weights sum to 1)",
    papers=(
        Paper(
            "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
            "Jean-Antoine Désidéri",
            2012,
            journal="Comptes Rendus Mathematique",
            doi="10.1016/j.crma.2012.03.014",
        ),
        Paper(
            "Multi-Task Learning as Multi-Objective Optimization",
            "Ozan Sener, Vladlen Koltun",
            2018,
            booktitle="NeurIPS",
            arxiv="1810.04650",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
    checked="support enumeration and scipy's NNLS; duality gap; published values; formula from official code",
)
