"""CAGrad, conflict-averse gradient descent (Liu et al. 2021, arXiv 2110.14048, Algorithm 1).

Solved exactly, in the primal; the official code and LibMTL run SLSQP on the dual. They divide by 1 + c^2 (the toy
example by 1 + c); the paper does not.
"""

from typing import Literal

import jax.numpy as jnp

from mtlgrad_jax._core.checks import Number, check_choice, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, uniform
from mtlgrad_jax.solvers import max_min_direction

Rescale = Literal["none", "1+c^2", "1+c"]


def cagrad(c: Number = 0.4, rescale: Rescale = "none") -> Method:
    r"""Improve the worst-off task as much as a ball around the mean gradient allows.

    .. math:: d = \arg\max_d \min_i \langle g_i, d \rangle \quad \text{s.t.} \quad \|d - g_0\| \le c \|g_0\|

    with :math:`g_0` the mean gradient. If the gradients are Pareto stationary and several d are optimal, the one
    nearest :math:`g_0` is used. d never leaves the ball: its length includes what rounding of the Gramian may hide. The
    residual in `info` is the duality gap, an upper bound on the possible further improvement of the worst-off task.

    Args:
      c: radius divided by the norm of the mean gradient, >= 0. 0 gives the mean; values below 1 converge to a
        stationary point of the mean loss; for c towards infinity the direction becomes MGDA's.
      rescale: "none" (paper), or divide by "1+c^2" (official NYUv2 code, LibMTL) or "1+c" (official toy example).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.cagrad(c=0.5)
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.1835, 1.2041, 1.2041]
    """
    check_number("c", c, at_least=0)
    check_choice("rescale", rescale, ("none", "1+c^2", "1+c"))

    def kernel(*, gramian: Gramian, present: Present) -> Weights:
        radius = jnp.asarray(c, gramian.dtype)
        solved = max_min_direction(gramian, radius, present)
        weights = uniform(present) + solved.value
        divisor = {"none": 1, "1+c^2": 1 + radius**2, "1+c": 1 + radius}[rescale]
        return solved._replace(value=weights / divisor)

    return from_kernel(kernel, mean_like=True)


ROW = Row(
    cagrad,
    scale="mean",
    papers=(
        Paper(
            "Conflict-Averse Gradient Descent for Multi-task Learning",
            "Bo Liu, Xingchao Liu, Xiaojie Jin, Peter Stone, Qiang Liu",
            2021,
            booktitle="NeurIPS",
            arxiv="2110.14048",
        ),
    ),
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION}),
    checked="Brent's method on the dual; duality gap; published values",
)
