"""One solve per group of leaves: per layer, per block, or encoder and decoder."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.method import Method, skip_together, weights_of
from mtlgrad_jax._core.random import repeat_state
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import mark_idle
from mtlgrad_jax._core.tasks import Jacobian, task_flags
from mtlgrad_jax._core.trees import Labels, label_leaves
from mtlgrad_jax.methods.gramian.gradvac import ROW as GRADVAC


def grouped(method: Method, labels: Labels, uses: Mapping[Hashable, PyTree] | None = None) -> Method:
    """Apply a method to each group of leaves separately, solving all groups side by side.

    Each group has its own weights and its own method state, if any. The method's guarantees hold in every group. If no
    task ascends in any group, none ascends overall; other guarantees need not carry over. All solves run under one
    vmap, so `update_every` saves nothing inside. If one group skips a step, all groups skip it.

    A task that does not use a group is absent there; otherwise its zero gradient would count, and MGDA's result would
    be zero. Mean-like weights are then multiplied by the share of the present tasks that use the group, so that
    grouping the mean gives the mean.

    With a TaskJacobian, it forms blocks of `rows` rows (see `linearize`), or single rows without `rows`. The latter
    takes K(K + 1)/2 backward passes for the Gramians and K for the sum, with the memory of two gradients.

    Args:
      method: one that combines the tasks by weights.
      labels: a pytree of labels with the structure of params, or a function of a leaf's path, the tuple of keys that
        `jax.tree_util.tree_leaves_with_path` gives; `jax.tree_util.keystr` thus puts every leaf in its own group.
      uses: for some labels, which tasks use the group: K flags, under the tasks' names if these are named. Gradients of
        other tasks there are ignored. In groups not listed, a task takes part unless all of its entries are zero.

    Returns:
      A transformation whose state is the method's with an additional leading axis over the groups, in order of
      appearance. A `cross_gramian` must have this axis too.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.grouped(mtl.mgda(), {"w": "encoder", "v": "decoder"})
      >>> grads = {"v": jnp.asarray([[1.0], [2.0]]), "w": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
      >>> update, _ = tx.update(grads, tx.init({"v": jnp.zeros(1), "w": jnp.zeros(2)}))
      >>> update["v"].tolist(), update["w"].tolist()
      ([1.0], [0.5, 0.5])
    """
    weigh = weights_of(method, "grouped")
    if not isinstance(uses, Mapping | None):
        raise ValueError(f"`uses` must map labels to flags of the tasks, got uses={uses!r}.")
    declared = dict(uses or {})

    def groups_of(tree: PyTree) -> tuple[list[Any], list[Any]]:
        found = label_leaves(labels, tree, "labels")
        unknown = declared.keys() - set(found)
        if unknown:
            raise ValueError(f"`uses` must have labels that `labels` gives, {set(found)}, got {unknown}.")
        return found, list(dict.fromkeys(found))

    def init(params: PyTree) -> PyTree:
        return repeat_state(method.init(None), len(groups_of(params)[1]))

    def update(
        task_grads: PyTree,
        state: PyTree,
        params: PyTree | None,
        *,
        task_mask: Array,
        task_names: Any,
        cross_gramian: Float[Array, "groups K K"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        found, names = groups_of(task_grads)
        if isinstance(task_grads, Jacobian):
            flags = [[own == name for own in found] for name in names]
            gramians, users = task_grads.gramians(flags)
        else:
            groups: dict[Any, list[Array]] = {name: [] for name in names}
            for name, leaf in zip(found, jax.tree.leaves(task_grads), strict=True):
                groups[name].append(leaf)
            gramians, users = stacks.gramians([*groups.values()], task_mask), stacks.used([*groups.values()])
        for i, name in enumerate(names):
            if name in declared:
                flags_of = task_flags(f"uses[{name!r}]", declared[name], num_tasks=len(task_mask), names=task_names)
                users = users.at[i].set(flags_of)
        users &= task_mask[None]
        if cross_gramian is not None and jnp.shape(cross_gramian) != gramians.shape:
            shape = jnp.shape(cross_gramian)
            raise ValueError(f"`cross_gramian` must hold one per group, shape {gramians.shape}, got shape {shape}.")

        def solve(gramian: Array, users: Bool[Array, " K"], state: PyTree, cross: Array | None) -> tuple[Array, PyTree]:
            own = extra if cross is None else {**extra, "cross_gramian": cross}
            weights, new_state = weigh(gramian, state, task_mask=users, task_names=task_names, **own)
            empty = mark_idle(new_state, task_mask)
            new_state = jax.tree.map(lambda new, idle: jnp.where(users.any(), new, idle), new_state, empty)
            share = users.sum() / jnp.maximum(task_mask.sum(), 1) if method.mean_like else 1
            return weights * share, new_state

        weights, new_state = jax.vmap(solve, (0, 0, 0, None if cross_gramian is None else 0))(
            gramians, users, state, cross_gramian
        )
        if isinstance(task_grads, Jacobian):
            gradient = task_grads.pullbacks(weights, flags)
        else:
            sums = dict(zip(names, map(iter, stacks.combines(weights, [*groups.values()])), strict=True))
            gradient = jax.tree.unflatten(jax.tree.structure(task_grads), [next(sums[name]) for name in found])
        return skip_together(gradient, new_state, state)

    return Method(init, update, like=method, takes_jacobian=True)


ROW = Row(
    grouped,
    scale="the method's, in each group",
    state="the method's for each group",
    papers=GRADVAC.papers,
    note="the groups there",
    kwargs=lambda num_tasks: {"labels": lambda path: str(path)},
    wraps="mgda",
)
