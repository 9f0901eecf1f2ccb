"""Krum and Multi-Krum (Blanchard et al. 2017, NeurIPS, "Machine Learning with Adversaries").

The paper sums squared distances; TorchJD sums plain distances, which sometimes selects another gradient.
"""

import jax.numpy as jnp
from jax import lax

from mtlgrad_jax._core.checks import check_count, check_flag
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import inverse_sqrt


def krum(num_byzantine: int, num_selected: int = 1, squared: bool = True) -> Method:
    r"""Average the gradients that are nearest to their neighbours, leaving out outliers.

    .. math:: s_i = \sum_{j \in N_i} \|g_i - g_j\|^2, \qquad d = \operatorname{mean} \{ g_i : s_i \text{ among the
              lowest} \}

    with :math:`N_i` the K - f - 2 nearest other gradients. On equal scores, the lower index wins; with one neighbour,
    K = f + 3, the nearest pair always has equal scores.

    Args:
      num_byzantine: f, the number of gradients that may be arbitrary; at least f + 3 tasks must be present.
      num_selected: number of gradients to average.
      squared: whether distances are squared (paper) or not (TorchJD).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.krum(num_byzantine=1, num_selected=4)
      >>> grads = jnp.asarray([[1.0, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [1.25, 0.75, 1.5]
    """
    check_count("num_byzantine", num_byzantine, at_least=0)
    check_count("num_selected", num_selected, at_least=1)
    check_flag("squared", squared)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        # In units of a typical row, so that neither tiny distances nor an outlier's leave the range of the dtype.
        typical = jnp.sort(jnp.where(present, jnp.diagonal(gramian), jnp.inf))[
            jnp.maximum(jnp.sum(present) - 1, 0) // 2
        ]
        inverse = inverse_sqrt(typical[None])[0]
        gramian = gramian * jnp.where(inverse > 0, inverse, 1) * jnp.where(inverse > 0, inverse, 1)
        diagonal = jnp.diagonal(gramian)
        distances = jnp.maximum(diagonal[:, None] + diagonal[None, :] - 2 * gramian, 0)
        distances = distances if squared else jnp.sqrt(distances)
        others = present[:, None] & present[None, :] & ~jnp.eye(len(gramian), dtype=bool)
        # All but the f + 1 furthest are neighbours. Subtracting these from the total would cancel if one is an outlier.
        furthest = lax.top_k(jnp.where(others, distances, -1), min(num_byzantine + 1, len(gramian)))[1]
        near = jnp.put_along_axis(others, furthest, False, axis=1, inplace=False)
        scores = jnp.where(present, jnp.sum(jnp.where(near, distances, 0), axis=1), jnp.inf)
        rank = jnp.argsort(jnp.lexsort((scores, ~present)))
        return (present & (rank < num_selected)) / num_selected

    return from_kernel(kernel, fewest=max(num_byzantine + 3, num_selected), mean_like=True)


ROW = Row(
    krum,
    scale="mean",
    papers=(
        Paper(
            "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
            "Peva Blanchard, El Mahdi El~Mhamdi, Rachid Guerraoui, Julien Stainer",
            2017,
            booktitle="NeurIPS",
            arxiv="1703.02757",
        ),
    ),
    promises=frozenset({HOMOGENEOUS}),
    kwargs=lambda num_tasks: {"num_byzantine": 0},
    fewest=3,
    checked="numpy float64 of the published formula; TorchJD; published values",
)
