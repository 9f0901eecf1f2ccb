"""EMTL, equitable multi-task learning (Yuan & Zhang 2023, arXiv 2306.09373): a RECONSTRUCTION from its abstract.

According to the abstract, a variance regulariser equalises each task's loss divided by its raw gradient norm. No code
is published; the update here is the gradient of that objective with norms held constant.
"""

import jax.numpy as jnp

from mtlgrad_jax._core.checks import Number, check_number
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.weights import Present, mean_of
from mtlgrad_jax.solvers import inverse_sqrt


def emtl(strength: Number) -> Method:
    r"""Equalise the tasks' relative contributions, loss over gradient norm. A reconstruction, not the authors' method.

    .. math:: \min_\theta \sum_i l_i + \lambda \operatorname{Var}_i(r_i), \quad r_i = \frac{l_i}{\|g_i\|}, \qquad
              w_i = \max\!\Bigl(1 + \frac{2 \lambda}{K} \frac{r_i - \bar r}{\|g_i\|}, \, 0\Bigr)

    with the norms held constant. Losses must be positive; a step with a loss <= 0 is skipped and counted. Tasks with
    zero gradient take no part: they have weight 1 and do not count in K. The weights cannot all be zero: that of the
    largest :math:`r_i` is at least 1.

    Args:
      strength: :math:`\lambda` >= 0, in units of squared gradient norm over loss; 0 gives the sum.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.emtl(strength=1.0)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 2.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([2.0, 2.0]))
      >>> update.tolist()
      [1.5, 1.5]
    """
    check_number("strength", strength, at_least=0)

    def kernel(*, gramian: Gramian, losses: Losses, present: Present) -> Weights:
        inverse = inverse_sqrt(jnp.diagonal(gramian))
        moving = present & (inverse > 0)
        ratio = losses * inverse
        excess = ratio - mean_of(ratio, moving)
        return jnp.maximum(1 + 2 * strength / jnp.maximum(jnp.sum(moving), 1) * excess * inverse, 0)

    return from_kernel(kernel, arguments=(POSITIVE_LOSSES,))


ROW = Row(
    emtl,
    scale="sum if all r are equal",
    papers=(
        Paper(
            "Equitable Multi-task Learning",
            "Jun Yuan, Rui Zhang",
            2023,
            arxiv="2306.09373",
        ),
    ),
    note="a reconstruction from the abstract",
    promises=frozenset({PERMUTATION}),
    kwargs=lambda num_tasks: {"strength": 1.0},
    checked="numpy float64 of the reconstructed objective's derivative, not of a published formula",
)
