"""The mean of the tasks' gradients: what training on the averaged loss does."""

from typing import Any

from mtlgrad_jax.weighting._base import Present, Weighting, Weights, from_kernel, uniform


def mean() -> Weighting:
    r"""Average the tasks' gradients.

    .. math:: w_i = 1/K

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.mean()
      >>> grads = {"w": jnp.asarray([[1.0, 0.0], [0.0, 3.0]])}
      >>> update, _ = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> update["w"].tolist()
      [0.5, 1.5]
    """

    def kernel(gramian: None, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return uniform(present), state

    return from_kernel(kernel, needs=())
