"""Reading metrics from an optimizer's state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from mtlgrad_jax._core.step import Info
from mtlgrad_jax._core.tasks import FLAT, task_names
from mtlgrad_jax.wrappers.with_metrics import Metrics


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Return the metrics and the solver's info of the last step, from anywhere in an optimizer's state.

    Args:
      opt_state: state of an optimizer that contains a method of this library, however chained and wrapped.

    Returns:
      A dict of arrays: what `with_metrics` measured, if the method is wrapped in it (no `weights` if the method has
      none), and the outcome of the step, from `residual` on. Per-task values are (K,) arrays;
      `unstack(values, like=losses)` names them, and `scalars` makes a flat dict of numbers for a logger. With several
      methods in the state, the keys begin with their location, as in `heads.inner.residual`.

      - weights (K,): the weights of the gradients.
      - norms (K,): the gradients' Euclidean norms.
      - cosines (K, K): cosines of the angles between them.
      - conflict_fraction: share of the pairs of tasks with a negative inner product.
      - magnitude_similarity: mean over the pairs of 2 n_i n_j / (n_i^2 + n_j^2).
      - predicted_change (K,): first-order change of each loss per unit of learning rate: -<g_i, d>.
      - residual: scale-free optimality residual of the solver, 0 for closed forms.
      - steps: steps that the solver took.
      - result: outcome of the step, a key of `RESULTS`.
      - fallbacks: updates so far that used another gradient in place of the method's.
      - skipped: updates so far that were zero because something was not finite, or a loss outside the domain.

      Entries of absent tasks are zero. `grouped` has the last five for each group.

    Raises:
      ValueError: the state holds neither metrics nor info.

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
    found = [(_name(path[:-1]), node) for path, node in nodes if is_record(node)]
    if not found:
        raise ValueError("`opt_state` must hold the state of a method of mtlgrad_jax, found none.")
    several = max(sum(isinstance(node, kind) for _, node in found) for kind in (Metrics, Info)) > 1
    return {
        f"{where}.{name}" if several else name: jnp.asarray(value)  # also of an nnx.Optimizer's variables
        for where, node in found
        for name, value in node._asdict().items()
        if value is not None
    }


def scalars(metrics: Mapping[str, Array], like: PyTree) -> dict[str, Array]:
    """Return metrics as one flat dict of numbers keyed by task names, ready for a logger.

    Args:
      metrics: what `metrics` returned.
      like: anything with the tasks' structure, usually the losses.

    Returns:
      `norms/seg` and so on for every task, `cosines/depth/seg` for every pair, and `residual` unchanged. Values of
      `grouped` are numbered by group, as in `residual/0`.

    Raises:
      ValueError: an entry has other axes, as under vmap: first select one element or take a mean.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.with_metrics(mtl.mgda(), num_tasks=2)
      >>> _, state = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))
      >>> logged = mtl.scalars(mtl.metrics(state), like={"seg": 0.0, "depth": 0.0})
      >>> float(logged["norms/depth"]), float(logged["norms/seg"]), float(logged["cosines/depth/seg"])
      (1.0, 3.0, 0.0)
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"`metrics` must be what mtlgrad_jax.metrics returned, got {type(metrics).__name__}.")
    tasks = names_of(like)
    logged: dict[str, Array] = {}
    for name, value in metrics.items():
        axes = _AXES.get(name.rpartition(".")[2], "")
        expected = (len(tasks),) * len(axes)
        if not hasattr(value, "shape"):
            raise ValueError(f"`metrics` must hold arrays, got {name}={value!r}.")
        if (axes and value.shape != expected) or value.ndim > max(len(axes), 1):
            raise ValueError(f"`metrics` must have {name} of shape {expected}, got shape {value.shape}.")
        if axes == "KK":
            pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
            logged |= {f"{name}/{tasks[i]}/{tasks[j]}": value[i, j] for i, j in pairs}
        elif value.ndim:
            own = tasks if axes else [str(i) for i in range(len(value))]
            logged |= {f"{name}/{task}": value[i] for i, task in enumerate(own)}
        else:
            logged[name] = value
    return logged


def names_of(like: PyTree) -> list[str]:
    """Return the tasks' names as strings, from anything with the tasks' structure."""
    flat = task_names(like) is FLAT and not isinstance(like, (list, tuple))
    if not jax.tree.leaves(like) or (flat and np.ndim(like) != 1):
        raise ValueError(f"`like` must have the tasks' structure, as losses have, got like={like!r}.")
    named = enumerate(like) if flat else jax.tree_util.tree_leaves_with_path(like)
    return [str(task) if flat else _name(task) for task, _ in named]


_AXES = {"weights": "K", "norms": "K", "predicted_change": "K", "cosines": "KK"}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
