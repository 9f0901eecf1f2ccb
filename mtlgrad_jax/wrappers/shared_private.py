"""Shared parameters updated by a method, task-specific ones by their own task."""

from typing import Any, Literal

import optax
from jaxtyping import PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import (
    Method,
    check_transformation,
    skip_together,
    update_without_task_axis,
    weighed_over,
    weights_of,
)
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.trees import Labels, cut, flag_leaves, merge


def shared_private(
    method: optax.GradientTransformation,
    is_shared: Labels,
    private: Literal["own", "weighted"] = "own",
) -> Method:
    """Apply a method to the shared parameters only; heads get the gradient of the tasks that use them.

    The gradient of a head is zero for all tasks except its own, so the sum over the tasks is the gradient of its own
    task. If the method skips a step, or a head's gradient has a NaN or inf, neither shared parameters nor heads change.
    Put `skip_nonfinite_tasks` around this, not inside, so that a task is dropped together with its head. With a
    TaskJacobian, it uses the Gramian over the shared leaves and two backward passes, with the memory of one; a NaN or
    inf in an absent task then reaches everything. Heads are never stacked there: with `linearize(..., rows=K)`, only
    the shared parameters' gradients are, and the heads' take one backward pass.

    Args:
      method: any transformation of this library, or a chain that begins with one.
      is_shared: a pytree of bool with the structure of params, or a function of a leaf's path (the tuple of keys
        that `jax.tree_util.tree_leaves_with_path` gives).
      private: whether heads get their task's gradient unchanged ("own": LibMTL, the official code of CAGrad and
        FairGrad) or multiplied by the task's weight ("weighted": the official code of Nash-MTL and of all loss
        weightings), which needs a method that combines the tasks by weights.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.shared_private(mtl.mean(), {"trunk": True, "heads": False})
      >>> grads = {"trunk": jnp.asarray([[1.0], [3.0]]), "heads": jnp.asarray([[5.0, 0.0], [0.0, 7.0]])}
      >>> update, _ = tx.update(grads, tx.init({"trunk": jnp.zeros(1), "heads": jnp.zeros(2)}))
      >>> update["trunk"].tolist(), update["heads"].tolist()
      ([2.0], [5.0, 7.0])
    """
    check_transformation(method)
    check_choice("private", private, ("own", "weighted"))
    if private == "weighted":
        weigh = weights_of(method, 'shared_private with private="weighted"')
        return weighed_over(method, weigh, lambda tree: cut(tree, flag_leaves(is_shared, tree, "is_shared"), True))

    return own_heads(method, is_shared)


def own_heads(method: optax.GradientTransformation, is_shared: Labels, also: tuple[str, ...] = ()) -> Method:
    """Apply a method to the shared part only, also of the stacks in the arguments `also`; heads get their own rows."""

    def split(tree: PyTree) -> tuple[Any, Any]:
        labels = flag_leaves(is_shared, tree, "is_shared")
        return cut(tree, labels, True), cut(tree, labels, False)

    def init(params: PyTree) -> PyTree:
        return method.init(split(params)[0])

    def update(task_grads: PyTree, state: PyTree, params: PyTree | None, **extra: Any) -> tuple[PyTree, PyTree]:
        shared, heads = split(task_grads)
        shared_params = None if params is None else split(params)[0]
        extra |= {name: split(extra[name])[0] for name in also}
        gradient, new_state = update_without_task_axis("method", method, shared, state, shared_params, **extra)
        head_gradient = stacks.total(extra["task_mask"], heads)
        (gradient, head_gradient), new_state = skip_together((gradient, head_gradient), new_state, state)
        return merge(task_grads, gradient, head_gradient), new_state

    return Method(init, update, like=method, takes_jacobian=isinstance(method, Method) and not also)


ROW = Row(
    shared_private,
    scale="the method's; heads as `private` says",
    state="the method's",
    note="the head conventions of the LibMTL and Nash-MTL code",
    kwargs=lambda num_tasks: {"is_shared": lambda path: True},
    wraps="mean",
)
