"""TensorBoard, and any other logger that takes one number at a time."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, PyTree

from mtlgrad_jax.diagnostics.states import scalars


def write_scalars(writer: Any, metrics: Mapping[str, Array], like: PyTree, step: int) -> None:
    """Write metrics to TensorBoard under the tasks' names, with one transfer from the device.

    Loggers that take a flat dict need nothing from here: give them `mtlgrad_jax.scalars(metrics, like=losses)`.

    Args:
      writer: a tensorboardX.SummaryWriter, or anything with `add_scalar(name, value, step)`.
      metrics: what `mtlgrad_jax.metrics` returned.
      like: anything with the tasks' structure, usually the losses.
      step: number of the step.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> from mtlgrad_jax.integrations.logging import write_scalars
      >>> class Printer:
      ...     def add_scalar(self, name, value, step):
      ...         print(step, name, value)
      >>> metrics = {"norms": jnp.asarray([3.0, 4.0]), "conflict_fraction": jnp.asarray(0.0)}
      >>> write_scalars(Printer(), metrics, like={"seg": 0.0, "depth": 0.0}, step=7)
      7 conflict_fraction 0.0
      7 norms/depth 3.0
      7 norms/seg 4.0
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise ValueError(f"`writer` must have add_scalar(name, value, step), got {type(writer).__name__}.")
    for name, value in jax.device_get(scalars(metrics, like)).items():
        writer.add_scalar(name, value.item(), step)
