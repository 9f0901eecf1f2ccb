"""The scaling half of RotoGrad (Javaloy & Valera 2022, arXiv 2103.02631).

The rotation half changes the model and is not a gradient transformation.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtlgrad_jax._core.checks import check_count
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, ratios
from mtlgrad_jax.solvers import inverse_sqrt


class RotogradScaleState(NamedTuple):
    """State of rotograd_scale."""

    first_norm: Float[Array, " K"]
    step: Int[Array, " K"]  # steps in which each task was present


def rotograd_scale(num_tasks: int, burn_in: int = 20) -> Method:
    r"""Give all gradients the same length, close to that of the gradients that have shrunk least.

    .. math:: w_k = \frac{S}{\|g_k\|}, \qquad S = \sum_k a_k \|g_k\|, \qquad
              a_k = \frac{\|g_k\| / \|g_k^{(0)}\|}{\sum_j \|g_j\| / \|g_j^{(0)}\|}

    Tasks with zero gradient take no part.

    Args:
      num_tasks: K.
      burn_in: step, counted from 0, at which the initial norms are measured again.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.rotograd_scale(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [2.0, 2.0]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("burn_in", burn_in, at_least=0)

    def init(num_tasks: int) -> RotogradScaleState:
        return RotogradScaleState(jnp.zeros((num_tasks,), accumulator_dtype()), jnp.zeros((num_tasks,), jnp.int32))

    def kernel(*, gramian: Gramian, present: Present, state: RotogradScaleState) -> tuple[Weights, RotogradScaleState]:
        norms, inverse = jnp.sqrt(jnp.diagonal(gramian)), inverse_sqrt(jnp.diagonal(gramian))
        renewed = (state.first_norm == 0) | (state.step == burn_in)
        first = jnp.where(renewed, norms, state.first_norm)
        shares = ratios(norms, jnp.where(first > 0, first, 1), present)
        total = jnp.sum(shares)
        scale = shares / jnp.where(total > 0, total, 1) @ norms
        return scale * inverse, RotogradScaleState(first, optax.safe_increment(state.step))

    return from_kernel(kernel, init, num_tasks=num_tasks)


ROW = Row(
    rotograd_scale,
    scale="sum of K gradients of equal length",
    state="K first norms, K counts",
    papers=(
        Paper(
            "RotoGrad: Gradient Homogenization in Multitask Learning",
            "Adrián Javaloy, Isabel Valera",
            2022,
            booktitle="ICLR",
            arxiv="2103.02631",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
    kwargs=num_tasks_only,
)
