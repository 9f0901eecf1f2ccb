"""Flax Linen: a TrainState whose optimizer gets the arguments of a step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jaxtyping import PyTree

from mtlgrad_jax._core.step import UPDATE_ARGUMENTS, Argument, refuse_misspelt


class TrainState(train_state.TrainState):
    """A `flax.training.train_state.TrainState` that passes `losses`, `task_mask` and so on to its optimizer.

    Subclass it to add fields, such as `batch_stats`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl, optax
      >>> from mtlgrad_jax.integrations.linen import TrainState
      >>> tx = mtl.chain(mtl.scale_invariant(), optax.sgd(0.5))
      >>> state = TrainState.create(apply_fn=jnp.square, params={"w": jnp.asarray([1.0, 2.0])}, tx=tx)
      >>> losses, grads = mtl.task_value_and_grad(lambda params: state.apply_fn(params["w"]))(state.params)
      >>> state = state.apply_gradients(grads=grads, losses=losses)
      >>> int(state.step)
      1
    """

    params: PyTree

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Take one step of the optimizer.

        Args:
          grads: stacked gradients or a TaskJacobian if `tx` begins with a method, otherwise gradients like the
            parameters.
          **kwargs: new values of fields of this state, such as `batch_stats`; all others are arguments of `tx.update`.
            A field that is called like an argument of the update, such as `task_mask`, is both.

        Raises:
          ValueError: a keyword close to that of a field or an argument, or parameters with float8 scales, of which K
            losses have no single new value.
        """
        if isinstance(self.params, Mapping) and OVERWRITE_WITH_GRADIENT in self.params:
            raise ValueError(f"`params` must not hold {OVERWRITE_WITH_GRADIENT!r}: K losses have no single new scale.")
        fields = [field.name for field in dataclasses.fields(self)]
        extra = {name: value for name, value in kwargs.items() if name in UPDATE_ARGUMENTS or name not in fields}
        kwargs = {name: value for name, value in kwargs.items() if name in fields}
        refuse_misspelt(extra, [Argument(name) for name in fields])
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
