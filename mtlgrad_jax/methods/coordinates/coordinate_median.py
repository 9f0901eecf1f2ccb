"""The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498)."""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present


def coordinate_median() -> Method:
    r"""Take the median of every coordinate over the tasks, the mean of the two middle values for an even number.

    .. math:: d_j = \operatorname{median}_i \, g_{ij}

    Fewer than half of the tasks, whatever their gradients, cannot move a coordinate outside the range of the others.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.coordinate_median()
      >>> grads = jnp.asarray([[1e9, 3.0], [1.0, -1e9], [2.0, 4.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [2.0, 3.0]
    """

    def rule(task_grads: PyTree, *, present: Present) -> PyTree:
        num_tasks = len(present)
        even = jnp.sum(present) % 2 == 0
        below = ~present & (jnp.cumsum(~present) % 2 == 0)  # of the absent tasks, every other one
        pairs = _network(num_tasks)

        def leaf_median(leaf: Array) -> Array:
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            largest = jnp.finfo(dtype).max
            rows = [
                jnp.where(present[i], leaf[i].astype(dtype), jnp.where(below[i], -largest, largest))
                for i in range(num_tasks)
            ]
            for i, j in pairs:
                rows[i], rows[j] = jnp.minimum(rows[i], rows[j]), jnp.maximum(rows[i], rows[j])
            low, high = rows[num_tasks // 2 - 1], rows[num_tasks // 2]  # in the middle too if absent tasks are odd
            return jnp.where(even, low / 2 + high / 2, high if num_tasks % 2 else low)

        return stacks.by_coordinate(leaf_median, task_grads, present=present)

    return from_rule(rule, leaves_alike=True, shows_nonfinite=True)


def _network(count: int) -> list[tuple[int, int]]:
    """Return the exchanges that sort `count` values: Batcher's odd-even merge sort, Knuth's Algorithm 5.2.2M."""
    pairs = []
    top = 1 << max(count - 1, 1).bit_length() - 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return pairs


ROW = Row(
    coordinate_median,
    scale="mean",
    papers=(
        Paper(
            "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
            "Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett",
            2018,
            booktitle="ICML",
            arxiv="1803.01498",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
)
