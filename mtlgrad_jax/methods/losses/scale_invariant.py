"""SI, scale-invariant losses: the sum of their logarithms, a baseline of Navon et al. 2022 (arXiv 2202.01017)."""

import jax
import jax.numpy as jnp

from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax.methods.gramian.nash_mtl import ROW as NASH_MTL


def scale_invariant() -> Method:
    r"""Descend on the sum of the losses' logarithms, which does not depend on the losses' units.

    .. math:: \min_\theta \sum_i \log l_i, \qquad w_i = 1 / l_i

    Losses must be positive.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.scale_invariant()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.5, 4.0]))
      >>> update.tolist()
      [2.0, 0.25]
    """

    def kernel(*, losses: Losses) -> Weights:
        return jax.grad(lambda losses: jnp.sum(jnp.log(losses)))(losses)

    return from_kernel(kernel, arguments=(POSITIVE_LOSSES,))


ROW = Row(
    scale_invariant,
    scale="sum of the gradients of the log-losses",
    papers=NASH_MTL.papers,
    note="a baseline there",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
)
