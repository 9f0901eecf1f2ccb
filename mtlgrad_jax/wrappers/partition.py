"""A separate method for every group of leaves."""

from collections.abc import Mapping
from typing import Any

import optax
from jaxtyping import PyTree

from mtlgrad_jax._core.method import Method, skip_together, update_without_task_axis
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.trees import Labels, cut, label_leaves, merge


def partition(transforms: Mapping[Any, optax.GradientTransformation], labels: Labels) -> Method:
    """Apply one transformation to each group of leaves; the counterpart of `optax.partition` for stacked gradients.

    If one of them skips a step, all of them skip it.

    Args:
      transforms: a dict by label. Each transformation sees its own leaves, with None in place of the others, and must
        remove their task axis, as methods of this library and chains that begin with one do.
      labels: a pytree of labels with the structure of params, or a function of a leaf's path.

    Returns:
      A transformation; its state is a dict by label.

    Raises:
      ValueError: a leaf has a label without a transformation, or comes out with its task axis.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.partition({"a": mtl.mean(), "b": mtl.sum()}, {"w": "a", "v": "b"})
      >>> grads = {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 1))}
      >>> update, _ = tx.update(grads, tx.init({"w": jnp.zeros(3), "v": jnp.zeros(1)}))
      >>> update["w"].tolist(), update["v"].tolist()
      ([1.0, 1.0, 1.0], [2.0])
    """
    if not isinstance(transforms, Mapping):
        raise ValueError(f"`transforms` must be a dict of transformations by label, got {type(transforms).__name__}.")
    for label, transform in transforms.items():
        if not isinstance(transform, optax.GradientTransformation):
            raise ValueError(
                f"`transforms` must hold transformations such as mtlgrad_jax.cagrad(), got {type(transform).__name__} "
                f"under {label!r}."
            )
    if len(set(map(str, transforms))) < len(transforms):
        raise ValueError(f"`transforms` must have labels that differ as strings, got {list(transforms)}.")
    inner = {str(label): optax.with_extra_args_support(transform) for label, transform in transforms.items()}

    def group(tree: PyTree) -> list[str]:
        found = [str(label) for label in label_leaves(labels, tree, "labels")]
        missing = sorted(set(found) - set(inner))
        if missing:
            raise ValueError(f"`transforms` must have an entry for every label, none for {', '.join(missing)}.")
        return found

    def init(params: PyTree) -> dict[str, PyTree]:
        found = group(params)
        return {
            label: transform.init(cut(params, found, label)) for label, transform in inner.items() if label in found
        }

    def update(
        task_grads: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        found = group(task_grads)
        gradients, states = [], {}
        for label, own_state in state.items():
            own = cut(task_grads, found, label)
            own_params = None if params is None else cut(params, found, label)
            name = f"transforms[{label!r}]"
            gradient, states[label] = update_without_task_axis(name, inner[label], own, own_state, own_params, **extra)
            gradients.append(gradient)
        return skip_together(merge(task_grads, *gradients), states, state)

    arguments = [argument for transform in transforms.values() for argument in getattr(transform, "arguments", ())]
    return Method(
        init,
        update,
        arguments=arguments,
        takes_jacobian=all(isinstance(transform, Method) for transform in transforms.values()),
    )


ROW = Row(
    partition,
    scale="the methods'",
    state="the methods'",
    kwargs=lambda num_tasks: {"labels": lambda path: True},
    wraps="mean",
    around=lambda method: {"transforms": {True: method}},
)
