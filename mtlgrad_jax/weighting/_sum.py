"""The sum of the tasks' gradients: what training on the summed loss does."""

from typing import Any

from mtlgrad_jax._tasks import accumulator_dtype
from mtlgrad_jax.weighting._base import Present, Weighting, Weights, from_kernel


def sum() -> Weighting:
    r"""Add the tasks' gradients.

    .. math:: w_i = 1

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.sum()
      >>> grads = {"w": jnp.asarray([[1.0, 0.0], [0.0, 3.0]])}
      >>> update, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> update["w"].tolist()
      [1.0, 3.0]
    """

    def kernel(gramian: None, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return present.astype(accumulator_dtype()), state

    return from_kernel(kernel, needs=())
