"""Reading what happened out of an optimizer's state."""

from typing import Any

import jax
from jaxtyping import Array, PyTree

from mtlgrad_jax._core.step import Info
from mtlgrad_jax.wrappers.with_metrics import Metrics


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Return the metrics and the solver's info of the last step, from anywhere in an optimizer's state.

    Args:
      opt_state: state of an optimizer with a method of this library in it, however chained and wrapped.

    Returns:
      The fields of `with_metrics`, where the method is wrapped in it (no `weights` for one without), and of `Info`:
      residual, steps, result (a key of `RESULTS`), fallbacks, skipped. Per-task values are (K,) arrays;
      `unstack(values, like=losses)` names them. With several methods in the state the keys begin with where they are.

    Raises:
      ValueError: the state holds neither.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = optax.chain(mtl.with_metrics(mtl.cagrad(), num_tasks=2), optax.adam(1e-3))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), state)
      >>> mtl.metrics(state)["norms"].tolist()
      [1.0, 3.0]
    """

    def is_record(node: Any) -> bool:
        return isinstance(node, Metrics | Info)

    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_record)[0]
    found = [(jax.tree_util.keystr(path[:-1]), node) for path, node in nodes if is_record(node)]
    if not found:
        raise ValueError("`opt_state` must hold the state of a method of mtlgrad_jax, found none.")
    several = max(sum(isinstance(node, kind) for _, node in found) for kind in (Metrics, Info)) > 1
    return {
        f"{where}.{name}" if several else name: value
        for where, node in found
        for name, value in node._asdict().items()
        if value is not None
    }
