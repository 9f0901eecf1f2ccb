"""The AND-mask (Parascandolo et al. 2020, arXiv 2009.00329, "Learning explanations that are hard to vary").

Follows the official code (gibipara92/learning-explanations-hard-to-vary), which has no default threshold; 1 is the
logical AND of the name. Its 1e-10 beside the share of coordinates kept is omitted.
"""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_flag, check_number
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, LINEAR, NON_CONFLICTING, PERMUTATION, Row
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present


def sign_agreement(threshold: Number = 1.0, rescale: bool = False) -> Method:
    r"""Keep the mean gradient in the coordinates in which the tasks' signs agree, and nothing elsewhere.

    .. math:: d_j = \bar g_j \, \Bigl[ \, \Bigl| \frac1K \sum_i \operatorname{sign} g_{ij} \Bigr| \ge \tau \Bigr]

    Zeros have sign 0. With :math:`\tau` = 1 all gradients must be nonzero and of one sign, so no task ascends in any
    coordinate; with tasks that each have parameters of their own, such parameters never move.

    Args:
      threshold: :math:`\tau` in [0, 1]: 0 keeps everything, 0.5 what three of four tasks agree on against the fourth.
      rescale: whether to divide each leaf by the share of its coordinates that are kept, as the official code can.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.sign_agreement()
      >>> grads = jnp.asarray([[1.0, 3.0, -1.0], [3.0, -1.0, -2.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [2.0, 0.0, -1.5]
    """
    check_number("threshold", threshold, at_least=0, at_most=1)
    check_flag("rescale", rescale)

    def rule(task_grads: PyTree, *, present: Present) -> PyTree:
        count = jnp.maximum(jnp.sum(present), 1).astype(accumulator_dtype())
        needed = jnp.ceil(threshold * count * (1 - 4 * jnp.finfo(count.dtype).eps))

        def mask(leaf: Array) -> Array:
            def visit(sums: tuple[Array, Array], i: Array | int, row: Array) -> tuple[Array, Array]:
                row = jnp.where(present[i], row, 0)
                return sums[0] + row, sums[1] + jnp.sign(row)

            none = jnp.zeros(leaf.shape[1:], jnp.promote_types(leaf.dtype, jnp.float32))
            total, signs = stacks.fold_rows(visit, (none, none), leaf)
            agreed = jnp.abs(signs) >= needed
            mean = jnp.where(agreed, total / count.astype(total.dtype), 0)
            return mean * (agreed.size / jnp.maximum(jnp.sum(agreed), 1)) if rescale else mean

        return stacks.by_coordinate(mask, task_grads, present=present)

    return from_rule(rule, leaves_alike=not rescale, shows_nonfinite=True)


ROW = Row(
    sign_agreement,
    scale="mean",
    papers=(
        Paper(
            "Learning explanations that are hard to vary",
            "Giambattista Parascandolo, Alexander Neitz, Antonio Orvieto, Luigi Gresele, Bernhard Schölkopf",
            2021,
            booktitle="ICLR",
            arxiv="2009.00329",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, PERMUTATION, LINEAR}),
    checked="numpy float64 of the published formula; formula from official code",
)
