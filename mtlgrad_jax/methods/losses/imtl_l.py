"""IMTL-L, impartial losses (Liu et al. 2021, ICLR, "Towards Impartial Multi-task Learning").

The paper learns the scales with the network's optimizer; here they have their own.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.learned import MOST, Learned, check_optimizer, descend, learn
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax.methods.gramian.imtl_g import ROW as IMTL_G


class IMTLLState(NamedTuple):
    """State of imtl_l and imtl."""

    log_scale: Learned


def imtl_l(num_tasks: int, optimizer: optax.GradientTransformation | None = None, init: Number = 0.0) -> Method:
    r"""Learn a scale for every loss, with which all losses come to the same value.

    .. math:: \min_{\theta, s} \sum_i e^{s_i} l_i - s_i, \qquad w_i = e^{s_i}

    The optimum is :math:`e^{s_i} l_i = 1`. A step uses the scales from before their update. The objective is twice that
    of `uw` with the opposite sign of s, and has the same limits for outliers and for losses of zero.

    Args:
      num_tasks: K.
      optimizer: optimizer of s, one copy per task; `optax.adam(0.025)` for None.
      init: initial :math:`s_i`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.imtl_l(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.3, 2.0]))
      >>> update.tolist()
      [1.0, 3.0]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("init", init)
    check_optimizer(optimizer)
    inner = optax.adam(0.025) if optimizer is None else optimizer

    def start(num_tasks: int) -> IMTLLState:
        return IMTLLState(learn(num_tasks, init, inner))

    def kernel(*, losses: Losses, state: IMTLLState) -> tuple[Weights, IMTLLState]:
        return scales(losses, state, inner)

    return from_kernel(kernel, start, num_tasks=num_tasks)


def scales(
    losses: Losses, state: IMTLLState, optimizer: optax.GradientTransformation
) -> tuple[Float[Array, " K"], IMTLLState]:
    """Return the scales of the losses and the state after their update."""
    s = jnp.minimum(state.log_scale.value, jnp.log(jnp.finfo(losses.dtype).max) / 2)
    scale = jnp.exp(s)
    slope = jnp.clip(scale * losses, -MOST, MOST) - 1
    return scale, IMTLLState(descend(state.log_scale._replace(value=s), slope, optimizer))


ROW = Row(
    imtl_l,
    scale="sum at first, then learned",
    state="K log-scales and their optimizer's state",
    papers=IMTL_G.papers,
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD",
)
