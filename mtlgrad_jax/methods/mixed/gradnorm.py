"""GradNorm (Chen et al. 2018, arXiv 1711.02257, Algorithm 1).

Norms are those of the gradients given, usually of all shared parameters; the paper uses the last shared layer. Weights
are clipped at zero; the paper does not say how to handle negative ones.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.learned import Learned, descend, learn
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, mean_of, on_simplex, over_mean, ratios, share


class GradNormState(NamedTuple):
    """State of gradnorm."""

    weights: Learned
    first_loss: Float[Array, " K"]
    seen: Bool[Array, " K"]  # whether first_loss is set


def gradnorm(num_tasks: int, alpha: Number = 1.5, learning_rate: Number = 0.025) -> Method:
    r"""Learn weights with which all tasks train at similar rates.

    .. math:: \min_w \sum_i \Bigl| w_i \|g_i\| - \bar G \, r_i^\alpha \Bigr|, \qquad
              r_i = \frac{l_i / l_i^{(0)}}{\operatorname{mean}_j l_j / l_j^{(0)}}

    with :math:`\bar G` the mean of :math:`w_i \|g_i\|`, held constant. The weights take one Adam step (as in the paper)
    and are renormalised to sum to K. A step uses the weights from before their update.

    Args:
      num_tasks: K.
      alpha: strength :math:`\alpha` >= 0 of the pull towards equal rates: 1.5 for NYUv2, 0.12 for very similar tasks.
      learning_rate: learning rate of Adam for the weights.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.gradnorm(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.3, 2.0]))
      >>> update.tolist(), state.method.weights.value.tolist()
      ([1.0, 3.0], [1.025, 0.975])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("alpha", alpha, at_least=0)
    check_number("learning_rate", learning_rate, at_least=0)
    inner = optax.adam(learning_rate)

    def start(num_tasks: int) -> GradNormState:
        first_loss = jnp.ones((num_tasks,), accumulator_dtype())
        return GradNormState(learn(num_tasks, 1.0, inner), first_loss, jnp.zeros((num_tasks,), bool))

    def kernel(
        *, gramian: Gramian, losses: Losses, present: Present, state: GradNormState
    ) -> tuple[Weights, GradNormState]:
        first_loss = jnp.where(state.seen, state.first_loss, losses)
        rate = over_mean(ratios(losses, jnp.where(first_loss != 0, first_loss, 1), present), present)
        old, norms = state.weights.value, jnp.sqrt(jnp.diagonal(gramian))
        target = mean_of(old * norms, present) * jnp.maximum(rate, 0) ** alpha
        learned = descend(state.weights, jnp.sign(old * norms - target) * norms, inner)
        grown = jnp.maximum(learned.value, 0)
        weights = on_simplex(grown, present) * share(old, present, num_tasks)
        weights = jnp.where(jnp.any(present & (grown > 0)), weights, old)
        return old, GradNormState(learned._replace(value=weights), first_loss, state.seen | present)

    return from_kernel(kernel, start, num_tasks=num_tasks)


ROW = Row(
    gradnorm,
    scale="sum (weights sum to K)",
    state="K weights, their Adam state, K first losses",
    papers=(
        Paper(
            "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
            "Zhao Chen, Vijay Badrinarayanan, Chen-Yu Lee, Andrew Rabinovich",
            2018,
            booktitle="ICML",
            arxiv="1711.02257",
        ),
    ),
    promises=frozenset({PERMUTATION}),
    kwargs=num_tasks_only,
)
