"""SoftAdapt (Heydari, Thompson & Mehmood 2019, arXiv 1912.12355).

Follows the official package (dr-aheydari/SoftAdapt); with two losses, the variant "original" is also (10) of arXiv
2110.09813. Departures: the variant "normalized" divides by the sum of absolute slopes, as the package did at first. Now
the package divides by the sum of the slopes, which reverses the order of the weights where the losses fall: if all
fall, that is `beta=-0.1` here. Before there is enough history, the weights are those of the mean, not ones. Epsilons
are left out.
"""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, on_simplex, ratios


class SoftAdaptState(NamedTuple):
    """State of softadapt."""

    losses: Float[Array, " K window"]  # the last of each task, oldest first
    seen: Int[Array, " K"]  # how many, up to the window
    weights: Float[Array, " K"]  # of the last time they were computed, 1 on average
    step: Int[Array, ""]  # steps since then


def softadapt(
    num_tasks: int,
    beta: Number = 0.1,
    variant: Literal["original", "normalized", "loss_weighted"] = "original",
    window: int = 2,
    every: int = 1,
) -> Method:
    r"""Give the largest weights to the losses that fall most slowly.

    .. math:: w_i = \frac{a_i e^{\beta s_i}}{\sum_j a_j e^{\beta s_j}}

    with :math:`s_i` the slope of task i's last losses, per step, at the oldest of them as in the package, by finite
    differences of the highest order that the window allows, and :math:`a_i = 1` ("original"); the same with :math:`s_i
    / \sum_j |s_j|` for the slopes ("normalized"); or :math:`a_i` the mean of the losses in the window ("loss_weighted",
    which the package recommends; these must be positive, and a step with a loss <= 0 is skipped and counted). The
    losses of the same step are included. Until a task's window is full its weight is 1/K.

    Slopes of high order amplify the noise of batches: in absolute value, the coefficients for five losses add up to
    10.7, those for two to 2. Slopes are in units of the losses, so `beta` depends on their scale, unless normalized.

    Args:
      num_tasks: K.
      beta: :math:`\beta`; if negative, the losses that fall fastest get the largest weights.
      variant: "original", "normalized" or "loss_weighted".
      window: number n of losses of each task, >= 2. With 2, the slope is the difference of the last two. The package
        takes as many losses as it is given, 5 in its examples, with an accuracy order of n - 1.
      every: steps from one computation of the weights to the next, >= 1. The package's example computes them every 5
        epochs, from the losses of these epochs: `window=5, every=5` with one step an epoch.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.softadapt(num_tasks=2, beta=1.0)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> first, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([2.0, 4.0]))
      >>> second, state = tx.update(grads, state, losses=jnp.asarray([2.0, 4.0 - jnp.log(3.0)]))
      >>> first.tolist(), second.tolist()
      ([0.5, 0.5], [0.75, 0.25])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("beta", beta)
    check_choice("variant", variant, ("original", "normalized", "loss_weighted"))
    check_count("window", window, at_least=2)
    check_count("every", every, at_least=1)
    coefficients, total = _differences(window)

    def start(num_tasks: int) -> SoftAdaptState:
        losses, weights = jnp.zeros((num_tasks, window), accumulator_dtype()), jnp.ones(num_tasks, accumulator_dtype())
        return SoftAdaptState(losses, jnp.zeros(num_tasks, jnp.int32), weights, jnp.zeros((), jnp.int32))

    def kernel(*, losses: Losses, present: Present, state: SoftAdaptState) -> tuple[Weights, SoftAdaptState]:
        recent = jnp.concatenate([state.losses[:, 1:], losses[:, None]], axis=1)
        seen = jnp.minimum(optax.safe_increment(state.seen), window)
        step = optax.safe_increment(state.step) % every
        known = present & (seen == window)
        slopes, size = jnp.sum(recent * jnp.asarray(coefficients)[None], axis=1), jnp.asarray(total)
        if variant == "normalized":
            slopes = ratios(slopes, jnp.ones_like(slopes), known)
            sizes = jnp.sum(jnp.abs(slopes), where=known)
            size = 1 / jnp.where(sizes > 0, sizes, 1)
        halves = jnp.sign(beta) * slopes / 2  # their differences do not overflow
        exponents = (halves - jnp.max(halves, where=known, initial=-jnp.inf)) * jnp.abs(beta) * size * 2
        if variant == "loss_weighted":
            exponents += jnp.log(jnp.sum(recent / window, axis=1))
        parts = jnp.exp(exponents - jnp.max(exponents, where=known, initial=-jnp.inf))
        computed = jnp.where(known, jnp.sum(known) * on_simplex(parts, known), 1)
        weights = jnp.where(step == 0, computed, state.weights)
        return on_simplex(weights, present), SoftAdaptState(recent, seen, weights, step)

    arguments = (POSITIVE_LOSSES,) if variant == "loss_weighted" else ()
    return from_kernel(kernel, start, arguments=arguments, num_tasks=num_tasks, mean_like=True)


def _differences(window: int) -> tuple[list[float], float]:
    """Return the coefficients of the slope at the first of equidistant values, and the sum of their absolute values.

    They differentiate the polynomial through all values, and are divided by that sum.
    """
    others = [(-1) ** (j + 1) * math.comb(window - 1, j) / j for j in range(1, window)]
    coefficients = [-math.fsum(others), *others]
    total = math.fsum(map(abs, coefficients))
    return [c / total for c in coefficients], total


ROW = Row(
    softadapt,
    scale="mean (weights sum to 1)",
    state="the last 2 losses of each task (or more), K weights",
    papers=(
        Paper(
            "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with Multi-Part Loss Functions",
            "A. Ali Heydari, Craig A. Thompson, Asif Mehmood",
            2019,
            arxiv="1912.12355",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the definition over all steps; values from the official code's documentation",
)
