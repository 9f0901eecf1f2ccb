"""One step of a method: its input, the tasks present, the next state, and the outcome."""

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax._core.checks import as_array
from mtlgrad_jax._core.tasks import FLAT, accumulator_dtype, present_tasks, task_names, task_vector
from mtlgrad_jax.solvers._solution import (
    BIASED,
    FAILED,
    INFEASIBLE,
    LAGGED,
    NO_TASKS,
    NONFINITE,
    SOLVED,
    TOO_FEW_TASKS,
    Solution,
)
from mtlgrad_jax.stacks import all_finite, once


class Info(NamedTuple):
    """How the last step went, and how often steps went wrong; found in any state by `optax.tree.get(state, "info")`."""

    residual: Float[Array, ""]  #: scale-free optimality residual of the solver, 0 for closed forms
    steps: Int[Array, ""]  #: solver steps taken
    result: Int[Array, ""]  #: a key of RESULTS
    fallbacks: Int[Array, ""]  #: updates so far that used another gradient in place of the method's
    skipped: Int[Array, ""]  #: updates so far that were zero: not finite, or a loss outside the domain


def first_info() -> Info:
    """Return the info of a method that has not been called yet."""
    residual, *counts = (jnp.zeros((), dtype) for dtype in (accumulator_dtype(), *4 * (jnp.int32,)))
    return Info(residual, *counts)


def next_info(
    info: Info,
    *,
    residual: Float[Array, ""] | float = 0.0,
    steps: Int[Array, ""] | int = 0,
    result: Int[Array, ""] | int = SOLVED,
    count: Int[Array, ""],
    fewest: int,
    finite: Bool[Array, ""] | bool = True,
    solved: Bool[Array, ""] | bool = True,
) -> Info:
    """Return the info after a step with `count` tasks present of the `fewest` that the method needs."""
    instead = (count < fewest) | ~jnp.asarray(solved) | (jnp.asarray(result) == INFEASIBLE)
    fallback = (count > 0) & instead
    result = jnp.where(solved, result, FAILED)
    result = jnp.where(count < fewest, TOO_FEW_TASKS, result)
    result = jnp.where(count == 0, NO_TASKS, result)
    result = jnp.where(finite, result, NONFINITE)
    return Info(
        residual=jnp.asarray(residual, info.residual.dtype),
        steps=jnp.asarray(steps, jnp.int32),
        result=result.astype(jnp.int32),
        fallbacks=jnp.where(fallback, optax.safe_increment(info.fallbacks), info.fallbacks),
        skipped=jnp.where(finite, info.skipped, optax.safe_increment(info.skipped)),
    )


def _map_infos(change: Callable[[Info], Info], state: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, Info) else node,
        state,
        is_leaf=lambda node: isinstance(node, Info),
    )


