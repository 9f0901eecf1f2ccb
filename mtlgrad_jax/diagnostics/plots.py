"""Plots of metrics over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import as_floats
from mtlgrad_jax.diagnostics.states import names_of

History = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Metrics of many steps: one dict of arrays with a leading axis, as scan stacks them, or a list of dicts."""


def plot_weights(metrics: History, like: PyTree = None, ax: Any = None) -> Any:
    """Plot every task's weight over time.

    Args:
      metrics: what `mtlgrad_jax.metrics` returned in every step: stacked, as by scan, or a list.
      like: anything with the tasks' structure, usually the losses of one step, for the names; numbers for None.
      ax: matplotlib axes to draw on; new ones for None.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    weights = _history(metrics, "weights", 2)
    ax = axes_of(ax)
    for values, task in zip(weights.T, _names(like, weights.shape[1]), strict=True):
        ax.plot(values, label=task)
    ax.set(xlabel="step", ylabel="weight")
    ax.legend()
    return ax


def plot_cosines(metrics: History, like: PyTree = None, ax: Any = None) -> Any:
    """Plot the cosine between the gradients of every pair of tasks as a heat map over time; red pairs conflict.

    Args:
      metrics: what `mtlgrad_jax.metrics` returned in every step: stacked, as by scan, or a list.
      like: anything with the tasks' structure, usually the losses of one step, for the names; numbers for None.
      ax: matplotlib axes to draw on; new ones for None.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    cosines = _history(metrics, "cosines", 3)
    K = cosines.shape[1]
    if K < 2:
        raise ValueError(f"`metrics` must be of two or more tasks, got cosines of shape {cosines.shape}.")
    tasks, (first, second) = _names(like, K), np.triu_indices(K, 1)
    ax = axes_of(ax)
    image = ax.imshow(cosines[:, first, second].T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    pairs = [f"{tasks[i]}, {tasks[j]}" for i, j in zip(first, second, strict=True)]
    ax.set_yticks(range(len(pairs)), pairs, fontsize=min(10, 250 / len(pairs)))
    ax.set_xlabel("step")
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax


def plot_conflicts(metrics: History, ax: Any = None) -> Any:
    """Plot the share of conflicting pairs of tasks over time: of every step, and the average up to it.

    Args:
      metrics: what `mtlgrad_jax.metrics` returned in every step: stacked, as by scan, or a list.
      ax: matplotlib axes to draw on; new ones for None.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    conflicts = _history(metrics, "conflict_fraction", 1)
    ax = axes_of(ax)
    ax.plot(conflicts, ".", color="0.7", label="step")
    ax.plot(np.cumsum(conflicts) / np.arange(1, len(conflicts) + 1), label="average so far")
    ax.set(xlabel="step", ylabel="share of conflicting pairs", ylim=(-0.05, 1.05))
    ax.legend()
    return ax


def _history(metrics: History, name: str, ndim: int) -> np.ndarray:
    stacked = isinstance(metrics, Mapping)
    steps: list[Any] = [metrics] if stacked else list(metrics) if isinstance(metrics, Sequence) else []
    if not steps or not all(isinstance(step, Mapping) and name in step for step in steps):
        keys = sorted(steps[0]) if steps and isinstance(steps[0], Mapping) else type(metrics).__name__
        raise ValueError(
            f"`metrics` must hold {name!r} of every step, got {keys}. mtlgrad_jax.metrics returns it for a method "
            "wrapped in with_metrics; weights only for a method that combines the tasks by weights. For nested "
            "metrics, pass a dict with the part after the last dot as keys."
        )
    values = as_floats("metrics", steps[0][name] if stacked else [np.asarray(step[name]) for step in steps])
    if values.ndim != ndim:
        raise ValueError(f"`metrics` must hold {name!r} of many steps, got shape {values.shape}.")
    return values


def _names(like: PyTree, num_tasks: int) -> list[str]:
    tasks = [str(i) for i in range(num_tasks)] if like is None else names_of(like)
    if len(tasks) != num_tasks:
        raise ValueError(f"`like` must name {num_tasks} tasks, got {len(tasks)}.")
    return tasks


def axes_of(ax: Any, projection: str | None = None) -> Any:
    """Return axes, or new ones for None."""
    import matplotlib.pyplot as plt

    if ax is None:
        return plt.figure(layout="constrained").add_subplot(projection=projection)
    if not isinstance(ax, plt.Axes):
        raise ValueError(f"`ax` must be matplotlib axes or None, got ax={ax!r}.")
    return ax
