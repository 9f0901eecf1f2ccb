"""Metrics of the tasks' gradients in a step, kept in the optimizer state for logging."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count
from mtlgrad_jax._core.method import Method, as_matrix
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import was_skipped
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax.solvers._solution import in_full_precision


class Metrics(NamedTuple):
    """Metrics of one step; entries of absent tasks are zero."""

    weights: Float[Array, " K"] | None  # None if the method has none
    norms: Float[Array, " K"]
    cosines: Float[Array, "K K"]
    conflict_fraction: Float[Array, ""]  # share of the task pairs whose gradients have a negative inner product
    magnitude_similarity: Float[Array, ""]  # mean over pairs of 2 n_i n_j / (n_i^2 + n_j^2)
    predicted_change: Float[Array, " K"]  # first-order change of each loss per unit of learning rate: -<g_i, d>


class MetricsState(NamedTuple):
    """State of with_metrics."""

    metrics: Metrics
    inner: PyTree


def with_metrics(method: Method, num_tasks: int) -> Method:
    """Keep a step's weights, norms, cosines and conflicts in the state, where `metrics(opt_state)` finds them.

    The Gramian is computed in every step, even for methods that do not use it. A step skipped because of a NaN or inf
    leaves the metrics unchanged; in one without tasks they are zero. For a method that does not combine the tasks by
    weights, there are no weights, and the predicted changes come from the update itself. `with_metrics` sees the
    weights inside `shared_private` or `skip_nonfinite_tasks`, but not around them.

    Args:
      method: any of this library.
      num_tasks: K.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.with_metrics(mtl.mgda(), num_tasks=2)
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> float(mtl.metrics(state)["conflict_fraction"]), mtl.metrics(state)["weights"].tolist()
      (1.0, [0.6, 0.4])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    known_tasks = num_tasks

    def first_metrics() -> Metrics:
        row, square = (known_tasks,), (known_tasks, known_tasks)
        weights, *others = (jnp.zeros(shape, accumulator_dtype()) for shape in (row, row, square, (), (), row))
        return Metrics(None if method.weigh is None else weights, *others)

    if not isinstance(method, Method):
        raise ValueError(
            f"`method` must be a method of this library, got {type(method).__name__}. Put with_metrics inside: "
            "optax.chain(with_metrics(method, num_tasks), optax.adam(1e-3)), and so with inject_hyperparams."
        )
    weigh = method.weigh

    def init(params: PyTree) -> MetricsState:
        return MetricsState(first_metrics(), method.init(params))

    def weigh_and_measure(
        gramian: Any, state: MetricsState, *, task_mask: Array, **extra: Any
    ) -> tuple[Array, MetricsState]:
        assert weigh is not None
        gramian = as_matrix(gramian, known_tasks)
        weights, inner = weigh(gramian, state.inner, task_mask=task_mask, **extra)
        M = _finite(gramian, task_mask)
        with in_full_precision():
            change = -M @ weights
        return weights, _next(state, _measure(M, weights, change, task_mask), inner)

    if weigh is not None:
        return Method(init, weigh=weigh_and_measure, like=method, looks=method.looks, num_tasks=known_tasks)

    def update(
        task_grads: PyTree, state: MetricsState, params: PyTree | None, *, task_mask: Array, **extra: Any
    ) -> tuple[PyTree, MetricsState]:
        gradient, inner = method.update(task_grads, state.inner, params, task_mask=task_mask, **extra)
        present = task_mask & stacks.finite_tasks(task_grads)
        change = -stacks.project(task_grads, gradient)
        change = jnp.where(present & jnp.isfinite(change), change, 0)
        M = _finite(stacks.gramian(task_grads, present), present)
        return gradient, _next(state, _measure(M, None, change, present), inner)

    return Method(init, update, like=method, num_tasks=known_tasks, leaves_alike=method.leaves_alike)


def _next(state: MetricsState, metrics: Metrics, inner: PyTree) -> MetricsState:
    skipped = was_skipped(inner)
    kept = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), metrics, state.metrics)
    return MetricsState(kept, inner)


def _finite(gramian: Array, present: Array) -> Array:
    return jnp.where(present[:, None] & present[None, :] & jnp.isfinite(gramian), gramian, 0)


def _measure(
    M: Float[Array, "K K"], weights: Array | None, predicted_change: Array, present: Bool[Array, " K"]
) -> Metrics:
    K = len(present)
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(M), 0))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    pairs = present[:, None] & present[None, :] & ~jnp.eye(K, dtype=bool)
    smaller, larger = jnp.minimum(norms[:, None], norms[None, :]), jnp.maximum(norms[:, None], norms[None, :])
    ratio = smaller / jnp.where(larger > 0, larger, 1)

    def pair_mean(values: Array) -> Array:
        return jnp.sum(jnp.where(pairs, values, 0)) / jnp.maximum(jnp.sum(pairs), 1)

    return Metrics(
        weights,
        norms,
        jnp.clip(M * inverse[:, None] * inverse[None, :], -1, 1),
        pair_mean(M < 0),
        pair_mean(jnp.where(larger > 0, 2 * ratio / (1 + ratio**2), 1)),
        predicted_change,
    )


ROW = Row(
    with_metrics,
    scale="the method's",
    state="K×K metrics",
    kwargs=lambda num_tasks: {"num_tasks": num_tasks},
    wraps="mgda",
)
