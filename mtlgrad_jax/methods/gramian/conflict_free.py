"""ConFIG, conflict-free inverse gradients (Liu, Chu & Thuerey 2025, arXiv 2408.11104).

The paper and its code use the stacked gradients; here the pseudo-inverse of the unit gradients comes from the cosines.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import check_choice, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, mean_of, of_tasks
from mtlgrad_jax.solvers import cosines, direction_of_products

Length = Literal["projection", "min", "max", "harmonic", "arithmetic", "geometric"]


def conflict_free(length: Length = "projection", weights: PyTree = None) -> Method:
    r"""Follow the direction that has the same cosine with every task.

    .. math:: u = \frac{U^+ p}{\|U^+ p\|}, \qquad d = \Bigl( \sum_i \langle g_i, u \rangle \Bigr) u

    with the unit gradients as rows of :math:`U`. If :math:`U^\top p` is zero up to rounding (for two tasks in float32:
    within 2e-3 of opposite), d is zero. If the gradients are linearly independent, all tasks descend at the same rate.
    Tasks with zero gradient take no part.

    Args:
      length: length of d: the sum of the projections ("projection", official default), or the sum of the cosines times
        the smallest, largest, or harmonic, arithmetic or geometric mean norm.
      weights: :math:`p`, the ratios of the cosines, not all 0, (K,) or a pytree under the tasks' names; ones for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.conflict_free()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.1588, 2.0706, 2.0706]
    """
    check_choice("length", length, ("projection", "min", "max", "harmonic", "arithmetic", "geometric"))
    check_numbers("weights", weights, optional=True, nonzero=True)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        return equal_cosines(gramian, of_tasks("weights", weights, present, 1.0), length)

    return from_kernel(kernel, per_task={"weights": weights})


def equal_cosines(gramian: Gramian, ratios: Float[Array, " K"], length: Length) -> Float[Array, " K"]:
    """Return the weights of the update whose cosines with the gradients are in the given ratios."""
    C, inverse_norms = cosines(gramian)
    rows = inverse_norms > 0
    b, products = direction_of_products(C, jnp.where(rows, ratios, 0))
    square = b @ products
    norms = jnp.where(rows, 1 / jnp.where(rows, inverse_norms, 1), 0)
    total = norms @ products if length == "projection" else _mean(length, norms, rows) * jnp.sum(products)
    scale = jnp.where(square > 0, total / jnp.where(square > 0, square, 1), 0)
    return scale * b * inverse_norms


def _mean(kind: Length, norms: Array, rows: Present) -> Array:
    safe = jnp.where(rows, norms, 1)
    means = {
        "min": jnp.min(jnp.where(rows, norms, jnp.inf)),
        "max": jnp.max(norms),
        "harmonic": 1 / mean_of(1 / safe, rows),
        "arithmetic": mean_of(norms, rows),
        "geometric": jnp.exp(mean_of(jnp.log(safe), rows)),
    }
    return jnp.where(jnp.any(rows), means[kind], 0)


ROW = Row(
    conflict_free,
    scale="sum (of the projections)",
    papers=(
        Paper(
            "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
            "Qiang Liu, Mengyu Chu, Nils Thuerey",
            2025,
            booktitle="ICLR",
            arxiv="2408.11104",
        ),
    ),
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, LINEAR}),
    checked="the dense pseudo-inverse; TorchJD; published values",
)
