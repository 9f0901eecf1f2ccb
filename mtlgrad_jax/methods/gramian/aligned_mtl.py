"""Aligned-MTL, independent component alignment (Senushkin et al. 2023, arXiv 2305.19000).

Sum-like, as in the official code and LibMTL; TorchJD weights tasks by 1/K. Cut-offs use the eps of the Gramian's dtype,
those of the official code that of torch's default dtype.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import check_choice, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks
from mtlgrad_jax.solvers import significant_eigh


def aligned_mtl(scale: Literal["min", "median", "rmse"] = "min", weights: PyTree = None) -> Method:
    r"""Make the gradients' principal components equally long, then add the gradients.

    .. math:: w = \sqrt{\lambda_s} \, M^{-1/2} p, \qquad \lambda_s = \min_k \lambda_k

    with the inverse root taken over the eigenvalues of :math:`M` above rounding: :math:`(K + 16) \epsilon` times the
    largest, :math:`K \epsilon` in the official code. Some tasks may ascend.

    Args:
      scale: :math:`\lambda_s`: the smallest ("min", paper), lower median ("median") or mean ("rmse") of the eigenvalues
        kept.
      weights: :math:`p`, not all 0, (K,) or a pytree under the tasks' names; ones for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.aligned_mtl()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.4266, 1.9347, 1.9347]
    """
    check_choice("scale", scale, ("min", "median", "rmse"))
    check_numbers("weights", weights, optional=True, nonzero=True)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        p = of_tasks("weights", weights, present, 1.0)
        values, vectors, kept = significant_eigh(gramian)
        rank = jnp.sum(kept)
        ascending = jnp.sort(jnp.where(kept, values, jnp.inf))  # in units of the largest
        scales = {
            "min": ascending[0],
            "median": ascending[(jnp.maximum(rank, 1) - 1) // 2],
            "rmse": jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1),
        }
        roots = jnp.where(kept, jnp.sqrt(scales[scale] / jnp.where(kept, values, 1)), 0)
        return jnp.where(rank > 0, vectors @ (roots * (vectors.T @ p)), p)

    return from_kernel(kernel, per_task={"weights": weights})


ROW = Row(
    aligned_mtl,
    scale="sum",
    papers=(
        Paper(
            "Independent Component Alignment for Multi-Task Learning",
            "Dmitry Senushkin, Nikolay Patakin, Arseny Kuznetsov, Anton Konushin",
            2023,
            booktitle="CVPR",
            arxiv="2305.19000",
        ),
    ),
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
    checked="numpy float64 of the published formula; TorchJD; published values",
)
