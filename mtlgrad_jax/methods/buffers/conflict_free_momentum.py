"""M-ConFIG, ConFIG on momenta (Liu, Chu & Thuerey 2025, arXiv 2408.11104).

Follows the official code (PseudoMomentumOperator). The paper updates the momentum of one task in each step, which saves
the backward passes of the others: here those of the tasks in `task_mask`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_count, check_dtype, check_number
from mtlgrad_jax._core.control import map_leaves, once
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.row import PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype, widened
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.methods.gramian.conflict_free import ROW as CONFLICT_FREE
from mtlgrad_jax.methods.gramian.conflict_free import equal_cosines


class ConflictFreeMomentumState(NamedTuple):
    """State of conflict_free_momentum."""

    momentum: PyTree  # bias-corrected, leaves (K, *parameter shape)
    seen: Int[Array, " K"]  # steps in which each task was present
    direction: PyTree  # the last one of ConFIG, with Adam's bias
    root: PyTree  # of the running average of squares
    steps: Int[Array, ""]  # in which all momenta were set


def conflict_free_momentum(
    num_tasks: int,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    buffer_dtype: DTypeLike | None = None,
) -> Method:
    r"""Follow ConFIG's direction of the tasks' momenta, scaled coordinate by coordinate as in Adam.

    .. math:: m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
              d = \operatorname{ConFIG}(\hat m_1, \ldots, \hat m_K), \qquad
              v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2, \qquad u = d / (\sqrt{\hat v} + \epsilon)
    .. math:: \tilde g_t = \frac{\tilde m_t - \beta_1 \tilde m_{t-1}}{1 - \beta_1}, \qquad
              \tilde m_t = (1 - \beta_1^t) \, d_t

    with hats for bias correction and :math:`\tilde g` the gradient whose momentum would be d. All K momenta take part
    in every step; an absent task's stays as it is. With one task present in each step, in turn, this is the paper's
    method. Until every task has been present once, the update is zero.

    The update is already scaled as Adam's: follow it with plain `optax.sgd`.

    The state holds K + 2 times the parameters.

    Args:
      num_tasks: K.
      b1: decay :math:`\beta_1` of the momenta, in [0, 1).
      b2: decay :math:`\beta_2` of the squares, in [0, 1).
      eps: :math:`\epsilon` >= 0, in units of the gradients, as in Adam.
      buffer_dtype: dtype of the K momenta; the parameters' for None. The other two buffers are in at least float32: in
        16 bits, squares would not decay.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.conflict_free_momentum(num_tasks=2)
      >>> state, grads = tx.init(jnp.zeros(2)), jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
      >>> first, state = tx.update(grads, state, task_mask=jnp.asarray([True, False]))
      >>> second, state = tx.update(grads, state, task_mask=jnp.asarray([False, True]))
      >>> first.tolist(), second.tolist()
      ([0.0, 0.0], [1.0, 1.0])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("b1", b1, at_least=0, below=1)
    check_number("b2", b2, at_least=0, below=1)
    check_number("eps", eps, at_least=0)
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> ConflictFreeMomentumState:
        zero = widened(stacks.zero_gradient(params))
        seen, steps = (jnp.zeros(shape, jnp.int32) for shape in ((num_tasks,), ()))
        return ConflictFreeMomentumState(stacks.zeros(params, num_tasks, buffer_dtype), seen, zero, zero, steps)

    def rule(
        task_grads: PyTree, *, present: Present, state: ConflictFreeMomentumState
    ) -> tuple[PyTree, ConflictFreeMomentumState]:
        seen = jnp.where(present, optax.safe_increment(state.seen), state.seen)
        ready = once(jnp.all(seen > 0))
        new = (1 - b1) / _filled(b1, jnp.maximum(seen, 1))
        moved = stacks.mix(1 - new, state.momentum, new, jax.lax.stop_gradient(task_grads))
        momentum = stacks.select(present, moved, state.momentum)
        weights = equal_cosines(stacks.gramian(momentum), jnp.ones_like(new), "projection")
        config = stacks.combine(weights, momentum)

        steps = jnp.where(ready, optax.safe_increment(state.steps), state.steps)
        first, second = once(jnp.stack([_filled(decay, jnp.maximum(steps, 1)) for decay in (b1, b2)]))

        def adam(config: Array, direction: Array, root: Array) -> tuple[Array, Array, Array]:
            if not jnp.issubdtype(config.dtype, jnp.floating):
                return config, direction, root
            wide = jnp.promote_types(config.dtype, jnp.float32)
            config, before, square = (leaf.astype(wide) for leaf in (config, direction, root))
            now = first.astype(wide) * config
            pseudo = (now - b1 * before) / (1 - b1)
            square = jnp.hypot(jnp.sqrt(b2) * square, jnp.sqrt(1 - b2) * pseudo)
            scale = square / jnp.sqrt(second).astype(wide) + eps
            update = jnp.where(ready & (scale > 0), config / jnp.where(scale > 0, scale, 1), 0)
            return update, jnp.where(ready, now, direction), jnp.where(ready, square, root)

        parts = map_leaves(adam, config, state.direction, state.root)
        update, direction, root = jax.tree.transpose(jax.tree.structure(config), jax.tree.structure((0, 0, 0)), parts)
        return update, ConflictFreeMomentumState(momentum, seen, direction, root, steps)

    return from_rule(rule, init, num_tasks=num_tasks, leaves_alike=True)


def _filled(decay: Number, steps: Array) -> Array:
    """Return 1 - decay^steps, the part of a running average that is not its initial value, without cancellation."""
    return -jnp.expm1(steps.astype(accumulator_dtype()) * jnp.log1p(-jnp.asarray(1 - decay, accumulator_dtype())))


ROW = Row(
    conflict_free_momentum,
    scale="Adam's: coordinates of about 1",
    state="K + 2 gradients, K + 1 counts",
    papers=CONFLICT_FREE.papers,
    promises=frozenset({PERMUTATION}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; formula from official code",
)
