"""MoDo, multi-objective descent with double sampling (Chen et al. 2023, arXiv 2305.20057).

The official code steps along the sum of both batches' gradients, the paper along their mean: pass the averaged stack to
the update. With a single batch, this is projected gradient descent on MGDA's weights, and is biased.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, on_simplex, share
from mtlgrad_jax.solvers import project_simplex


class MoDoState(NamedTuple):
    """State of modo."""

    weights: Float[Array, " K"]


def modo(num_tasks: int, learning_rate: Number = 0.1, regularization: Number = 0.1) -> Method:
    r"""Learn the weights of the min-norm point from two independent batches per step, so that noise does not bias them.

    .. math:: w \leftarrow \Pi_\Delta \bigl( w - \gamma (A w + \rho w) \bigr), \qquad A_{ij} = \langle g_i^{(1)},
              g_j^{(2)} \rangle

    A is the update's argument `cross_gramian`; without it the Gramian is used, which is biased. A step uses the new
    weights. Weights of absent tasks do not change; those present share the rest of the total of 1, and keep learning
    even if nothing is left.

    Args:
      num_tasks: K.
      learning_rate: :math:`\gamma` > 0 for the weights; not scale-free; 0.1 in the official code, 1e-3 in LibMTL.
      regularization: :math:`\rho` >= 0.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.modo(num_tasks=2)
      >>> first, second = jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), jnp.asarray([[1.0, 1.0], [0.0, 1.0]])
      >>> cross = mtl.stacks.cross_gramian(first, second)
      >>> update, state = tx.update((first + second) / 2, tx.init(jnp.zeros(2)), cross_gramian=cross)
      >>> state.method.weights.tolist()
      [0.6, 0.4]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("learning_rate", learning_rate, above=0)
    check_number("regularization", regularization, at_least=0)

    def init(num_tasks: int) -> MoDoState:
        return MoDoState(jnp.full((num_tasks,), 1 / num_tasks, accumulator_dtype()))

    def kernel(*, cross_gramian: Float[Array, "K K"], present: Present, state: MoDoState) -> tuple[Weights, MoDoState]:
        start = on_simplex(state.weights, present)
        weights = project_simplex(start - learning_rate * (cross_gramian @ start + regularization * start), present)
        return weights, MoDoState(weights * share(state.weights, present))

    return from_kernel(kernel, init, num_tasks=num_tasks, mean_like=True)


ROW = Row(
    modo,
    scale="mean (weights sum to 1)",
    state="K weights",
    papers=(
        Paper(
            "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance",
            "Lisha Chen, Heshan Fernando, Yiming Ying, Tianyi Chen",
            2024,
            journal="Journal of Machine Learning Research",
            arxiv="2305.20057",
        ),
    ),
    promises=frozenset({PERMUTATION, CONTINUOUS}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD",
)
