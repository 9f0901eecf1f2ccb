"""Fixed weights: linear scalarisation."""

from typing import Any

from jaxtyping import PyTree

from mtlgrad_jax._checks import check_numbers
from mtlgrad_jax._tasks import accumulator_dtype, task_vector
from mtlgrad_jax.weighting._base import Present, Weighting, Weights, from_kernel


def constant(weights: PyTree) -> Weighting:
    r"""Weight the tasks' gradients by fixed numbers.

    .. math:: w_i = c_i

    Args:
      weights: :math:`c`, (K,) or a pytree of K scalars under the tasks' names; may be negative, or all 0.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.constant({"seg": 1.0, "depth": 2.0})
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])  # rows in sorted order: depth, seg
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses={"seg": 0.1, "depth": 0.2})
      >>> update.tolist()
      [2.0, 3.0]
    """
    check_numbers("weights", weights)

    def kernel(gramian: None, state: Any, losses: None, present: Present) -> tuple[Weights, Any]:
        return task_vector("weights", weights).astype(accumulator_dtype()), state

    return from_kernel(kernel, needs=(), per_task={"weights": weights})
