"""DiBS-MTL, direction-based bargaining (2025; formulas from the official code, suryakmurthy/dibs-mtl).

The official code takes one step by default, which gives a multiple of the sum of the unit gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import PERMUTATION, SCALE_FREE, Row
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import cosines


def dibs(num_steps: int = 1, radius: Number = 1.0, learning_rate: Number = 0.01) -> Method:
    r"""Bargain for a point in a ball around the parameters, each task pulling towards its own steepest descent.

    .. math:: \delta \leftarrow \delta - \eta \sum_i \|\delta - t_i\| \, u_i, \qquad t_i = -r u_i, \qquad d = -\delta

    with unit gradients :math:`u_i`, starting at zero, for `num_steps` steps or until :math:`\|\delta\| > r`. Invariant
    to the scale of each loss. Tasks with zero gradient take no part.

    Args:
      num_steps: number of steps; after one, :math:`w_i = \eta r / \|g_i\|`.
      radius: :math:`r` > 0. The official code uses the optimizer's learning rate.
      learning_rate: step size :math:`\eta` > 0.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.dibs(learning_rate=1.0)
      >>> grads = jnp.asarray([[2.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.0, 1.0]
    """
    check_count("num_steps", num_steps, at_least=1)
    check_number("radius", radius, above=0)
    check_number("learning_rate", learning_rate, above=0)

    def kernel(*, gramian: Gramian) -> Weights:
        C, inverse_norms = cosines(gramian)
        coefficients = _bargain(C, inverse_norms > 0, jnp.asarray(learning_rate, C.dtype), num_steps)
        return radius * (coefficients * inverse_norms)

    return from_kernel(kernel)


@partial(jax.jit, static_argnames="num_steps")
def _bargain(C: Gramian, rows: Present, rate: Array, num_steps: int) -> Array:
    """Return the coefficients of -delta in terms of the unit gradients, for r = 1: they are proportional to it."""

    def step(_: Array | int, coefficients: Array) -> Array:
        products = C @ coefficients
        square = coefficients @ products
        distances = jnp.sqrt(jnp.maximum(square - 2 * products + 1, 0))
        return coefficients + jnp.where(rows & (square <= 1), rate * distances, 0)

    return lax.fori_loop(0, num_steps, step, jnp.zeros(len(C), C.dtype))


ROW = Row(
    dibs,
    scale="eta r times the sum of unit gradients after one step",
    papers=(
        Paper(
            "DiBS-MTL: Transformation-Invariant Multitask Learning with Direction Oracles",
            "Surya Murthy, Kushagra Gupta, Mustafa O. Karabag, David Fridovich-Keil, Ufuk Topcu",
            2025,
            arxiv="2509.23948",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({SCALE_FREE, PERMUTATION}),
)
