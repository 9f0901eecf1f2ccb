"""FairGrad, alpha-fair multi-task learning (Ban & Ji 2024, arXiv 2402.15638).

The official code solves the same equation with scipy and multiplies the result by K; this does neither.
"""

from mtlgrad_jax._core.checks import Number, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, NON_CONFLICTING, PERMUTATION, Row
from mtlgrad_jax.solvers import alpha_fair


def fairgrad(alpha: Number = 2.0) -> Method:
    r"""Share the first-order decrease of the losses alpha-fairly.

    .. math:: d = \sum_i w_i g_i, \qquad \langle g_i, d \rangle = w_i^{-1/\alpha}, \quad w_i > 0

    Every task descends. Tasks with zero gradient take no part. At Pareto-stationary points the equation has no
    solution; the weights stay finite and d small, see `mtlgrad_jax.solvers`.

    Args:
      alpha: fairness :math:`\alpha` > 0: the sum towards 0, Nash-MTL at 1, minimum potential delay at 2 (official
        scripts), max-min fairness towards infinity.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.fairgrad(alpha=2.0)
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.0313, 0.7908, 0.7908]
    """
    check_number("alpha", alpha, above=0)

    def kernel(*, gramian: Gramian) -> Weights:
        return alpha_fair(gramian, alpha)

    return from_kernel(kernel)


ROW = Row(
    fairgrad,
    scale="as solved",
    papers=(
        Paper(
            "Fair Resource Allocation in Multi-Task Learning",
            "Hao Ban, Kaiyi Ji",
            2024,
            booktitle="ICML",
            arxiv="2402.15638",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, PERMUTATION}),
    checked="the equation's residual; published values; formula from official code",
)
