"""COSMOS (Ruchte & Grabocka 2021, arXiv 2103.13392): the objective; feeding the preference to the network is its own.

The paper draws the preference from a Dirichlet distribution for every batch and gives it to the network as an input.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present, of_tasks, uniform, unit
from mtlgrad_jax.solvers._solution import closed_form


def cosmos(lam: Number, preference: PyTree = None) -> Method:
    r"""Descend on preferred losses, with a bonus for losses in the direction of the preference.

    .. math:: \min_\theta \langle r, l \rangle - \lambda \cos(r, l), \qquad
              w = r - \frac{\lambda}{\|l\|} \left( \frac{r}{\|r\|} - \cos(r, l) \frac{l}{\|l\|} \right)

    Weights can be negative. If all losses are zero, :math:`w = r`.

    Args:
      lam: strength :math:`\lambda` >= 0 of the bonus, in units of the losses; 0.01 to 8 in the paper, by dataset.
      preference: :math:`r` >= 0, (K,) or a pytree under the tasks' names; 1/K for None. The update's argument
        `preference` replaces it.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.cosmos(lam=5.0, preference=[1.0, 0.0])
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([3.0, 4.0]))
      >>> update.tolist()
      [0.36, 0.48]
    """
    check_number("lam", lam, at_least=0)
    check_numbers("preference", preference, optional=True, nonzero=True, at_least=0)
    given = preference

    def kernel(*, losses: Losses, present: Present, preference: Float[Array, " K"] | None) -> Weights:
        wanted = of_tasks("preference", given if preference is None else preference, present, uniform(present))
        direction, kept = unit(wanted), jnp.where(present, losses, 0)
        largest = jnp.max(jnp.abs(kept))
        size = jnp.where(largest > 0, largest, 1)

        def cosine(scaled: Losses) -> Float[Array, ""]:
            return direction @ scaled / jnp.linalg.norm(scaled)

        pull = jax.grad(cosine)(jnp.where(largest > 0, kept / size, direction))
        return closed_form(wanted - jnp.where(largest > 0, lam * pull / size, 0), jnp.any(wanted > 0))

    return from_kernel(kernel, per_task={"preference": preference}, mean_like=preference is None)


ROW = Row(
    cosmos,
    scale="the preference's",
    papers=(
        Paper(
            "Scalable Pareto Front Approximation for Deep Multi-Objective Learning",
            "Michael Ruchte, Josif Grabocka",
            2021,
            booktitle="ICDM",
            arxiv="2103.13392",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"lam": 1.0},
    checked="numpy float64 of the published formula; TorchJD",
)
