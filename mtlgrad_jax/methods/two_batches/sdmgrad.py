"""SDMGrad, stochastic direction-oriented multi-objective descent (Xiao, Ban & Ji 2023, arXiv 2305.18409).

The official code's "independent" batches alias one buffer, so it uses an ordinary Gramian. It multiplies the result by
K. Its learning rate is 10, LibMTL's 5; its lambda is 0.6 by default and 0.3 in all of its runs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_number, check_numbers
from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, mean_of, of_tasks, on_simplex, share, uniform
from mtlgrad_jax.solvers import project_simplex


class SDMGradState(NamedTuple):
    """State of sdmgrad."""

    weights: Float[Array, " K"]


def sdmgrad(
    num_tasks: int,
    lam: Number = 0.3,
    learning_rate: Number = 10.0,
    momentum: Number = 0.5,
    num_steps: int = 20,
    preference: PyTree = None,
) -> Method:
    r"""Follow the min-norm point, pulled towards a preferred mean, with weights learned from independent batches.

    .. math:: w \approx \arg\min_{w \in \Delta} \Bigl\| \sum_i (w_i + \lambda p_i) g_i \Bigr\|^2, \qquad
              d = \frac{1}{1 + \lambda} \sum_i (w_i + \lambda p_i) g_i

    by a few steps of projected gradient descent with momentum, from the last weights, on
    :math:`A_{ij} = \langle g_i^{(1)}, g_j^{(2)} \rangle`, scaled to a mean norm of 1. A is the update's argument
    `cross_gramian`; without it the Gramian is used, which is biased. Weights of absent tasks do not change; those
    present share the rest of the total of 1, and keep learning even if nothing is left.

    Args:
      num_tasks: K.
      lam: pull :math:`\lambda` >= 0 towards the preferred mean.
      learning_rate: > 0, for the weights; with 10, they jump between corners of the simplex if A has entries near 1.
      momentum: momentum of the steps, in [0, 1); reset in every update.
      num_steps: steps of the weights per update.
      preference: :math:`p` >= 0, not all 0, (K,) or a pytree under the tasks' names; 1/K over those present for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> method = mtl.sdmgrad(num_tasks=3, num_steps=1)
      >>> cross = jnp.diag(jnp.asarray([1.0, 0.25, 0.0]))
      >>> weights, _ = method.weigh(None, method.init(None), cross_gramian=cross)
      >>> (13 * weights).tolist()
      [1.0, 1.0, 11.0]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("lam", lam, at_least=0)
    check_number("learning_rate", learning_rate, above=0)
    check_number("momentum", momentum, at_least=0, below=1)
    check_count("num_steps", num_steps, at_least=1)
    check_numbers("preference", preference, optional=True, nonzero=True, at_least=0)

    def init(num_tasks: int) -> SDMGradState:
        return SDMGradState(jnp.full((num_tasks,), 1 / num_tasks, accumulator_dtype()))

    def kernel(
        *, cross_gramian: Float[Array, "K K"], present: Present, state: SDMGradState
    ) -> tuple[Weights, SDMGradState]:
        pull, rate, inertia = (jnp.asarray(x, cross_gramian.dtype) for x in (lam, learning_rate, momentum))
        target = pull * of_tasks("preference", preference, present, uniform(present))
        scale = mean_of(jnp.sqrt(jnp.maximum(jnp.diagonal(cross_gramian), 0)), present)
        scale = jnp.where(scale > 0, scale, jnp.sqrt(jnp.max(jnp.abs(cross_gramian))))
        scale = jnp.where(scale > 0, scale, 1)
        start = on_simplex(state.weights, present)
        weights = _descend(cross_gramian / scale / scale, start, target, rate, inertia, present, num_steps)
        return (weights + target) / (1 + pull), SDMGradState(weights * share(state.weights, present))

    return from_kernel(kernel, init, num_tasks=num_tasks, per_task={"preference": preference}, mean_like=True)


@partial(jax.jit, static_argnames="num_steps")
def _descend(
    A: Float[Array, "K K"],
    start: Float[Array, " K"],
    target: Float[Array, " K"],
    rate: Array,
    momentum: Array,
    present: Present,
    num_steps: int,
) -> Float[Array, " K"]:
    """Return the weights after some steps of projected gradient descent with momentum."""

    def step(_: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, velocity = carry
        velocity = momentum * velocity + A @ (weights + target)
        return project_simplex(weights - rate * velocity, present), velocity

    return lax.fori_loop(0, num_steps, step, (start, jnp.zeros_like(start)))[0]


ROW = Row(
    sdmgrad,
    scale="mean",
    state="K weights",
    papers=(
        Paper(
            "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
            "Peiyao Xiao, Hao Ban, Kaiyi Ji",
            2023,
            booktitle="NeurIPS",
            arxiv="2305.18409",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD; published values",
)
