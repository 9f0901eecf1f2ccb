"""Losses and one balanced gradient, without K gradients in memory."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, PyTree

from mtlgrad_jax.oracles._linearize import linearize
from mtlgrad_jax.oracles._losses import Argnums, check_oracle
from mtlgrad_jax.transforms._base import settle
from mtlgrad_jax.weighting._base import Weighting


def balanced_value_and_grad(
    losses_fn: Callable[..., Any], weighting: Weighting, argnums: Argnums = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """Return a function that gives the losses and the gradient that a weighting makes of them.

    The same gradient as `from_weighting` on stacked gradients, up to rounding, at the memory of one backward pass:
    `linearize`, Gramian if the weighting looks at it, weights, pullback. Feed it to any optax optimizer.

    Args:
      losses_fn: returns a (K,) array or a pytree of K scalars; with `has_aux`, a pair of that and anything.
      weighting: of `mtlgrad_jax.weighting`; its first state is `weighting.init(num_tasks)`.
      argnums: which positional arguments of `losses_fn` to differentiate in.
      has_aux: whether `losses_fn` returns (losses, aux).

    Returns:
      `step(params, state, *args, task_mask=None, cross_gramian=None, **kwargs) -> (losses, gradient, state)`, where
      `losses_fn` is called as `losses_fn(params, *args, **kwargs)`; with `has_aux`, `((losses, aux), gradient, state)`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> weighting = mtl.weighting.mgda()
      >>> step = mtl.balanced_value_and_grad(lambda w: jnp.stack([w[0] ** 2, (w[0] - 1) ** 2]), weighting)
      >>> losses, gradient, state = step(jnp.asarray([0.5]), weighting.init(num_tasks=2))
      >>> gradient.tolist()  # Pareto stationary
      [0.0]
    """
    check_oracle(losses_fn, argnums, has_aux)
    if not isinstance(weighting, Weighting):
        raise ValueError(
            f"`weighting` must be a Weighting such as mtlgrad_jax.weighting.cagrad(), got {type(weighting).__name__}. "
            "Methods that need all K gradients go with task_value_and_grad."
        )

    def step(
        params: PyTree,
        state: PyTree,
        *args: Any,
        task_mask: PyTree = None,
        cross_gramian: Float[Array, "K K"] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PyTree, PyTree]:
        jacobian = linearize(losses_fn, params, *args, argnums=argnums, has_aux=has_aux, **kwargs)
        extra = {} if cross_gramian is None else {"cross_gramian": cross_gramian}
        weights, new_state = weighting.update(
            jacobian.gramian, state, losses=jacobian.losses, task_mask=task_mask, **extra
        )
        gradient, new_state = settle(weighting, jacobian.pullback(weights), new_state, state)
        return ((jacobian.losses, jacobian.aux) if has_aux else jacobian.losses), gradient, new_state

    return step
