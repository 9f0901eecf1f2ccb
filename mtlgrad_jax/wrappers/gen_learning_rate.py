"""GeN, the generalized Newton's learning rate (Bu & Xu, ICLR 2025, OpenReview bI3fcTsKW4).

Follows the official code (ShiyunXu/AutoGeN). That code fits slope and curvature by least squares to probes at minus and
plus one step, with the loss at zero held fixed. Two unknowns fit two points exactly, so its condition R^2 > 0.99 always
holds and is omitted here. Departures: a probe with a NaN or inf leaves the learning rate unchanged (the code halves
it), and the loss is the one passed to the update (the code uses the next batch).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_function, check_number
from mtlgrad_jax._core.control import cond, map_leaves
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.tasks import accumulator_dtype


class GenLearningRateState(NamedTuple):
    """State of gen_learning_rate."""

    learning_rate: Float[Array, ""]
    step: Int[Array, ""]
    accepted: Int[Array, ""]  # fits that changed the learning rate
    rejected: Int[Array, ""]  # fits that did not: no minimum ahead, or a loss was NaN or inf


def gen_learning_rate(
    learning_rate: Number, every: int = 8, smoothing: Number = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Scale by a learning rate that follows the minimum of a parabola through three losses along the step.

    .. math:: L_k = L(\theta - k \eta d), \qquad
              \eta^* = \frac{\eta}{2} \frac{L_{-1} - L_1}{L_1 - 2 L_0 + L_{-1}}, \qquad
              \eta \leftarrow \gamma \eta + (1 - \gamma) \operatorname{clip}(\eta^*, \eta / 2, 2 \eta)

    It replaces `optax.scale_by_learning_rate` at the end of a chain: it takes d and returns :math:`-\eta d`. Every few
    steps it evaluates the loss at k = -1, 1, and at 0 unless `value` is given; the steps in between evaluate nothing,
    except under vmap, where every step pays. The new learning rate applies to the same step. It stays unchanged if the
    parabola has no minimum ahead (slope and curvature must be positive) or a loss is NaN or inf.

    `update` takes `value_fn`, a function from params to the scalar loss, which may close over the batch, and optionally
    `value`, its value at params.

    Args:
      learning_rate: initial :math:`\eta` > 0. Each fit multiplies it by at least (1 + gamma)/2 and at most 2 - gamma.
      every: steps from one fit to the next; the authors recommend 8, NGDiff uses 10.
      smoothing: :math:`\gamma`, in [0, 1).

    Returns:
      A transformation of gradients that are no longer stacked.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = optax.chain(mtl.mean(), mtl.gen_learning_rate(0.1, every=1))
      >>> params = jnp.asarray([1.0, 2.0])
      >>> grads = jnp.stack([params, 3 * params])  # of two tasks, whose mean loss has its minimum at eta = 0.5
      >>> update, state = tx.update(grads, tx.init(params), params, value_fn=lambda params: params @ params)
      >>> update.tolist(), float(state[1].learning_rate)
      ([-0.22, -0.44], 0.11)
    """
    check_number("learning_rate", learning_rate, above=0)
    check_count("every", every, at_least=1)
    check_number("smoothing", smoothing, at_least=0, below=1)

    def init(params: PyTree) -> GenLearningRateState:
        step, accepted, rejected = (jnp.zeros((), jnp.int32) for _ in range(3))
        return GenLearningRateState(jnp.array(learning_rate, accumulator_dtype()), step, accepted, rejected)

    def update(
        updates: PyTree,
        state: GenLearningRateState,
        params: PyTree | None = None,
        *,
        value_fn: Callable[[PyTree], Any] | None = None,
        value: Any = None,
        **unused: Any,
    ) -> tuple[PyTree, GenLearningRateState]:
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(f"`{missing}` must be given. Write update(grads, state, params, value_fn=loss_of_params).")
        check_function("value_fn", value_fn)

        def loss_at(params: PyTree) -> Float[Array, ""]:
            return _scalar("value_fn", value_fn(params))

        jax.eval_shape(loss_at, params)  # raises errors in the first step, not at the first fit
        known = None if value is None else _scalar("value", value)

        def fitted() -> GenLearningRateState:
            eta = state.learning_rate
            ahead, behind = (loss_at(optax.apply_updates(params, _scaled(factor * eta, updates))) for factor in (-1, 1))
            here = loss_at(params) if known is None else known
            slope, curvature = behind - ahead, (ahead - here) + (behind - here)
            accept = (slope > 0) & (curvature > 0) & jnp.isfinite(slope) & jnp.isfinite(curvature)
            factor = jnp.clip(slope / jnp.where(accept, 2 * curvature, 1), 0.5, 2)
            return state._replace(
                learning_rate=jnp.where(accept, eta * (smoothing + (1 - smoothing) * factor), eta),
                accepted=jnp.where(accept, optax.safe_increment(state.accepted), state.accepted),
                rejected=jnp.where(accept, state.rejected, optax.safe_increment(state.rejected)),
            )

        step = optax.safe_increment(state.step)
        state = cond(step % every == 0, fitted, lambda: state)._replace(step=step)
        return _scaled(-state.learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scalar(name: str, value: Any) -> Float[Array, ""]:
    if jnp.shape(value) != ():
        raise ValueError(f"`{name}` must give a scalar loss, got shape {jnp.shape(value)}.")
    return jax.lax.stop_gradient(jnp.asarray(value, accumulator_dtype()))


def _scaled(factor: Float[Array, ""], tree: PyTree) -> PyTree:
    return map_leaves(lambda leaf: (factor * leaf).astype(leaf.dtype), tree)


ROW = Row(
    gen_learning_rate,
    scale="minus the learning rate times the input",
    state="a learning rate, three counts",
    papers=(
        Paper(
            "Gradient descent with generalized Newton's method",
            "Zhiqi Bu, Shiyun Xu",
            2025,
            booktitle="ICLR",
            openreview="bI3fcTsKW4",
        ),
    ),
    note="formulas from the official code",
    kwargs=lambda num_tasks: {"learning_rate": 0.1},
    functions=("value_fn",),
)
