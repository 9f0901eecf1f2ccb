"""Capped MGDA (Hu, Ho & Yu 2026, arXiv 2605.30452).

A reconstruction from the abstract: here the cap bounds each weight.
"""

import jax.numpy as jnp

from mtlgrad_jax._core.checks import Number, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import capped_min_norm


def capped_mgda(cap: Number) -> Method:
    r"""Follow the min-norm point of the gradients' convex hull in which no weight exceeds a cap.

    .. math:: w = \arg\min_w \Bigl\| \sum_i w_i g_i \Bigr\|^2 \quad \text{s.t.} \quad
              0 \le w_i \le c, \quad \sum_i w_i = 1

    Args:
      cap: largest weight :math:`c` in (0, 1]. 1 gives MGDA; 1/K and below give the mean.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.capped_mgda(cap=0.7)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.7, 0.9]
    """
    check_number("cap", cap, above=0)
    check_number("cap", cap, at_most=1)

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        return capped_min_norm(gramian, jnp.asarray(cap, gramian.dtype), present)

    return from_kernel(kernel, mean_like=True)


ROW = Row(
    capped_mgda,
    scale="mean (weights sum to 1)",
    papers=(
        Paper(
            "A Unified Framework for Gradient Aggregation in Multi-Objective Optimization",
            "Zeou Hu, Kelvin Ho, Yaoliang Yu",
            2026,
            arxiv="2605.30452",
        ),
    ),
    note="the cap's parametrisation is a reconstruction",
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS}),
    kwargs=lambda num_tasks: {"cap": 0.5},
    checked="an independent exact solve; duality gap",
)
