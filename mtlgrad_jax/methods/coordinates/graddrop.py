"""GradDrop, gradient sign dropout (Chen et al. 2020, arXiv 2010.06808), on the gradients of parameters.

The paper drops the gradients at an activation, after multiplying them by its sign; other libraries and this one drop
those of the parameters. The leak is the paper's: 1 keeps the plain sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_numbers
from mtlgrad_jax._core.joined import draw_like
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, make_key, uniform
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.trees import row_shapes
from mtlgrad_jax._core.weights import Present, of_tasks, one_for_all


class GradDropState(NamedTuple):
    """State of graddrop."""

    key: Key  # for the next step's draws


def graddrop(leak: PyTree = 0.0, key: Seed = 0) -> Method:
    r"""In every coordinate, keep the gradients of one sign, drawn with the probability of that sign's share.

    .. math:: p_j = \frac{\sum_i \max(g_{ij}, 0)}{\sum_i |g_{ij}|}, \qquad
              d_j = \sum_i \bigl( \lambda_i + (1 - \lambda_i) \, m_{ij} \bigr) g_{ij}, \qquad
              m_{ij} = [\, u_j < p_j \Leftrightarrow g_{ij} > 0 \,]

    with one uniform draw :math:`u_j` for all tasks. Where gradients agree in sign, d is their sum; where all are zero,
    zero. If the leak is the same for all tasks, the expectation of d is the plain sum.

    Args:
      leak: :math:`\lambda` in [0, 1], the part of each gradient that is never dropped; one for all or one per task.
      key: seed or key; the same on every process. Under vmap over runs, make the method inside, `graddrop(key=key)`,
        with a key for each run: `vmap(tx.init)` gives all runs the same key.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.graddrop()
      >>> grads = jnp.asarray([[1.0, 0.0, 3.0], [2.0, 0.0, -1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update[:2].tolist(), update[2].item() in (3.0, -1.0)
      ([3.0, 0.0], True)
    """
    check_numbers("leak", leak, at_least=0, at_most=1)
    check_key(key)

    def rule(task_grads: PyTree, *, present: Present, state: GradDropState) -> tuple[PyTree, GradDropState]:
        leaks = of_tasks("leak", leak, present, 0.0)
        following, draw = draw_key(state.key)
        floating = [leaf for leaf in jax.tree.leaves(task_grads) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        dtype = jnp.result_type(jnp.float32, *floating)
        draws = draw_like(lambda key, shape: uniform(key, shape, dtype), draw, row_shapes(task_grads))

        def drop(leaf: Array, drawn: Array) -> Array:
            def visit(sums: tuple[Array, ...], i: Array | int, row: Array) -> tuple[Array, ...]:
                up, down, leaked_up, leaked_down = sums
                row = jnp.where(present[i], row, 0)
                high, low = jnp.maximum(row, 0), jnp.minimum(row, 0)
                own = leaks[i].astype(row.dtype)
                return up + high, down + low, leaked_up + own * high, leaked_down + own * low

            # an infinite entry shows in both branches, even with a leak of zero: 0 times infinity is NaN
            none = jnp.zeros(leaf.shape[1:], jnp.promote_types(leaf.dtype, jnp.float32))
            up, down, leaked_up, leaked_down = stacks.fold_rows(visit, (none,) * 4, leaf)
            return jnp.where(drawn * (up - down) < up, up + leaked_down, down + leaked_up)

        return stacks.by_coordinate(drop, task_grads, draws, present=None), GradDropState(following)

    def init(params: PyTree, num_tasks: int | None) -> GradDropState:
        return GradDropState(make_key(key))

    per_task = {} if one_for_all(leak) else {"leak": leak}
    return from_rule(rule, init, per_task=per_task, leaves_alike=True, shows_nonfinite=True)


ROW = Row(
    graddrop,
    scale="sum (where the signs agree)",
    state="a random key",
    papers=(
        Paper(
            "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
            "Zhao Chen, Jiquan Ngiam, Yanping Huang, Thang Luong, Henrik Kretzschmar, Yuning Chai, Dragomir Anguelov",
            2020,
            booktitle="NeurIPS",
            arxiv="2010.06808",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
    checked="numpy float64 of the published law; TorchJD, in law",
    randomized=True,
)
