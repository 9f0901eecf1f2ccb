"""DWA, dynamic weight average (Liu, Johns & Davison 2019, arXiv 1803.10704).

Averages are over epochs, as in the paper and in LibMTL. A window is a run of steps that counts as an epoch; the sliding
window of the Nash-MTL code, which starts with ones in place of losses, is not followed.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from mtlgrad_jax._core.checks import Number, check_count, check_number
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.step import EPOCH_END
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, softmax


class DWAState(NamedTuple):
    """State of dwa."""

    mean: Float[Array, " K"]  # of each loss over the task's present epoch
    steps: Int[Array, " K"]  # steps in that mean
    epoch: Int[Array, " K"]  # the epoch of that mean
    last: Float[Array, "2 K"]  # the means of the last two epochs in which the task was present, newest first
    known: Int[Array, " K"]  # how many of these there are
    current: Int[Array, ""]  # epochs that have ended


def dwa(num_tasks: int, temperature: Number = 2.0, window: int | None = None) -> Method:
    r"""Weight every loss by the ratio of its averages over the last two epochs: slow tasks get more weight.

    .. math:: r_i = \frac{\bar l_i(t-1)}{\bar l_i(t-2)}, \qquad w_i = K \frac{e^{r_i / T}}{\sum_j e^{r_j / T}}

    A task counts as :math:`r_i = 1` until two of its epochs have ended, so all weights are 1 in the first two epochs;
    so does one whose average was 0. An epoch in which a task was never present is not one of its epochs.

    Args:
      num_tasks: K.
      temperature: :math:`T` > 0; a high one gives equal weights.
      window: steps that count as an epoch, for each task those in which it was present. For None, the update has to be
        told, by `epoch_end=True` in the last step of an epoch and `epoch_end=False` in the others; if that step is
        skipped, the epoch continues.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.dwa(num_tasks=2, temperature=1.0)
      >>> grads, params = jnp.eye(2), jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for losses in ([1.0, 1.0], [2.0, 2.0 - jnp.log(3.0)], [1.0, 1.0]):
      ...     update, state = tx.update(grads, state, losses=jnp.asarray(losses), epoch_end=True)
      >>> update.tolist()
      [1.5, 0.5]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("temperature", temperature, above=0)
    if window is not None:
        check_count("window", window, at_least=1)

    def start(num_tasks: int) -> DWAState:
        zeros, none = jnp.zeros((num_tasks,), accumulator_dtype()), jnp.zeros((num_tasks,), jnp.int32)
        return DWAState(zeros, none, none, jnp.zeros((2, num_tasks), zeros.dtype), none, jnp.zeros((), jnp.int32))

    def kernel(
        *, losses: Losses, present: Present, state: DWAState, epoch_end: Bool[Array, ""] | bool = False
    ) -> tuple[Weights, DWAState]:
        ended = (state.steps > 0) & ((state.epoch != state.current) if window is None else (state.steps >= window))
        last = jnp.where(ended, jnp.stack([state.mean, state.last[0]]), state.last)
        known = jnp.where(ended, jnp.minimum(state.known, 1) + 1, state.known)
        count = optax.safe_increment(jnp.where(ended, 0, state.steps))
        old = jnp.where(ended, 0, state.mean)
        mean = old + (losses / count - old / count)
        defined = (known == 2) & (last[1] != 0)
        largest = jnp.finfo(losses.dtype).max
        ratio = jnp.clip(jnp.where(defined, last[0] / jnp.where(defined, last[1], 1), 1), -largest, largest)
        current = jnp.where(epoch_end, optax.safe_increment(state.current), state.current)
        following = DWAState(mean, count, jnp.full_like(state.epoch, state.current), last, known, current)
        return jnp.sum(present) * softmax(ratio, present, temperature), following

    return from_kernel(kernel, start, num_tasks=num_tasks, arguments=() if window else (EPOCH_END,))


ROW = Row(
    dwa,
    scale="sum (weights sum to K)",
    state="K means of losses, twice K means of the last epochs, counts",
    papers=(
        Paper(
            "End-to-End Multi-Task Learning with Attention",
            "Shikun Liu, Edward Johns, Andrew J. Davison",
            2019,
            booktitle="CVPR",
            arxiv="1803.10704",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"num_tasks": num_tasks, "window": 1},
    checked="numpy float64 of the published formula; TorchJD",
)