def infos(state: PyTree) -> list[Info]:
    """Return all infos in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Info))
    return [node for node in nodes if isinstance(node, Info)]


def was_skipped(state: PyTree) -> Bool[Array, ""]:
    """Return whether a method in this state skipped its last step because something was not finite."""
    skipped = [jnp.any(info.result == NONFINITE) for info in infos(state)]
    return jnp.stack(skipped).any() if skipped else jnp.asarray(False)


def was_empty(state: PyTree) -> Bool[Array, ""]:
    """Return whether the last step changed nothing: it was skipped, or no task was present anywhere."""
    empty = [jnp.all(info.result == NO_TASKS) for info in infos(state)]
    return was_skipped(state) | (jnp.stack(empty).all() if empty else False)


def keep_infos(state: PyTree, other: PyTree) -> PyTree:
    """Return `state` with the infos of `other`."""
    found = iter(infos(other))
    return _map_infos(lambda _: next(found), state)


def mark_skipped(state: PyTree) -> PyTree:
    """Return a state unchanged except for its infos, which count a step skipped because it was not finite."""

    def skipped(info: Info) -> Info:
        return info._replace(result=jnp.full_like(info.result, NONFINITE), skipped=optax.safe_increment(info.skipped))

    return _map_infos(skipped, state)


def mark_idle(state: PyTree, present: Bool[Array, " K"]) -> PyTree:
    """Return a state unchanged except for its infos, which say that nothing had to be solved in this step."""

    def idle(info: Info) -> Info:
        result = jnp.where(jnp.any(present), SOLVED, NO_TASKS).astype(info.result.dtype)
        return info._replace(
            residual=jnp.zeros_like(info.residual),
            steps=jnp.zeros_like(info.steps),
            result=jnp.broadcast_to(result, info.result.shape),
        )

    return _map_infos(idle, state)


def mark_solved(state: PyTree, residual: Array, steps: Array, result: Array) -> PyTree:
    """Return a state unchanged except for its infos, which include one more solve of the same step."""

    def solved(info: Info) -> Info:
        return info._replace(
            residual=jnp.maximum(info.residual, residual.astype(info.residual.dtype)),
            steps=info.steps + steps.astype(info.steps.dtype),
            result=jnp.where(
                (info.result == SOLVED) | ((info.result == BIASED) & (result != SOLVED)),
                result.astype(info.result.dtype),
                info.result,
            ),
        )

    return _map_infos(solved, state)


class MethodState(NamedTuple):
    """State of a method: its own state, and how the last step went."""

    method: PyTree  # what the method keeps
    info: Info


class Argument(NamedTuple):
    """An argument of an update besides the gradients, passed as `update(..., name=value)`."""

    name: str
    axes: str = "K"  #: "K" for a number for every task, "K K" for one for every pair, "" for a flag
    above: Any = None  #: a bound that its entries must exceed, a number or one for every task
    at_least: float | None = None  #: the smallest valid entry
    required: bool = True  #: if not, a formula gets None where it is missing
    stand_in: str | None = None  #: what replaces it if it is missing
    missing: int = SOLVED  #: the result code if it is missing

    def valid(self, entries: Array) -> Bool[Array, "..."]:
        """Return which entries are finite and within the bounds."""
        valid = jnp.isfinite(entries)
        valid = valid if self.above is None else valid & (entries > _bound(self.above))
        return valid if self.at_least is None else valid & (entries >= self.at_least)


def _bound(above: Any) -> Array:
    leaves = jax.tree.leaves(above)
    return jnp.asarray(leaves[0]) if len(leaves) == 1 else task_vector("above", above)


TASK_MASK = Argument("task_mask", required=False)
LOSSES = Argument("losses")
POSITIVE_LOSSES = Argument("losses", above=0)
CROSS_GRAMIAN = Argument("cross_gramian", "K K", stand_in="gramian", missing=BIASED)
NEW_LOSSES = Argument("new_losses", stand_in="losses", missing=LAGGED)
EPOCH_END = Argument("epoch_end", "")
PREFERENCE = Argument("preference", at_least=0, required=False)
SCORES = Argument("scores")

STANDARD = (LOSSES, CROSS_GRAMIAN, NEW_LOSSES, EPOCH_END, SCORES, PREFERENCE)
"""Arguments that a formula gets by naming them."""

UPDATE_ARGUMENTS = frozenset(
    {"task_mask", "task_names", *(own.name for own in STANDARD), "clean_grads", "grad_fn", "losses_fn"}
)
"""Arguments that methods and wrappers declare; an optimizer after them does not receive these."""

_KNOWN = UPDATE_ARGUMENTS | {"value", "grad", "value_fn"}
_CLOSE = 0.8  # difflib's cutoff: catches `task_masks`, `losess`, `loss`


def refuse_misspelt(extra: dict[str, Any], arguments: Iterable[Argument]) -> None:
    """Raise for an undeclared argument of the update whose name is close to a declared one."""
    known = {*_KNOWN, *(argument.name for argument in arguments)}
    for name in extra.keys() - known:
        short = {"mask": "task_mask", "masks": "task_mask"}
        close = [short[name]] if name in short else difflib.get_close_matches(name, sorted(known), 1, _CLOSE)
        if close:
            raise ValueError(f"`{name}` is no argument of update: write {close[0]}=....")


class Step(NamedTuple):
    """What a formula sees of a step: all numbers are finite, and those of absent tasks are neutral."""

    values: dict[str, Array | None]
    present: Bool[Array, " K"]
    finite: Bool[Array, ""]
    result: int = SOLVED  # or the code for a missing argument

    @property
    def num_present(self) -> Int[Array, ""]:
        """The number of tasks present."""
        return jnp.sum(self.present)

    def also(self, finite: Bool[Array, ""]) -> "Step":
        """Return the step with a further condition: unless `finite`, no task is present."""
        values = {
            name: value if value is None else jnp.where(finite, value, _neutral(value))
            for name, value in self.values.items()
        }
        return Step(values, self.present & finite, self.finite & finite, self.result)


def _neutral(value: Array) -> int | bool:
    return False if value.dtype == bool else 1 if value.ndim == 1 else 0  # losses may be divisors


def is_canonical(extra: dict[str, Any]) -> bool:
    """Return whether an outer layer has made the arguments of an update canonical."""
    if "task_names" not in extra:
        return False
    names = extra["task_names"]
    if "task_mask" not in extra or not (names is None or names is FLAT or isinstance(names, jax.tree_util.PyTreeDef)):
        raise ValueError(f"`task_names` must not be given: the tasks have the names of `losses`, got {names!r}.")
    return True


def canonical(extra: dict[str, Any], num_tasks: int, arguments: Iterable[Argument] = ()) -> dict[str, Any]:
    """Check the arguments of an update and return them in the form that all inner layers take.

    Those with an entry for every task become (K,) arrays; `task_mask` is added, and `task_names`, those of the losses.
    """
    refuse_misspelt(extra, arguments)
    names = task_names(extra.get("losses"))
    per_task = dict.fromkeys(argument.name for argument in (*STANDARD, *arguments) if argument.axes == "K")
    arrays = {
        name: task_vector(name, extra[name], num_tasks=num_tasks, names=names)
        for name in per_task
        if extra.get(name) is not None
    }
    present = present_tasks(extra.get("task_mask"), num_tasks, names)
    return {**extra, **arrays, "task_mask": present, "task_names": names}


def read_step(
    arguments: Iterable[Argument],
    task_mask: Bool[Array, " K"],
    *,
    name: str,
    gramian: Float[Array, "K K"] | None = None,
    **extra: Any,
) -> Step:
    """Return what a formula sees of the canonical arguments of an update.

    Args:
      arguments: what the method declares.
      task_mask: the tasks present.
      name: the method's name, for errors.
      gramian: the Gramian, if the method looks at it.
      **extra: the other arguments of the update.
    """
    given, present = {"gramian": gramian, **extra}, task_mask
    values: dict[str, Array | None] = {}
    finite, result = jnp.asarray(True), SOLVED
    for argument in (*arguments, *([Argument("gramian", "K K")] if gramian is not None else [])):
        value = given.get(argument.name)
        if value is None and argument.stand_in is not None:
            value, result = given.get(argument.stand_in), argument.missing
        if value is None and not argument.required:
            values[argument.name] = None
            continue
        if value is None:
            raise ValueError(
                f"`{argument.name}` must be given: {name} needs it. Write update(..., {argument.name}={argument.name})."
            )
        entries = _entries(argument, value, len(present))
        counted = [jnp.asarray(True), present, present[:, None] & present[None, :]][entries.ndim]
        finite &= jnp.all(argument.valid(entries) | ~counted)
        values[argument.name] = jnp.where(counted, entries, _neutral(entries))
    return Step(values, present, jnp.asarray(True), result).also(finite)


def _entries(argument: Argument, value: Any, num_tasks: int) -> Array:
    if argument.axes == "K":  # already an array, unless no outer layer declares it
        value = task_vector(argument.name, value, num_tasks=num_tasks)
    entries = as_array(argument.name, value)
    shape = (num_tasks,) * len(argument.axes.split())
    if entries.shape != shape:
        raise ValueError(f"`{argument.name}` must have shape {shape}, got shape {entries.shape}.")
    if not shape:
        if entries.dtype != bool:
            raise ValueError(f"`{argument.name}` must be True or False, got dtype {entries.dtype}.")
        return entries
    return jax.lax.stop_gradient(entries.astype(accumulator_dtype()))


Axes = Any  # a tree like a state, holding for each leaf the axes that have one entry per task


def task_axes(shapes: Callable[[Any], PyTree] | None, num_tasks: int | None) -> Axes:
    """Return the axes along which a state has one entry per task: those that are longer for K + 1 tasks.

    Args:
      shapes: gives the shapes of the state for a number of tasks; None for a method without state.
      num_tasks: K, None for a method without per-task state.
    """
    if shapes is None:
        return optax.EmptyState()
    if num_tasks is None:
        return jax.tree.map(lambda leaf: (), shapes(None))
    states = [shapes(K) for K in (num_tasks, num_tasks + 1)]

    def longer(leaf: jax.ShapeDtypeStruct, other: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return tuple(i for i, sizes in enumerate(zip(leaf.shape, other.shape, strict=True)) if sizes[0] != sizes[1])

    return jax.tree.map(longer, *states)


def commit(
    step: Step,
    state: MethodState,
    method_state: PyTree,
    axes: Axes,
    *,
    fewest: int,
    sane: Bool[Array, ""] | bool = True,
    solved: Solution | None = None,
) -> tuple[MethodState, Bool[Array, ""]]:
    """Return the next state, and whether to use the method's result; if not, the mean of the tasks present is used.

    Absent tasks keep their entries. If the result is not used, or a finite entry of the state would become NaN or inf,
    everything except `info` stays as it was.

    Args:
      step: as the method saw it.
      state: the previous state.
      method_state: the method's proposed next state.
      axes: per-task axes of the state, from `task_axes`.
      fewest: tasks that must be present.
      sane: whether the result is finite.
      solved: the solver's Solution, if there was a solver.
    """
    present = once(step.present)
    checked = jax.tree.map(partial(_checked, present), method_state, state.method, axes)
    sane = sane & all_finite(checked)
    enough = once(sane & (step.num_present >= max(fewest, 1)))
    residual, steps, result = (0.0, 0, SOLVED) if solved is None else solved[1:]
    info = next_info(
        state.info,
        residual=jnp.where(enough, residual, 0),
        steps=steps,
        result=jnp.where(jnp.asarray(result) == SOLVED, step.result, result),
        count=step.num_present,
        fewest=fewest,
        finite=step.finite,
        solved=sane,
    )
    advanced = jax.tree.map(partial(_advanced, enough, present), method_state, state.method, axes)
    return MethodState(advanced, info), enough


@partial(jax.jit, static_argnames="along")
def _advanced(enough: Array, present: Array, new: Array, old: Array, along: tuple[int, ...]) -> Array:
    """Return the new entries of the tasks present if `enough`, and the old ones elsewhere."""
    return jnp.where(enough & _counted(present, old, along), new.astype(old.dtype), old)


@partial(jax.jit, static_argnames="along")
def _checked(present: Array, new: Array, old: Array, along: tuple[int, ...]) -> Array:
    """Return the entries that have to be finite: those of the tasks present that were finite before."""
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return old
    return jnp.where(jnp.isfinite(old) & _counted(present, old, along), new.astype(old.dtype), 0)


def _counted(present: Bool[Array, " K"], leaf: Array, along: tuple[int, ...]) -> Bool[Array, "..."]:
    rows = [present.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)]) for axis in along]
    return jnp.asarray(True) if not rows else rows[0] if len(rows) == 1 else rows[0] & rows[1]
