"""The task axis: names, presence and number of tasks."""

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from mtlgrad_jax._core.checks import as_array
from mtlgrad_jax._core.control import map_leaves


class Jacobian(ABC):
    """K gradients that are never stored; `mtlgrad_jax.TaskJacobian` is one."""

    losses: PyTree
    num_tasks: int

    @property
    @abstractmethod
    def like(self) -> PyTree:
        """A tree with the structure, shapes and dtypes of the parameters."""

    @abstractmethod
    def part(self, flags: list[bool]) -> "Jacobian":
        """Return the Jacobian with respect to some of the leaves, a tree with None in place of the others."""

    @abstractmethod
    def gramian(self) -> Array:
        """Return the K×K Gramian."""

    @abstractmethod
    def pullback(self, weights: Any) -> PyTree:
        """Return the weighted sum of the gradients."""

    @abstractmethod
    def pullback_and_check(self, weights: Array) -> tuple[PyTree, Array]:
        """Return the weighted sum of the gradients, and whether it is finite."""

    @abstractmethod
    def total(self, tasks: Array) -> PyTree:
        """Return the sum of the gradients of some tasks."""

    @abstractmethod
    def gramians(self, groups: list[list[bool]]) -> tuple[Array, Array]:
        """Return the Gramian of each group of leaves, and which tasks have a nonzero entry there."""

    @abstractmethod
    def pullbacks(self, weights: Array, groups: list[list[bool]]) -> PyTree:
        """Return the weighted sum of the gradients, with separate weights for each group of leaves."""

    @abstractmethod
    def by_rows(self) -> "Jacobian":
        """Return the same Jacobian, computed by blocks of rows: a NaN or inf in a row then stays in that row."""

    @abstractmethod
    def finite_tasks(self) -> Array:
        """Return for every task whether its whole gradient is finite."""

    @abstractmethod
    def pushforward(self, direction: PyTree) -> Array:
        """Return the inner product of every gradient with a direction."""

    @abstractmethod
    def rows(self) -> PyTree:
        """Return the stack."""


def own_losses(jacobian: Jacobian, losses: PyTree) -> PyTree:
    """Return the losses of a TaskJacobian; raise if other losses are given too."""
    if losses is None or losses is jacobian.losses:
        return jacobian.losses
    raise ValueError("`losses` must not be given beside a TaskJacobian, which has its own.")


def widened(tree: PyTree) -> PyTree:
    """Return a tree whose floating leaves are in at least float32."""

    def wide(leaf: Array) -> Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if floating else leaf

    return map_leaves(wide, tree)


def accumulator_dtype() -> jnp.dtype:
    """Return the dtype of Gramians, weights and losses: float32, or float64 under x64."""
    return jnp.result_type(float)


FLAT = "a flat array"


def task_names(values: PyTree) -> Any:
    """Return the tree structure that names the tasks, FLAT for arrays and plain sequences, None for None."""
    if values is None:
        return None
    if isinstance(values, (list, tuple)) and not hasattr(values, "_fields"):
        return FLAT
    return FLAT if jax.tree_util.all_leaves([values]) else jax.tree.structure(values)


def _same(names: Any, others: Any) -> bool:
    return names is others or (names is not FLAT and others is not FLAT and names == others)


def task_vector(name: str, values: PyTree, *, num_tasks: int | None = None, names: Any = None) -> Array:
    """Flatten a per-task argument to (K,).

    Args:
      name: the argument's name, for errors.
      values: a (K,) array, a sequence of K scalars, or a pytree of K scalars under the tasks' names.
      num_tasks: K, checked if given.
      names: `task_names` of the losses, which `values` must share if there are losses.
    """
    own = task_names(values)
    if names is not None and not _same(own, names):
        raise ValueError(
            f"`{name}` must have the structure of the losses, {names}, got {own}. "
            "Named tasks are flattened in sorted order, in which a flat array would silently swap tasks."
        )
    if own is FLAT and not isinstance(values, (list, tuple)):
        vector = as_array(name, values)
    else:
        leaves = [as_array(name, leaf) for leaf in jax.tree.leaves(values)]
        shapes = [leaf.shape for leaf in leaves]
        if any(shape != () for shape in shapes):
            raise ValueError(f"`{name}` must hold one scalar per task, got shapes {shapes}.")
        vector = jnp.stack(leaves) if leaves else jnp.zeros((0,))
    if vector.ndim != 1 or (num_tasks is not None and vector.shape[0] != num_tasks):
        expected = "(K,)" if num_tasks is None else f"({num_tasks},)"
        raise ValueError(f"`{name}` must have shape {expected}, one entry per task, got shape {vector.shape}.")
    return vector


def present_tasks(task_mask: PyTree, num_tasks: int, names: Any = None) -> Bool[Array, " K"]:
    """Return which tasks are present: `task_mask` as (K,) bool; all for None."""
    if task_mask is None:
        return jnp.ones((num_tasks,), bool)
    return task_flags("task_mask", task_mask, num_tasks=num_tasks, names=names)


def task_flags(name: str, values: PyTree, *, num_tasks: int | None = None, names: Any = None) -> Bool[Array, " K"]:
    """Flatten a per-task argument of flags to (K,) bool, as `task_vector` does."""
    flags = task_vector(name, values, num_tasks=num_tasks, names=names)
    if flags.dtype != bool:
        raise ValueError(f"`{name}` must be bool, got dtype {flags.dtype}. Write {name}=mask != 0.")
    return flags


def unstack(values: Array, like: PyTree) -> PyTree:
    """Put K values back under the user's task names.

    Args:
      values: (K, ...) array, one entry per task.
      like: anything with the tasks' structure, usually the losses.

    Returns:
      A pytree with the structure of `like`, whose leaves are the rows of `values`; if `like` is an array, `values`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> mtl.unstack(jnp.asarray([1.0, 2.0]), like={"seg": 0.0, "depth": 0.0})
      {'depth': Array(1., dtype=float32), 'seg': Array(2., dtype=float32)}
    """
    if not isinstance(values, (jax.Array, np.ndarray)) or not values.ndim:
        raise ValueError(f"`values` must be an array, one row per task, got values={values!r}.")
    is_array = task_names(like) is FLAT and not isinstance(like, (list, tuple))
    treedef: Any = jax.tree.structure(like)
    K = next(iter(getattr(like, "shape", ())), 0) if is_array else treedef.num_leaves
    if not K:
        raise ValueError(f"`like` must hold at least one task, like the losses, got like={like!r}.")
    if len(values) != K:
        raise ValueError(f"`values` must have one row per task of `like`, {K}, got {len(values)}.")
    if is_array:
        return values
    return treedef.unflatten(list(values))


def check_num_tasks(own: int | None, num_tasks: int) -> None:
    """Raise if a method made for `own` tasks gets another number of tasks."""
    if own is not None and own != num_tasks:
        raise ValueError(f"`num_tasks` must be the number of tasks, {num_tasks}, got num_tasks={own}.")
