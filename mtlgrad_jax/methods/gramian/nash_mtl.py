"""Nash-MTL, multi-task learning as a bargaining game (Navon et al. 2022, arXiv 2202.01017).

Solved exactly in every call, without state. The official code takes up to 20 convex-concave steps from the last
weights, reuses weights over several steps (`update_every` does this) and clips the shared gradient to norm 1
(`optax.clip_by_global_norm`).
"""

from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, NON_CONFLICTING, PERMUTATION, SCALE_FREE, Row
from mtlgrad_jax.solvers import alpha_fair


def nash_mtl() -> Method:
    r"""Follow the Nash bargaining solution: proportionally fair and invariant to the scale of each loss.

    .. math:: d = \sum_i w_i g_i, \qquad \langle g_i, d \rangle = 1 / w_i, \quad w_i > 0

    Every task descends, and :math:`\|d\|^2 = K`. Tasks with zero gradient take no part. At Pareto-stationary points
    the equation has no solution; the weights stay finite and d small, see `mtlgrad_jax.solvers`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.nash_mtl()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.0766, 0.9985, 0.9985]
    """

    def kernel(*, gramian: Gramian) -> Weights:
        return alpha_fair(gramian, 1.0)

    return from_kernel(kernel)


ROW = Row(
    nash_mtl,
    scale="norm sqrt(K)",
    papers=(
        Paper(
            "Multi-Task Learning as a Bargaining Game",
            "Aviv Navon, Aviv Shamsian, Idan Achituve, Haggai Maron, Kenji Kawaguchi, Gal Chechik, Ethan Fetaya",
            2022,
            booktitle="ICML",
            arxiv="2202.01017",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, SCALE_FREE, PERMUTATION}),
    checked="the equation's residual; published values; formula from official code",
)
