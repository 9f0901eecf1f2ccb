"""Weights computed from some of the leaves, such as the last shared layer, adapters or a few blocks, applied to all."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from mtlgrad_jax._core.method import Method, weighed_over, weights_of
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.trees import cut, flag_leaves
from mtlgrad_jax.methods.mixed.gradnorm import ROW as GRADNORM


def gram_over(method: Method, where: PyTree | Callable[[Any], bool]) -> Method:
    """Compute a method's weights from the Gramian of some leaves, and apply them to all leaves.

    The cost of the Gramian is then that of these leaves. GradNorm, SLW and AvgNorm are defined on the last shared
    layer. A method's guarantees hold only for these leaves. A step is skipped if these leaves, or any leaf of a task
    with nonzero weight, hold a NaN or inf. A `cross_gramian` must be that of the same leaves.

    Args:
      method: one that combines the tasks by weights.
      where: a pytree of bool with the structure of params, or a function of a leaf's path (the tuple of keys that
        `jax.tree_util.tree_leaves_with_path` gives); True for the leaves to use.

    Returns:
      A transformation with the method's state.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.gram_over(mtl.mgda(), {"first": False, "last": True})
      >>> grads = {"first": jnp.asarray([[4.0], [8.0]]), "last": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
      >>> update, _ = tx.update(grads, tx.init({"first": jnp.zeros(1), "last": jnp.zeros(2)}))
      >>> update["first"].tolist(), update["last"].tolist()
      ([6.0], [0.5, 0.5])
    """
    return weighed_over(
        method, weights_of(method, "gram_over"), lambda tree: cut(tree, flag_leaves(where, tree, "where"), True)
    )


ROW = Row(
    gram_over,
    scale="the method's",
    state="the method's",
    papers=GRADNORM.papers,
    note="the last shared layer there",
    kwargs=lambda num_tasks: {"where": lambda path: True},
    wraps="mgda",
)
