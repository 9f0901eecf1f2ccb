"""The mean of the tasks' gradients: what training on the averaged loss does."""

from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, uniform


def mean() -> Method:
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

    def kernel(*, present: Present) -> Weights:
        return uniform(present)

    return from_kernel(kernel, mean_like=True)


ROW = Row(
    mean,
    scale="mean",
    note="baseline",
    promises=frozenset({DESCENT, HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    checked="numpy float64 of the published formula; TorchJD",
)
