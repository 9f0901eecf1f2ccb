"""The task axis: named tasks, absent tasks, and what happened in a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

SOLVED = 0
MAX_STEPS = 1
TOO_FEW_TASKS = 2
NO_TASKS = 3
NONFINITE = 4
FAILED = 5

RESULTS = {
    SOLVED: "Solved.",
    MAX_STEPS: "The solver stopped at its maximum number of steps; `residual` says how close it came. Likely causes: "
    "(a) gradients that are almost Pareto stationary, (b) row norms more than about 1e6 apart, (c) float32.",
    TOO_FEW_TASKS: "Fewer tasks were present than the method needs: the mean of those present was used.",
    NO_TASKS: "No task was present: the update is zero.",
    NONFINITE: "A present task had a loss or gradient that is not finite: the update is zero and the state unchanged. "
    "Wrap the method in `skip_nonfinite_tasks` to drop such a task alone.",
    FAILED: "The method gave weights that are not finite: the mean of the tasks present was used.",
}
"""What the result codes in `Info.result` mean."""


class Info(NamedTuple):
    """How the last step went, and how often steps went wrong; found in any state by `optax.tree.get(state, "info")`."""

    residual: Float[Array, ""]  # scale-free optimality residual of the solver, 0 for closed forms
    steps: Int[Array, ""]  # solver steps taken
    result: Int[Array, ""]  # a key of RESULTS
    fallbacks: Int[Array, ""]  # updates so far that were the mean of the tasks present instead
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
    fallback = finite & (count > 0) & ((count < fewest) | ~jnp.asarray(solved))
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


def mark_skipped(state: PyTree) -> PyTree:
    """Return a state unchanged but for its infos, which count a step that was skipped as not finite."""

    def mark(node: Any) -> Any:
        if not isinstance(node, Info):
            return node
        return node._replace(result=jnp.full_like(node.result, NONFINITE), skipped=optax.safe_increment(node.skipped))

    return jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, Info))


def accumulator_dtype() -> jnp.dtype:
    """Return the dtype of Gramians, weights and losses: float32, float64 under x64."""
    return jnp.result_type(float)


def task_names(values: PyTree) -> Any:
    """Return the tree structure that names the tasks, or None for arrays and plain sequences."""
    if values is None or (isinstance(values, (list, tuple)) and not hasattr(values, "_fields")):
        return None
    treedef = jax.tree.structure(values)
    return None if jax.tree_util.treedef_is_leaf(treedef) else treedef


def task_vector(name: str, values: PyTree, *, num_tasks: int | None = None, names: Any = None) -> Array:
    """Flatten a per-task argument to (K,).

    Args:
      name: the argument's name, for errors.
      values: a (K,) array, a sequence of K scalars, or a pytree of K scalars under the tasks' names.
      num_tasks: K, checked where it is known.
      names: the structure of the named losses, which `values` must share.
    """
    own = task_names(values)
    if names is not None and (own is None or own != names):
        got = "a flat array" if own is None else str(own)
        raise ValueError(
            f"`{name}` must have the structure of the losses, {names}, got {got}. "
            "Named tasks are flattened in sorted order, in which a flat array would silently swap tasks."
        )
    if own is None and not isinstance(values, (list, tuple)):
        vector = jnp.asarray(values)
    else:
        leaves = jax.tree.leaves(values)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if any(shape != () for shape in shapes):
            raise ValueError(f"`{name}` must hold one scalar per task, got shapes {shapes}.")
        vector = jnp.stack([jnp.asarray(leaf) for leaf in leaves]) if leaves else jnp.zeros((0,))
    if vector.ndim != 1 or (num_tasks is not None and vector.shape[0] != num_tasks):
        expected = "(K,)" if num_tasks is None else f"({num_tasks},)"
        raise ValueError(f"`{name}` must have shape {expected}, one entry per task, got shape {vector.shape}.")
    return vector


def present_tasks(task_mask: PyTree, num_tasks: int, names: Any = None) -> Bool[Array, " K"]:
    """Return which tasks are present: `task_mask` as (K,) bool, all of them for None."""
    if task_mask is None:
        return jnp.ones((num_tasks,), bool)
    mask = task_vector("task_mask", task_mask, num_tasks=num_tasks, names=names)
    if mask.dtype != bool:
        raise ValueError(f"`task_mask` must be bool, got dtype {mask.dtype}. Write task_mask={'mask'} != 0.")
    return mask


def unstack(values: Array, like: PyTree) -> PyTree:
    """Put K values back under the user's task names.

    Args:
      values: (K, ...) array, one entry per task.
      like: anything with the tasks' structure, usually the losses.

    Returns:
      A pytree with the structure of `like`, whose leaves are the rows of `values`; an array `like` gives `values` back.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> mtl.unstack(jnp.asarray([1.0, 2.0]), like={"seg": 0.0, "depth": 0.0})
      {'depth': Array(1., dtype=float32), 'seg': Array(2., dtype=float32)}
    """
    if task_names(like) is None and not isinstance(like, (list, tuple)):
        return values
    treedef: Any = jax.tree.structure(like)
    if treedef.num_leaves != len(values):
        raise ValueError(f"`values` must have one row per task of `like`, {treedef.num_leaves}, got {len(values)}.")
    return treedef.unflatten(list(values))


def agree_num_tasks(own: int | None, given: int | None) -> int | None:
    """Return the number of tasks on which construction and init agree."""
    if own is not None and given is not None and own != given:
        raise ValueError(f"`num_tasks` must be the one given at construction, {own}, got num_tasks={given}.")
    return given if own is None else own


def keep_absent(new: PyTree, old: PyTree, present: Bool[Array, " K"], advance: Bool[Array, ""]) -> PyTree:
    """Select the next state: absent tasks keep their entries, and without `advance` nothing changes.

    A state leaf whose leading axis is K holds one entry per task (both of its leading axes, if both are K).
    """
    K = present.shape[0]

    def select(new: Array, old: Array) -> Array:
        keep = advance
        if old.ndim and old.shape[0] == K:
            keep = keep & present.reshape((K,) + (1,) * (old.ndim - 1))
            if old.ndim > 1 and old.shape[1] == K:
                keep = keep & present.reshape((1, K) + (1,) * (old.ndim - 2))
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jnp.where(keep, new, old)
        return jnp.where(keep, jnp.asarray(new, old.dtype), old)

    return jax.tree.map(select, new, old)
