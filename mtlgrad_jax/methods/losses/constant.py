"""Fixed weights: linear scalarisation."""

from jaxtyping import PyTree

from mtlgrad_jax._core.checks import check_numbers
from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, Row
from mtlgrad_jax._core.tasks import accumulator_dtype, task_vector


def constant(weights: PyTree) -> Method:
    r"""Multiply the tasks' gradients by fixed weights.

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

    def kernel() -> Weights:
        return task_vector("weights", weights).astype(accumulator_dtype())

    return from_kernel(kernel, per_task={"weights": weights})


ROW = Row(
    constant,
    scale="as given",
    note="baseline",
    promises=frozenset({HOMOGENEOUS, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"weights": [1.0 + i for i in range(num_tasks)]},
    checked="numpy float64 of the published formula; TorchJD",
)
