"""LDC-MTL, loss discrepancy control (Xiao et al. 2025, arXiv 2502.08585), with one free number for every task.

Follows the official code for CelebA, in which the weights are sigmoids of learned numbers and their sum is held
constant. The code for other datasets computes the weights from features and compares transformed losses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.learned import Learned, check_optimizer, descend, learn
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, Row, num_tasks_only
from mtlgrad_jax._core.weights import Present


class LDCMTLState(NamedTuple):
    """State of ldc_mtl."""

    logits: Learned


def ldc_mtl(num_tasks: int, penalty: Number = 0.01, optimizer: optax.GradientTransformation | None = None) -> Method:
    r"""Learn weights with which the weighted losses are alike, together with the network.

    .. math:: \min_{\theta, a} \frac{\sum_i \sigma_i l_i}{S} + \lambda \sum_i |\sigma_i l_i - \sigma_{i+1} l_{i+1}|,
              \qquad \sigma_i = \operatorname{sigmoid}(a_i), \quad S = \sum_j \sigma_j

    with S held constant, over neighbours in the order of the tasks that are present. The weights are the objective's
    derivatives by the losses, at :math:`a` from before its update; they can be negative. The slope of :math:`a` is
    proportional to the losses: after a loss a million times the usual, Adam hardly moves for thousands of steps.

    Args:
      num_tasks: K.
      penalty: :math:`\lambda` >= 0; 0.01 to 0.1 in the official code, by dataset.
      optimizer: optimizer of a, one copy per task; `optax.adam(1e-3)` for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.ldc_mtl(num_tasks=2, penalty=0.0)
      >>> update, _ = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.asarray([1.0, 3.0]))
      >>> update.tolist()
      [0.5, 0.5]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("penalty", penalty, at_least=0)
    check_optimizer(optimizer)
    inner = optax.adam(1e-3) if optimizer is None else optimizer

    def start(num_tasks: int) -> LDCMTLState:
        return LDCMTLState(learn(num_tasks, 1.0, inner))

    def kernel(*, losses: Losses, present: Present, state: LDCMTLState) -> tuple[Weights, LDCMTLState]:
        in_front = jnp.argsort(~present)

        def objective(losses: Losses, logits: Float[Array, " K"]) -> Float[Array, ""]:
            scale = jnp.where(present, jax.nn.sigmoid(logits), 0)
            total = jax.lax.stop_gradient(jnp.sum(scale))
            ordered = (scale * losses)[in_front]
            gaps = jnp.abs(ordered[:-1] - ordered[1:])
            return jnp.sum(ordered) / total + penalty * jnp.sum(gaps, where=present[in_front][1:])

        weights, slope = jax.grad(objective, (0, 1))(losses, state.logits.value)
        return weights, LDCMTLState(descend(state.logits, slope, inner))

    return from_kernel(kernel, start, num_tasks=num_tasks, mean_like=True)


ROW = Row(
    ldc_mtl,
    scale="mean, plus the penalty's part",
    state="K logits and their optimizer's state",
    papers=(
        Paper(
            "LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control",
            "Peiyao Xiao, Chaosheng Dong, Shaofeng Zou, Kaiyi Ji",
            2025,
            arxiv="2502.08585",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({HOMOGENEOUS, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
)
