"""Compose losses, a method and an optimizer: `balanced_value_and_grad`, `chain`, `accumulate`, `pareto_front`."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count, check_function, check_state
from mtlgrad_jax._core.control import cond, map_leaves
from mtlgrad_jax._core.method import Method, update_without_task_axis
from mtlgrad_jax._core.step import UPDATE_ARGUMENTS, canonical, infos, keep_infos, was_empty
from mtlgrad_jax._core.tasks import (
    Jacobian,
    accumulator_dtype,
    check_num_tasks,
    own_losses,
    task_vector,
    widened,
)
from mtlgrad_jax._core.trees import row_shapes, unaliased
from mtlgrad_jax.oracles.linearize import linearize
from mtlgrad_jax.oracles.losses import Argnums, check_oracle


def balanced_value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    argnums: Argnums = 0,
    has_aux: bool = False,
    rows: int | None = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """Return a function that gives the losses and the one gradient into which a method combines theirs.

    It has the form of `jax.value_and_grad`, for training loops that expect a gradient: nnx.Optimizer, TrainState. Up to
    rounding, the gradient is that of the method on stacked gradients, with the memory of one backward pass: Gramian (if
    the method looks at it), weights, pullback.

    Args:
      losses_fn: returns a (K,) array or a pytree of K scalars; with `has_aux`, a pair of losses and anything else.
      method: any method of this library; its first state is `method.init(params)`. If its result is not a weighted sum
        of the gradients, all K gradients are stored.
      argnums: positional arguments of `losses_fn` to differentiate with respect to.
      has_aux: whether `losses_fn` returns (losses, aux).
      rows: gradients held at a time, as in `linearize`.

    Returns:
      `step(params, state, *args, extra_args=None, **kwargs) -> (losses, gradient, state)`, where `losses_fn` is called
      as `losses_fn(params, *args, **kwargs)`, and `extra_args` holds arguments of the method's update, such as
      `{"task_mask": mask}`; with `has_aux`, `((losses, aux), gradient, state)`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> method, params = mtl.mgda(), jnp.asarray([0.5])
      >>> step = mtl.balanced_value_and_grad(lambda w: jnp.stack([w[0] ** 2, (w[0] - 1) ** 2]), method)
      >>> losses, gradient, state = step(params, method.init(params))
      >>> gradient.tolist()  # Pareto stationary
      [0.0]
    """
    check_oracle(losses_fn, argnums, has_aux)
    check_keywords(losses_fn)
    if not isinstance(method, optax.GradientTransformation):
        raise ValueError(f"`method` must be one such as mtlgrad_jax.cagrad(), got {type(method).__name__}.")
    if rows is not None:
        check_count("rows", rows, at_least=1)
    tx = optax.with_extra_args_support(method)

    def step(
        params: PyTree, state: PyTree, /, *args: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        positions = argnums if isinstance(argnums, int) else tuple(argnums)
        jacobian = linearize(losses_fn, params, *args, argnums=positions, has_aux=has_aux, rows=rows, **kwargs)
        gradient, new_state = tx.update(jacobian, state, None, **(extra_args or {}))
        return ((jacobian.losses, jacobian.aux) if has_aux else jacobian.losses), gradient, new_state

    return step


def check_keywords(losses_fn: Callable[..., Any]) -> None:
    """Raise if `losses_fn` takes `extra_args`, which `balanced_value_and_grad` keeps for the method's update."""
    check_function("losses_fn", losses_fn)
    if "extra_args" in inspect.signature(losses_fn).parameters:
        raise ValueError(
            "`losses_fn` must not take `extra_args`: step(..., extra_args={}) holds arguments of the method's update. "
            "Rename the argument."
        )


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chain a whole optimizer around one method: an `optax.chain` in which a skipped step changes nothing.

    If the method skips a step because something is not finite, or if no task is present, the update is zero and every
    state stays as it was, except for the `Info` that counts it and for metrics: no momentum, decay, schedule or counter
    after the method moves. Everything after the method runs under one `lax.cond`. Arguments of the update that methods
    declare (`losses`, `task_mask`, ...) end at the method. All others pass on, so that line searches work: give them
    the mean loss as `value` and the mean gradient as `grad`. The mean loss need not decrease along a method's
    direction.

    Args:
      *transforms: exactly one must contain a method, bare or wrapped (inject_hyperparams, optax.chain). Those before it
        act on stacked gradients, those after it on the one gradient. If there are transformations before the method, a
        TaskJacobian is turned into rows.

    Returns:
      An optax transformation from stacked gradients, or a TaskJacobian, to updates.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = mtl.chain(mtl.upgrad(), optax.sgd(0.1, momentum=0.9))
      >>> grads, params = jnp.asarray([[1.0, 0.5], [-0.5, 1.0]]), jnp.asarray([1.0, -2.0])
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> updates, state = tx.update(grads.at[0, 0].set(jnp.nan), state, params)
      >>> updates.tolist()
      [0.0, 0.0]
    """
    for transform in transforms:
        if not isinstance(transform, optax.GradientTransformation):
            raise ValueError(f"`transforms` must be optax transformations, got {type(transform).__name__}.")
    members = [optax.with_extra_args_support(transform) for transform in transforms]

    def place(states: tuple[PyTree, ...]) -> int:
        found = [i for i, state in enumerate(states) if infos(state)]
        if len(found) != 1:
            raise ValueError(
                f"`transforms` must hold exactly one method of mtlgrad_jax, got {len(found)}. For several groups of "
                "leaves, let that one be partition, shared_private or grouped."
            )
        return found[0]

    def init(params: PyTree) -> tuple[PyTree, ...]:
        states = tuple(member.init(params) for member in members)
        if _accumulates(states[place(states)]):
            raise ValueError(
                "`transforms` must not accumulate, as what follows would act in every micro-batch: write "
                "accumulate(chain(method, optimizer), num_tasks, steps)."
            )
        return unaliased(states, params)

    def update(
        task_grads: PyTree, state: tuple[PyTree, ...], params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        if len(state) != len(members):
            raise ValueError(
                f"`state` must be that of this chain, of {len(members)} transformations, got {len(state)}."
            )
        at, new = place(state), list(state)
        if at and isinstance(task_grads, Jacobian):
            extra["losses"] = own_losses(task_grads, extra.get("losses"))
            task_grads = task_grads.rows()
        for i in range(at):
            task_grads, new[i] = members[i].update(task_grads, state[i], params, **extra)
            _check_kept(i, state[i], new[i], "Write mtlgrad_jax.per_task(transform, num_tasks) before the method.")
        gradient, new[at] = update_without_task_axis(
            f"transforms[{at}]", members[at], task_grads, state[at], params, **extra
        )
        passed = {name: value for name, value in extra.items() if name not in UPDATE_ARGUMENTS}

        def behind() -> tuple[PyTree, list[PyTree]]:
            updates, states = gradient, new[: at + 1]
            for i in range(at + 1, len(members)):
                updates, after = members[i].update(updates, state[i], params, **passed)
                _check_kept(i, state[i], after, "Put it outside: optax.chain(mtlgrad_jax.chain(...), transform).")
                states.append(after)
            return updates, states

        def nothing() -> tuple[PyTree, list[PyTree]]:
            updates = jax.tree.map(jnp.zeros_like, jax.eval_shape(behind)[0])
            counted = new[at] if isinstance(members[at], Method) else keep_infos(state[at], new[at])
            return updates, [*state[:at], counted, *state[at + 1 :]]

        updates, states = cond(~was_empty(new[at]), behind, nothing)
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_kept(place: int, old: PyTree, new: PyTree, instead: str) -> None:
    before, after = ([jnp.shape(leaf) for leaf in jax.tree.leaves(state)] for state in (old, new))
    if before != after:
        raise ValueError(
            f"`transforms[{place}]` must keep the shapes of its state; they changed in an update. {instead}"
        )


class AccumulateState(NamedTuple):
    """State of accumulate."""

    sums: PyTree  # leaves (K, *parameter shape): each task's gradients so far, times their sizes
    losses: Float[Array, " K"]
    sizes: Float[Array, " K"]  # total size of the micro-batches in which each task was present and finite
    step: Int[Array, ""]  # micro-batches so far, modulo `steps`
    epoch_end: Bool[Array, ""]  # whether an epoch ended in one of them
    inner: PyTree


def accumulate(tx: optax.GradientTransformation, num_tasks: int, steps: int) -> optax.GradientTransformationExtraArgs:
    """Average each task's gradient over several micro-batches, and step once with the averages.

    Replaces `optax.MultiSteps`, whose buffers have no task axis. Each task's mean is over the micro-batches in which it
    was present and finite; a task that was in none is absent in the step. Losses are averaged the same way, an
    `epoch_end` in any micro-batch counts, and other arguments of the update come from the last one. In between, updates
    are zero and the state of `tx` does not change. A TaskJacobian is turned into rows: to keep the memory of one
    backward pass, let `losses_fn` scan the micro-batches itself, under `jax.checkpoint`.

    Args:
      tx: a method, or a chain with one.
      num_tasks: K.
      steps: micro-batches per step.

    Returns:
      An optax transformation whose update also takes `sizes`, for micro-batches of unequal size: one number, or one per
      task, under the tasks' names if the losses have names. `has_updated(state)` tells whether the last update was a
      step.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = mtl.accumulate(mtl.chain(mtl.upgrad(), optax.sgd(1.0)), num_tasks=2, steps=2)
      >>> grads, params = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(2)
      >>> first, state = tx.update(grads, tx.init(params), params)
      >>> second, state = tx.update(3 * grads, state, params)
      >>> first.tolist(), second.tolist(), bool(mtl.has_updated(state))
      ([0.0, 0.0], [-1.0, -1.0], True)
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"`tx` must be an optax transformation, got {type(tx).__name__}.")
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("steps", steps, at_least=1)
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> AccumulateState:
        losses, sizes = (jnp.zeros((num_tasks,), accumulator_dtype()) for _ in range(2))
        sums, step, ended = widened(stacks.zeros(params, num_tasks)), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return unaliased(AccumulateState(sums, losses, sizes, step, ended, inner.init(params)), params)

    def update(
        task_grads: PyTree,
        state: AccumulateState,
        params: PyTree | None = None,
        *,
        sizes: Any = 1.0,
        epoch_end: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, AccumulateState]:
        if isinstance(task_grads, Jacobian):
            extra["losses"], task_grads = own_losses(task_grads, extra.get("losses")), task_grads.rows()
        check_num_tasks(num_tasks, stacks.num_tasks(task_grads, params))
        check_state(state, init, row_shapes(task_grads))
        extra = canonical(extra, num_tasks, getattr(tx, "arguments", ()))
        losses, seen = extra.get("losses"), extra["task_mask"] & stacks.finite_tasks(task_grads)
        values = jnp.zeros((num_tasks,), accumulator_dtype())
        if losses is not None:
            values = losses.astype(values.dtype)
            seen &= jnp.isfinite(values)
        if not jax.tree_util.all_leaves([sizes]) or jnp.ndim(sizes):
            sizes = task_vector("sizes", sizes, num_tasks=num_tasks, names=extra["task_names"])
        size = jnp.where(seen, jnp.asarray(sizes, values.dtype), 0)

        def add(total: Array, leaf: Array) -> Array:
            added = stacks.column(size, leaf).astype(total.dtype) * leaf.astype(total.dtype)
            return total + jnp.where(stacks.column(seen, leaf), added, 0)

        sums = map_leaves(add, state.sums, task_grads)
        loss_sums, total = state.losses + jnp.where(seen, size * values, 0), state.sizes + size
        count = optax.safe_increment(state.step)
        present = total > 0
        ended = state.epoch_end if epoch_end is None else state.epoch_end | epoch_end
        if epoch_end is not None:
            extra["epoch_end"] = ended

        def finish() -> tuple[PyTree, AccumulateState]:
            share = jnp.where(present, 1 / jnp.where(present, total, 1), 0)
            means = map_leaves(
                lambda leaf, like: (stacks.column(share, leaf).astype(leaf.dtype) * leaf).astype(like.dtype),
                sums,
                task_grads,
            )
            averages = None if losses is None else jnp.where(present, loss_sums * share, 1)
            now = {**extra, "losses": averages, "task_mask": present}
            updates, after = update_without_task_axis("tx", inner, means, state.inner, params, **now)
            summed = AccumulateState(sums, loss_sums, total, count, ended, None)
            return updates, map_leaves(jnp.zeros_like, summed)._replace(inner=after)

        def wait() -> tuple[PyTree, AccumulateState]:
            updates = jax.tree.map(jnp.zeros_like, jax.eval_shape(finish)[0])
            return updates, AccumulateState(sums, loss_sums, total, count, ended, state.inner)

        return cond(count >= steps, finish, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulates(state: PyTree) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AccumulateState))
    return any(isinstance(node, AccumulateState) for node in nodes)


