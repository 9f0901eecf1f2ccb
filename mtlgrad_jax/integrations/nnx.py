"""Flax NNX: the losses and gradients of a module, whose other variables move as under `nnx.value_and_grad`."""

from collections.abc import Callable
from typing import Any

import optax
from flax import nnx
from jaxtyping import PyTree

from mtlgrad_jax import oracles, training
from mtlgrad_jax.oracles.losses import check_oracle, read_losses
from mtlgrad_jax.oracles.task_value_and_grad import Strategy


def task_value_and_grad(
    losses_fn: Callable[..., Any], wrt: Any = nnx.Param, has_aux: bool = False, strategy: Strategy = "auto"
) -> Callable[..., tuple[Any, PyTree]]:
    """Return a function that gives the K losses and K gradients of a module: `nnx.value_and_grad` for many losses.

    The tasks share one forward pass: BatchNorm statistics move once, and all tasks see the same dropout masks. The
    variables of the module and of other arguments, such as `nnx.Rngs`, are left as `nnx.value_and_grad` leaves them.
    Attributes that are not variables, such as a Python number that counts calls, keep their values.

    Args:
      losses_fn: `losses_fn(model, ...)` returns a (K,) array or a pytree of K scalars, preferably a dict keyed by task
        name; with `has_aux`, a pair of losses and anything else.
      wrt: filter of the variables to differentiate with respect to, the same as in `nnx.Optimizer`.
      has_aux: whether `losses_fn` returns (losses, aux).
      strategy: how the K backward passes run, as in `mtlgrad_jax.task_value_and_grad`.

    Returns:
      `f(model, *args, **kwargs) -> (losses, grads)`, or `((losses, aux), grads)`; the variables of grads have shape
      `(K, *variable shape)`, tasks in the flattened (sorted) order of the losses.

    Raises:
      ValueError: the model has no variable that `wrt` matches.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl, optax
      >>> from flax import nnx
      >>> from mtlgrad_jax.integrations.nnx import task_value_and_grad
      >>> model, x = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2))
      >>> optimizer = nnx.Optimizer(model, mtl.chain(mtl.upgrad(), optax.adam(0.1)), wrt=nnx.Param)
      >>> losses, grads = task_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2, axis=0))(model, x)
      >>> grads["kernel"].shape  # task, input, output
      (2, 2, 2)
      >>> updates = optimizer.update(model, grads, losses=losses)
    """
    gradients = oracles.task_value_and_grad(_pure(losses_fn, has_aux), has_aux=True, strategy=strategy)

    def value_and_grad(model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        inputs = (model, args, kwargs)
        (losses, (moved, aux)), grads = gradients(*_split(inputs, wrt))
        nnx.update(inputs, moved)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


def balanced_value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    rows: int | None = None,
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """Return a function that gives the losses of a module and the one gradient into which a method combines theirs.

    As `mtlgrad_jax.balanced_value_and_grad`, with the memory of one backward pass, for a module whose other variables
    move as under `nnx.value_and_grad`.

    Args:
      losses_fn: as in `task_value_and_grad`.
      method: any method of this library; its first state is `method.init(nnx.state(model, wrt))`.
      wrt: filter of the variables to differentiate with respect to, the same as in `nnx.Optimizer`.
      has_aux: whether `losses_fn` returns (losses, aux).
      rows: gradients held at a time, as in `mtlgrad_jax.linearize`.

    Returns:
      `step(model, state, *args, extra_args=None, **kwargs) -> (losses, gradient, state)`, where `losses_fn` is called
      as `losses_fn(model, *args, **kwargs)`, and `extra_args` holds arguments of the method's update, such as
      `{"task_mask": mask}`; with `has_aux`, `((losses, aux), gradient, state)`.

    Raises:
      ValueError: the model has no variable that `wrt` matches.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl, optax
      >>> from flax import nnx
      >>> from mtlgrad_jax.integrations.nnx import balanced_value_and_grad
      >>> model, x, method = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2)), mtl.upgrad()
      >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> step = balanced_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2, axis=0), method)
      >>> losses, gradient, state = step(model, method.init(nnx.state(model, nnx.Param)), x)
      >>> updates = optimizer.update(model, gradient)
    """
    training.check_keywords(losses_fn)
    gradient_of = training.balanced_value_and_grad(_pure(losses_fn, has_aux), method, has_aux=True, rows=rows)

    def step(
        model: Any, state: PyTree, /, *args: Any, extra_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Any, PyTree, PyTree]:
        inputs = (model, args, kwargs)
        params, *others = _split(inputs, wrt)
        (losses, (moved, aux)), gradient, new_state = gradient_of(params, state, *others, extra_args=extra_args)
        nnx.update(inputs, moved)
        return ((losses, aux) if has_aux else losses), gradient, new_state

    return step


def _split(inputs: tuple[Any, ...], wrt: Any) -> tuple[PyTree, Any, PyTree]:
    """Return the variables of the model that `wrt` matches, and what else `inputs` consists of."""
    graph, own, others = nnx.split(inputs, nnx.All(wrt, _of_model), ...)  # type: ignore[misc]
    if not own:
        raise ValueError(f"`wrt` must match variables of the model, got wrt={wrt!r} and {type(inputs[0]).__name__}.")
    return own[0], graph, others


def _of_model(path: Any, _: Any) -> bool:
    return path[0] == 0


def _pure(losses_fn: Callable[..., Any], has_aux: bool) -> Callable[..., tuple[PyTree, Any]]:
    """Return the losses as a function of what `_split` returns; its aux has all variables after the call."""
    check_oracle(losses_fn, 0, has_aux)

    def pure(params: PyTree, graph: Any, others: PyTree) -> tuple[PyTree, Any]:
        inputs: Any = nnx.merge(graph, nnx.State({0: params}), others, copy=True)
        model, args, kwargs = inputs
        losses, aux = read_losses(losses_fn(model, *args, **kwargs), has_aux)
        return losses, (nnx.state(inputs, nnx.Any(nnx.Variable, _of_model)), aux)

    return pure
