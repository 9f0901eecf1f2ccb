"""The sum of the tasks' gradients: what training on the summed loss does."""

from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present


def sum() -> Method:
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

    def kernel(*, present: Present) -> Weights:
        return present.astype(accumulator_dtype())

    return from_kernel(kernel)


ROW = Row(
    sum,
    scale="sum (K times the mean)",
    note="baseline",
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    checked="numpy float64 of the published formula; TorchJD",
)
