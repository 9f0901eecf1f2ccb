"""PBI, penalty-based boundary intersection (Zhang & Li 2007, MOEA/D, doi 10.1109/TEVC.2007.892759)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, unit
from mtlgrad_jax.solvers._solution import closed_form


def pbi(preference: PyTree = None, theta: Number = 5.0, ideal: PyTree = None) -> Method:
    r"""Descend along a preferred direction in the space of losses, with a penalty on the distance from it.

    .. math:: \min_\theta d_1 + \vartheta d_2, \qquad d_1 = \langle f, u \rangle, \quad d_2 = \|f - d_1 u\|, \quad
              f = l - z, \quad u = p / \|p\|, \qquad
              w = u + \vartheta \frac{f - d_1 u}{d_2}

    The losses are drawn to the ray :math:`z + t p`. Weights can be negative, for tasks ahead of the ray. On the ray, to
    rounding, the penalty has no direction and :math:`w = u`.

    Args:
      preference: :math:`p` >= 0, (K,) or a pytree under the tasks' names; equal for None. The update's argument
        `preference` replaces it.
      theta: penalty :math:`\vartheta` >= 0; the paper uses 5.
      ideal: :math:`z`, lower bounds of the losses, in the same form; 0 for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.pbi(preference=[1.0, 0.0], theta=2.0)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([3.0, 4.0]))
      >>> update.tolist()
      [1.0, 2.0]
    """
    check_numbers("preference", preference, optional=True, nonzero=True, at_least=0)
    check_number("theta", theta, at_least=0)
    check_numbers("ideal", ideal, optional=True)
    given = preference

    def kernel(*, losses: Losses, present: Present, preference: Float[Array, " K"] | None) -> Weights:
        direction = of_tasks("preference", given if preference is None else preference, present, 1.0)
        ray = unit(direction)
        above = jnp.where(present, losses - of_tasks("ideal", ideal, present, 0.0), 0)

        def scalarize(above: Losses) -> Float[Array, ""]:
            along = above @ ray
            across = above - along * ray
            rounding = len(above) * jnp.finfo(above.dtype).eps * jax.lax.stop_gradient(_length(above))
            return along + theta * jnp.where(_length(across) > rounding, _length(across), 0)

        largest = jnp.max(jnp.abs(above))
        weights = jax.grad(scalarize)(above / jnp.where(largest > 0, largest, 1))
        return closed_form(weights, jnp.any(direction > 0))

    return from_kernel(kernel, per_task={"preference": preference, "ideal": ideal})


def _length(vector: Float[Array, " K"]) -> Float[Array, ""]:
    """Return the norm, whose derivative at zero is zero."""
    square = vector @ vector
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


ROW = Row(
    pbi,
    scale="1 along the preference, theta across it",
    papers=(
        Paper(
            "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition",
            "Qingfu Zhang, Hui Li",
            2007,
            journal="IEEE Transactions on Evolutionary Computation",
            doi="10.1109/TEVC.2007.892759",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    checked="numpy float64 of the published formula; TorchJD",
)
