"""One step of a method: which tasks count in it, what becomes of the state, and how it went."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax._tasks import accumulator_dtype, present_tasks, task_vector

SOLVED = 0
MAX_STEPS = 1
TOO_FEW_TASKS = 2
NO_TASKS = 3
NONFINITE = 4
FAILED = 5
BIASED = 6
INFEASIBLE = 7

RESULTS = {
    SOLVED: "Solved.",
    MAX_STEPS: "The solver stopped at its maximum number of steps; `residual` says how close it came. Likely causes: "
    "(a) gradients that are almost Pareto stationary, (b) row norms more than about 1e6 apart, (c) float32.",
    TOO_FEW_TASKS: "Fewer tasks were present than the method needs: the mean of those present was used.",
    NO_TASKS: "No task was present: the update is zero.",
    NONFINITE: "A present task had a loss or gradient that is not finite, a gradient whose square overflows, or a loss "
    "<= 0 where the method takes its logarithm or divides by it, or the update overflows: the update is zero and the "
    "state unchanged. Wrap the method in `skip_nonfinite_tasks` to drop tasks that are not finite alone.",
    FAILED: "The method's weights, their sum of the gradients or its next state would not be finite, or are not "
    "defined for these gradients: the mean of the tasks present is used and the state unchanged.",
    BIASED: "No `cross_gramian` was given: the Gramian of one batch took its place, which biases the method.",
    INFEASIBLE: "No direction does what the method asks of it: the gradient that its documentation names was used.",
}
"""What the result codes in `Info.result` mean."""


class Info(NamedTuple):
    """How the last step went, and how often steps went wrong; found in any state by `optax.tree.get(state, "info")`."""

    residual: Float[Array, ""]  # scale-free optimality residual of the solver, 0 for closed forms
    steps: Int[Array, ""]  # solver steps taken
    result: Int[Array, ""]  # a key of RESULTS
    fallbacks: Int[Array, ""]  # updates so far in which another gradient stood in for the method's
    skipped: Int[Array, ""]  # updates so far that were zero because something was not finite


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
    fallback = finite & (count > 0) & instead
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


def mark_skipped(state: PyTree) -> PyTree:
    """Return a state unchanged but for its infos, which count a step that was skipped as not finite."""

    def skipped(info: Info) -> Info:
        return info._replace(result=jnp.full_like(info.result, NONFINITE), skipped=optax.safe_increment(info.skipped))

    return _map_infos(skipped, state)


def mark_idle(state: PyTree) -> PyTree:
    """Return a state unchanged but for its infos, which say that nothing had to be solved in this step."""

    def idle(info: Info) -> Info:
        residual, steps, result = (jnp.zeros_like(field) for field in (info.residual, info.steps, info.result))
        return info._replace(residual=residual, steps=steps, result=result)

    return _map_infos(idle, state)


def mark_solved(state: PyTree, residual: Array, steps: Array, result: Array) -> PyTree:
    """Return a state unchanged but for its infos, to which one more solve of the same step is added."""

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


def was_skipped(state: PyTree, before: PyTree) -> Bool[Array, ""]:
    """Return whether a step was skipped by a method whose state this is: whether an info has counted one more."""

    def counts(tree: PyTree) -> list[Array]:
        nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Info))
        return [node.skipped for node in nodes if isinstance(node, Info)]

    changes = [jnp.any(new != old) for new, old in zip(counts(state), counts(before), strict=True)]
    return jnp.stack(changes).any() if changes else jnp.asarray(False)


class MethodState(NamedTuple):
    """State of a method: its own, and how the last step went."""

    method: PyTree  # what the method keeps; with num_tasks, leaves with leading axis K hold one entry per task
    info: Info


class Guard(NamedTuple):
    """The part of a step that all methods share: which tasks count in it, and what becomes of the state."""

    losses: Float[Array, " K"] | None  # finite; one for absent tasks
    present: Bool[Array, " K"]
    finite: Bool[Array, ""]

    @property
    def num_present(self) -> Int[Array, ""]:
        """How many tasks count."""
        return jnp.sum(self.present)

    def also(self, finite: Bool[Array, ""]) -> "Guard":
        """Return the guard of a step in which something more must be finite: else no task counts."""
        finite = self.finite & finite
        losses = None if self.losses is None else jnp.where(finite, self.losses, 1)
        return Guard(losses, self.present & finite, finite)

    def _counted(self, leaf: Array, num_tasks: int | None) -> Bool[Array, "..."]:
        """Return which rows of a leaf this step is about: those of present tasks, or all."""
        per_task = num_tasks is not None and leaf.ndim > 0 and leaf.shape[0] == num_tasks
        return self.present.reshape(-1, *(1,) * (leaf.ndim - 1)) if per_task else jnp.asarray(True)

    def intact(self, state: MethodState, method_state: PyTree, num_tasks: int | None) -> Bool[Array, ""]:
        """Return whether all that a method keeps, and that was finite, would still be."""

        def check(new: Array, old: Array) -> Bool[Array, ""]:
            if not jnp.issubdtype(old.dtype, jnp.inexact):
                return jnp.asarray(True)
            finite = jnp.isfinite(new.astype(old.dtype)) | ~jnp.isfinite(old)
            return jnp.all(finite | ~self._counted(old, num_tasks))

        checks = jax.tree.leaves(jax.tree.map(check, method_state, state.method))
        return jnp.stack([jnp.asarray(True), *checks]).all()

    def advance(
        self,
        state: MethodState,
        method_state: PyTree,
        *,
        num_tasks: int | None,
        enough: Bool[Array, ""],
        **outcome: Any,
    ) -> MethodState:
        """Return the next state: absent tasks keep their entries, and without enough tasks all stays as it was."""
        advance = enough & (self.num_present > 0)

        def select(new: Array, old: Array) -> Array:
            new = new if jnp.issubdtype(old.dtype, jax.dtypes.prng_key) else new.astype(old.dtype)
            return jnp.where(advance & self._counted(old, num_tasks), new, old)

        info = next_info(state.info, count=self.num_present, finite=self.finite, **outcome)
        return MethodState(jax.tree.map(select, method_state, state.method), info)


def guard_step(method: str, needs: frozenset[str], num_tasks: int, losses: PyTree, task_mask: PyTree) -> Guard:
    """Check the losses and the mask of a step.

    Args:
      method: its name, for errors.
      needs: what it looks at; of losses that it does not look at only number and names are checked.
      num_tasks: K.
      losses: K losses or None.
      task_mask: K flags or None.
    """
    wanted = bool(needs & {"losses", "positive losses"})
    if losses is None and wanted:
        raise ValueError(f"`losses` must be given: {method} needs it. Write update(..., losses=losses).")
    present = present_tasks(task_mask, num_tasks, losses)
    if losses is None:
        return Guard(None, present, jnp.asarray(True))
    vector = task_vector("losses", losses, num_tasks=num_tasks)
    if not wanted:
        return Guard(None, present, jnp.asarray(True))
    vector = jnp.where(present, jax.lax.stop_gradient(vector.astype(accumulator_dtype())), 1)
    valid = jnp.isfinite(vector) & (vector > 0) if "positive losses" in needs else jnp.isfinite(vector)
    return Guard(vector, present, jnp.asarray(True)).also(valid.all())
