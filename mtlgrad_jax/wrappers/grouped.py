"""One solve for every group of leaves: per layer, per block, encoder and decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.method import Method, skip_together, weights_of
from mtlgrad_jax._core.random import repeat_state
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.tasks import present_tasks
from mtlgrad_jax._core.trees import Labels, cut, label_leaves, merge


def grouped(method: Method, labels: Labels) -> Method:
    """Apply a method to each group of leaves on its own, all groups solved side by side.

    Each group has weights, and where the method has one a state, of its own. What the method guarantees holds in every
    group; that no task ascends then holds for the whole too, other guarantees need not. Solves run under one vmap:
    `update_every` saves nothing in here. A step that one group skips is skipped by all.

    Args:
      method: one that combines the tasks by weights.
      labels: a pytree of labels with the structure of params, or a function of a leaf's path: of the tuple of keys that
        `jax.tree_util.tree_leaves_with_path` gives, so that `jax.tree_util.keystr` puts every leaf in its own group.

    Returns:
      A transformation whose state is the method's with one more leading axis, over the groups in order of appearance;
      so is a `cross_gramian`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.grouped(mtl.mgda(), {"w": "encoder", "v": "decoder"})
      >>> grads = {"v": jnp.asarray([[1.0], [2.0]]), "w": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
      >>> update, _ = tx.update(grads, tx.init({"v": jnp.zeros(1), "w": jnp.zeros(2)}))
      >>> update["v"].tolist(), update["w"].tolist()
      ([1.0], [0.5, 0.5])
    """
    weigh = weights_of(method, "grouped")

    def init(params: PyTree) -> PyTree:
        return repeat_state(method.init(None), len(set(label_leaves(labels, params, "labels"))))

    def update(
        task_grads: PyTree,
        state: PyTree,
        params: PyTree | None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        cross_gramian: Float[Array, "groups K K"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        found = label_leaves(labels, task_grads, "labels")
        groups = [cut(task_grads, found, label) for label in dict.fromkeys(found)]
        present = present_tasks(task_mask, stacks.num_tasks(task_grads), losses)
        gramians = stacks.gramians(groups, present)
        if cross_gramian is not None and jnp.shape(cross_gramian) != gramians.shape:
            shape = jnp.shape(cross_gramian)
            raise ValueError(f"`cross_gramian` must hold one per group, shape {gramians.shape}, got shape {shape}.")

        def solve(gramian: Array, state: PyTree, cross: Array | None) -> tuple[Array, PyTree]:
            own = extra if cross is None else {**extra, "cross_gramian": cross}
            return weigh(gramian, state, losses=losses, task_mask=task_mask, **own)

        weights, new_state = jax.vmap(solve, (0, 0, None if cross_gramian is None else 0))(
            gramians, state, cross_gramian
        )
        gradients = [stacks.combine(weights[i], group) for i, group in enumerate(groups)]
        return skip_together(merge(task_grads, *gradients), new_state, state)

    return Method(init, update, arguments=method.arguments)


ROW = Row(
    grouped,
    scale="the method's, in each group",
    state="the method's for each group",
    paper="the groups of Wang et al. (GradVac), ICLR 2021, arXiv 2010.05874",
    kwargs=lambda num_tasks: {"labels": lambda path: str(path)},
    wraps="mgda",
)
