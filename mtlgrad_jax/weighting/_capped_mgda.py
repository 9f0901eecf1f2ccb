"""Capped MGDA (Hu, Ho & Yu 2026, arXiv 2605.30452).

The paper's own parametrisation of the cap could not be read (abstract only): here it bounds each weight.
"""

from typing import Any

import jax.numpy as jnp

from mtlgrad_jax._checks import Number, check_number
from mtlgrad_jax.solvers import capped_min_norm
from mtlgrad_jax.weighting._base import Gramian, Present, Weighting, Weights, from_kernel


def capped_mgda(cap: Number) -> Weighting:
    r"""Follow the min-norm point of the gradients' convex hull that gives no task more than a share.

    .. math:: w = \arg\min_w \Big\| \sum_i w_i g_i \Big\|^2 \quad \text{s.t.} \quad
              0 \le w_i \le c, \quad \sum_i w_i = 1

    Args:
      cap: largest weight :math:`c` in (0, 1]. At 1 it is MGDA; at 1/K, and below, the mean.

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

    def kernel(gramian: Gramian, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return capped_min_norm(gramian, jnp.asarray(cap, gramian.dtype), present), state

    return from_kernel(kernel)
