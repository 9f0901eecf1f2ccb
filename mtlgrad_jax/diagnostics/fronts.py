"""Pareto fronts: preferences to train for, the hypervolume of what came out, and a plot."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtlgrad_jax._core.checks import as_floats, check_count
from mtlgrad_jax.diagnostics.plots import axes_of


def simplex_lattice(num_tasks: int, divisions: int) -> np.ndarray:
    """Return evenly spaced preferences that sum to 1, the design of Das & Dennis (1998).

    Args:
      num_tasks: K.
      divisions: steps along an edge; there are binomial(divisions + K - 1, K - 1) preferences.

    Returns:
      (N, K) in lexicographic order.

    Example:
      >>> import mtlgrad_jax as mtl
      >>> mtl.diagnostics.simplex_lattice(2, 4).tolist()
      [[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_count("divisions", divisions, at_least=1)
    bars = itertools.combinations(range(divisions + num_tasks - 1), num_tasks - 1)
    edges = np.array([[-1, *bar, divisions + num_tasks - 1] for bar in bars])
    return (np.diff(edges, axis=1) - 1) / divisions


def hypervolume(losses: Any, reference: Any) -> float:
    r"""Return the volume of the losses that some point dominates, up to a reference point: larger is better.

    .. math:: \operatorname{vol} \bigcup_n \{ x : l^{(n)} \le x \le r \}

    Computed exactly by slicing along one loss after the other, on the host: N^(K-1) operations.

    Args:
      losses: (N, K), one point per row. A point with a NaN, or that does not dominate the reference, adds nothing.
      reference: :math:`r`, (K,): losses worse than any of interest.

    Example:
      >>> import mtlgrad_jax as mtl
      >>> mtl.diagnostics.hypervolume([[0.0, 1.0], [1.0, 0.0]], reference=[2.0, 2.0])
      3.0
    """
    points, bound = as_floats("losses", losses), as_floats("reference", reference)
    if points.ndim != 2:
        raise ValueError(f"`losses` must have shape (N, K), one point per row, got shape {points.shape}.")
    if bound.shape != points.shape[1:] or not np.isfinite(bound).all():
        raise ValueError(f"`reference` must hold {points.shape[1]} finite numbers, got reference={reference!r}.")
    if np.isneginf(points).any():
        raise ValueError("`losses` must not be -inf.")
    return _volume(points[(points < bound).all(axis=1)], bound)


def _volume(points: np.ndarray, bound: np.ndarray) -> float:
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(bound[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    heights = np.diff(np.append(points[:, -1], bound[-1]))
    return float(sum(h * _volume(points[: n + 1, :-1], bound[:-1]) for n, h in enumerate(heights) if h > 0))


def plot_front(
    losses: Any, names: Sequence[str] | None = None, reference: Any = None, label: str | None = None, ax: Any = None
) -> Any:
    """Plot the losses of many solutions, for two or three tasks; solutions that others dominate are hollow.

    Args:
      losses: (N, K), one point per row, as from `pareto_front`.
      names: the tasks' names, for the axes.
      reference: points of the true front, (M, K), drawn as a line for two tasks, as dots for three.
      label: for the legend.
      ax: matplotlib axes to draw on; new ones for None, with `projection="3d"` for three tasks.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    points = as_floats("losses", losses)
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"`losses` must have shape (N, 2) or (N, 3), got shape {points.shape}.")
    K = points.shape[1]
    if names is not None and not (isinstance(names, Sequence) and len(names) == K):
        raise ValueError(f"`names` must be those of {K} tasks, got names={names!r}.")
    known = points[:0] if reference is None else as_floats("reference", reference)
    if known.ndim != 2 or known.shape[1] != K:
        raise ValueError(f"`reference` must have shape (M, {K}), got shape {known.shape}.")
    ax = axes_of(ax, projection="3d" if K == 3 else None)
    if len(known):
        ax.plot(*known[np.lexsort(known.T[::-1])].T, "-" if K == 2 else ".", color="0.75", zorder=0)
    dominated = (np.all(points[:, None] >= points, axis=2) & np.any(points[:, None] > points, axis=2)).any(axis=1)
    drawn = ax.scatter(*points[~dominated].T, label=label)
    color = drawn.get_facecolor()[:1]
    ax.scatter(*points[dominated].T, facecolors="none", edgecolors=color)
    for axis, name in zip("xyz", names or [f"loss {i + 1}" for i in range(K)], strict=False):
        getattr(ax, f"set_{axis}label")(name)
    return ax
