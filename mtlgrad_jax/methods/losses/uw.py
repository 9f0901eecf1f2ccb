"""UW, uncertainty weighting (Kendall, Gal & Cipolla 2018, arXiv 1705.07115).

All losses are weighted as regression losses, as in other libraries; the paper omits the factor 1/2 for classification.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.learned import MOST, Learned, check_optimizer, descend, learn
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only


class UWState(NamedTuple):
    """State of uw."""

    log_variance: Learned


def uw(num_tasks: int, optimizer: optax.GradientTransformation | None = None, init: Number = 0.0) -> Method:
    r"""Learn a log-variance :math:`s_i` for every task and weight its loss by the inverse variance.

    .. math:: \min_{\theta, s} \sum_i \tfrac12 e^{-s_i} l_i + \tfrac12 s_i, \qquad w_i = \tfrac12 e^{-s_i}

    A step uses the weights from before its own update of s. In this update :math:`e^{-s_i} l_i`, which is 1 at the
    optimum, is capped at 1e4, so that an outlier does not stay in the optimizer's averages for long; and
    :math:`e^{-s_i}` never exceeds the square root of the dtype's largest number.

    Args:
      num_tasks: K.
      optimizer: optimizer of s, one copy per task; `optax.adam(0.025)` for None, as in the Nash-MTL code.
      init: initial :math:`s_i`; LibMTL starts at -0.5.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.uw(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.3, 2.0]))
      >>> update.tolist()
      [0.5, 1.5]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("init", init)
    check_optimizer(optimizer)
    inner = optax.adam(0.025) if optimizer is None else optimizer

    def start(num_tasks: int) -> UWState:
        return UWState(learn(num_tasks, init, inner))

    def kernel(*, losses: Losses, state: UWState) -> tuple[Weights, UWState]:
        s = jnp.maximum(state.log_variance.value, -jnp.log(jnp.finfo(losses.dtype).max) / 2)
        precision = jnp.exp(-s)
        slope = (1 - jnp.clip(precision * losses, -MOST, MOST)) / 2
        return precision / 2, UWState(descend(state.log_variance._replace(value=s), slope, inner))

    return from_kernel(kernel, start, num_tasks=num_tasks)


ROW = Row(
    uw,
    scale="half the sum at first, then learned",
    state="K log-variances and their optimizer's state",
    papers=(
        Paper(
            "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
            "Alex Kendall, Yarin Gal, Roberto Cipolla",
            2018,
            booktitle="CVPR",
            arxiv="1705.07115",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD",
)
