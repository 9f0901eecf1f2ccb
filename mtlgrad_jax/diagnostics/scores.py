"""Scores of trained networks."""

from typing import Any

import jax
import numpy as np

from mtlgrad_jax._core.checks import as_floats


def delta_m(values: Any, baselines: Any, higher_is_better: Any = False) -> float:
    r"""Return the mean relative loss against networks for each task alone, in percent: negative is better.

    .. math:: \Delta_m = \frac{100}{M} \sum_i s_i \frac{v_i - b_i}{|b_i|}

    with :math:`s_i = -1` if higher is better, else 1: as in the tables of FAMO (arXiv 2306.03792), whose baselines are
    positive. Some papers report the opposite sign, and call it a gain.

    Args:
      values: M metrics of a network, as a sequence or a pytree of numbers, such as a dict by name.
      baselines: the same of networks for each task alone.
      higher_is_better: whether a metric is an accuracy or the like, not an error; one bool for all, or
        the structure of values.

    Raises:
      ValueError: the structures differ, or a baseline is zero or not finite.

    Example:
      >>> import mtlgrad_jax as mtl
      >>> mtl.diagnostics.delta_m({"error": 1.1, "miles": 0.9}, {"error": 1.0, "miles": 1.0})
      0.0
    """
    ours, alone = as_floats("values", jax.tree.leaves(values)), as_floats("baselines", jax.tree.leaves(baselines))
    structure: Any = jax.tree.structure(values)
    if structure != jax.tree.structure(baselines) or ours.shape != alone.shape:
        raise ValueError(
            f"`baselines` must have the structure of values, got values={values!r}, baselines={baselines!r}."
        )
    if not len(alone) or not alone.all() or not np.isfinite(alone).all():
        raise ValueError(f"`baselines` must hold finite nonzero numbers, at least one, got baselines={baselines!r}.")
    flags = [np.asarray(flag) for flag in jax.tree.leaves(higher_is_better)]
    alike = isinstance(higher_is_better, (bool, np.bool_)) or jax.tree.structure(higher_is_better) == structure
    if not alike or any(flag.dtype != bool for flag in flags):
        raise ValueError(
            "`higher_is_better` must be one bool, or have the structure of values, got "
            f"higher_is_better={higher_is_better!r}."
        )
    return float(100 * np.mean(np.where(flags, -1, 1) * (ours - alone) / abs(alone)))
