"""GO4Align, group optimization for multi-task alignment (Shen et al. 2024, arXiv 2404.06486).

Follows the official code, whose weights are K times those of the paper: its (5) has the mean of the losses in place of
their sum. The k-means there starts from random centres; here the groups are the best ones. A task's indicator is
floored at the dtype's smallest number times the total, so that it can grow again.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present


class GO4AlignState(NamedTuple):
    """State of go4align."""

    log_indicator: Float[Array, " K"]


def go4align(num_tasks: int, num_groups: int, learning_rate: Number = 1e-4) -> Method:
    r"""Give similar tasks a common weight, which makes up for the size of the losses and follows their history.

    .. math:: q_i \leftarrow \frac{q_i e^{-\eta l_i}}{\sum_j q_j e^{-\eta l_j}}, \qquad
              \gamma_i = q_i \frac{\sum_j l_j}{l_i}, \qquad
              w_i = \operatorname{mean}_{j \in \text{group of } i} \gamma_j

    with the grouping of the numbers :math:`\gamma` that has the smallest sum of squared distances from the groups'
    means. One group gives equal weights. Losses must be positive.

    Args:
      num_tasks: K.
      num_groups: number of groups, at most.
      learning_rate: :math:`\eta` >= 0, in units of 1 / loss.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.go4align(num_tasks=3, num_groups=2, learning_rate=0.0)
      >>> losses = jnp.asarray([1.0, 1.0, 4.0])
      >>> update, _ = tx.update(jnp.eye(3), tx.init(jnp.zeros(3)), losses=losses)
      >>> update.tolist()
      [2.0, 2.0, 0.5]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("num_groups", num_groups, at_least=1)
    check_number("learning_rate", learning_rate, at_least=0)

    def start(num_tasks: int) -> GO4AlignState:
        return GO4AlignState(jnp.full((num_tasks,), -jnp.log(num_tasks), accumulator_dtype()))

    def kernel(*, losses: Losses, present: Present, state: GO4AlignState) -> tuple[Weights, GO4AlignState]:
        least = jnp.log(jnp.finfo(losses.dtype).tiny)
        old = state.log_indicator
        total = jax.nn.logsumexp(old, where=present)
        lower = old - learning_rate * (losses - jnp.min(losses, where=present, initial=jnp.inf))
        change = jnp.maximum(jax.nn.log_softmax(lower, where=present), least)
        relative = losses / jnp.max(losses, where=present, initial=0)
        scale = jnp.log(jnp.sum(relative, where=present)) - jnp.log(relative)
        weights = _group_means(jnp.exp(change + scale), present, num_groups)
        return weights, GO4AlignState(jnp.where(present, total + change, old))

    return from_kernel(kernel, start, arguments=(POSITIVE_LOSSES,), num_tasks=num_tasks)


@partial(jax.jit, static_argnums=2)
def _group_means(values: Float[Array, " K"], present: Present, num_groups: int) -> Float[Array, " K"]:
    """Replace each number by the mean of its group, for the best groups; in sorted order these are intervals."""
    K = len(values)
    largest = jnp.max(values, where=present, initial=0)
    order = jnp.argsort(jnp.where(present, values, jnp.inf))
    x = jnp.where(present, values / jnp.where(largest > 0, largest, 1), 0)[order]
    first, last, at = jnp.meshgrid(*3 * [jnp.arange(K)], indexing="ij")
    inside = (first <= at) & (at <= last) & present[order][at]
    means = jnp.sum(jnp.where(inside, x[at], 0), axis=-1) / jnp.maximum(jnp.sum(inside, axis=-1), 1)
    costs = jnp.sum(jnp.where(inside, (x[at] - means[..., None]) ** 2, 0), axis=-1)
    costs = jnp.where((first <= last)[..., 0], costs, jnp.inf)  # of an interval from its first to its last number

    def split(_: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the costs and group means of all beginnings, with one interval more at their end."""
        best, groups = (jnp.concatenate([jnp.zeros_like(part[:1]), part[:-1]]) for part in now)
        totals = best[:, None] + costs
        start = jnp.argmin(totals, axis=0)[:, None]
        own = jnp.take_along_axis(means.T, start, axis=1)
        grouped = jnp.where(jnp.arange(K)[None, :] < start, groups[start[:, 0]], own)
        return jnp.min(totals, axis=0), grouped

    one = costs[0], jnp.broadcast_to(means[0][:, None], (K, K))
    _, groups = jax.lax.fori_loop(1, min(num_groups, K), split, one)
    return jnp.zeros_like(values).at[order].set(groups[-1]) * largest


ROW = Row(
    go4align,
    scale="sum, about the number of tasks for equal losses",
    state="K indicators",
    papers=(
        Paper(
            "GO4Align: Group Optimization for Multi-Task Alignment",
            "Jiayi Shen, Cheems Wang, Zehao Xiao, Nanne van~Noord, Marcel Worring",
            2024,
            booktitle="NeurIPS",
            arxiv="2404.06486",
        ),
    ),
    note="scale of the official code",
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"num_tasks": num_tasks, "num_groups": 2},
    checked="numpy float64 of the formulas, groups by enumeration",
)
