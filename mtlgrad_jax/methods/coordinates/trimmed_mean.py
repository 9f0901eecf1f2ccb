"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498).

The definition follows TorchJD, which trims a number of rows; the paper trims a fraction.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count
from mtlgrad_jax._core.control import repeat
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.methods.coordinates.coordinate_median import ROW as COORDINATE_MEDIAN

_UNROLLED = 32  # values passed on per coordinate, up to which one fused loop compiles faster than a loop over rows


def trimmed_mean(trim: int = 1) -> Method:
    r"""Average every coordinate over the tasks, leaving out its smallest and largest values.

    .. math:: d_j = \frac{1}{K - 2b} \sum_{i = b + 1}^{K - b} g_{(i) j}

    with :math:`g_{(i) j}` the i-th smallest of the j-th coordinates. NaN or infinite coordinates are not trimmed; they
    cause the step to be skipped. Wrap the method in `skip_nonfinite_tasks` to drop such a task instead.

    Args:
      trim: :math:`b` >= 0, the number of values dropped at either end. Needs 2b + 1 tasks.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.trimmed_mean(trim=1)
      >>> grads = jnp.asarray([[1e9, 3.0], [1.0, -1e9], [-1e8, 1e8], [2.0, 2.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.5, 2.5]
    """
    check_count("trim", trim, at_least=0)

    def rule(task_grads: PyTree, *, present: Present) -> PyTree:
        count = jnp.sum(present)

        def leaf_mean(leaf: Array) -> Array:
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            share = 1 / jnp.maximum(count - 2 * trim, 1).astype(dtype)

            def visit(i: Array | int, kept: tuple) -> tuple:
                """Pass a row by the least and the largest so far; what it pushes out of both joins the mean."""
                least, largest, mean = kept
                row = jnp.where(present[i], leaf[i].astype(dtype), jnp.inf)
                least, row = _exchange(jnp.minimum, jnp.maximum, least, row)
                largest, row = _exchange(jnp.maximum, jnp.minimum, largest, jnp.where(row < jnp.inf, row, -jnp.inf))
                return least, largest, mean + jnp.where(row > -jnp.inf, row * share, 0)

            none = [jnp.full(leaf.shape[1:], value, dtype) for value in (jnp.inf, -jnp.inf, 0)]
            start = (none[0],) * trim, (none[1],) * trim, none[2]
            unrolled = len(leaf) * (2 * trim + 1) <= _UNROLLED
            return repeat(0, len(leaf), visit, start, unrolled=unrolled)[-1]

        return stacks.by_coordinate(leaf_mean, task_grads, present=present)

    return from_rule(rule, fewest=2 * trim + 1, leaves_alike=True, shows_nonfinite=True)


def _exchange(keep: Callable, give: Callable, slots: tuple[Array, ...], row: Array) -> tuple[tuple[Array, ...], Array]:
    """Pass a row by some slots, of which each keeps one of two values of a coordinate and gives the other."""
    kept = []
    for slot in slots:
        kept.append(keep(slot, row))
        row = give(slot, row)
    return tuple(kept), row


ROW = Row(
    trimmed_mean,
    scale="mean",
    papers=COORDINATE_MEDIAN.papers,
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
    fewest=3,
    checked="numpy float64 of the published formula; definition from TorchJD",
)