def has_updated(state: AccumulateState) -> Bool[Array, ""]:
    """Return whether the last update of `accumulate` was a step."""
    if not isinstance(state, AccumulateState):
        raise ValueError(f"`state` must be that of accumulate, got {type(state).__name__}.")
    return state.step == 0


def pareto_front(
    losses_fn: Callable[..., Any],
    optimizer: Callable[[PyTree], optax.GradientTransformation],
    params: PyTree,
    preferences: PyTree,
    batches: PyTree = None,
    steps: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Train one network for every preference, all side by side in one compiled program.

    The preferences are an axis of one `jax.vmap` over the whole training loop, so N networks need N times the memory of
    one step. All start at the same parameters.

    Args:
      losses_fn: `losses_fn(params, batch)` returns a (K,) array or a pytree of K scalars; without `batches`,
        `losses_fn(params)`.
      optimizer: maps one preference to an optimizer with a method in it, such as
        `lambda r: mtl.chain(mtl.stch(0.1, weights=r), optax.adam(1e-3))`. It is called with traced values.
      params: the parameters to start from.
      preferences: (N, K), or a pytree under the tasks' names with leaves (N,); see `diagnostics.simplex_lattice`.
      batches: a pytree of arrays with one leading axis over the steps.
      steps: number of steps, if there are no batches.

    Returns:
      The parameters, with a leading axis N, and the losses before each step, with leading axes N and steps.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> losses_fn = lambda x: jnp.stack([x**2, (x - 1) ** 2])
      >>> optimizer = lambda r: mtl.chain(mtl.constant(r), optax.sgd(0.1))
      >>> preferences = mtl.diagnostics.simplex_lattice(2, divisions=4)
      >>> x, losses = mtl.pareto_front(losses_fn, optimizer, jnp.asarray(0.0), preferences, steps=100)
      >>> x.tolist(), losses.shape
      ([1.0, 0.75, 0.5, 0.25, 0.0], (5, 100, 2))
    """
    check_function("losses_fn", losses_fn)
    check_function("optimizer", optimizer)
    if (batches is None) == (steps is None):
        raise ValueError("`steps` must be given, or `batches`, and not both.")
    if steps is not None:
        check_count("steps", steps, at_least=1)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(preferences)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"`preferences` must have one leading axis over the networks, got {counts or 'none'}.")

    return _train_each(losses_fn, optimizer, steps, params, jax.tree.map(jnp.asarray, preferences), batches)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _train_each(
    losses_fn: Callable[..., Any],
    optimizer: Callable[[PyTree], optax.GradientTransformation],
    steps: int | None,
    params: PyTree,
    preferences: PyTree,
    batches: PyTree,
) -> tuple[PyTree, PyTree]:
    def train(preference: PyTree) -> tuple[PyTree, PyTree]:
        tx = optimizer(preference)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(f"`optimizer` must return an optax transformation, got {type(tx).__name__}.")

        def step(carry: tuple[PyTree, PyTree], batch: PyTree) -> tuple[tuple[PyTree, PyTree], PyTree]:
            params, state = carry
            jacobian = linearize(losses_fn, params, *(() if batches is None else (batch,)))
            updates, state = tx.update(jacobian, state, params)
            return (optax.apply_updates(params, updates), state), jacobian.losses

        (trained, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches, length=steps)
        return trained, losses

    return jax.vmap(train)(preferences)
