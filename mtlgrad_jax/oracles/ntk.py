"""Traces of neural tangent kernels, exactly or from random probes, without the kernels or their Jacobians."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count, check_flag, check_function
from mtlgrad_jax._core.control import loop
from mtlgrad_jax._core.random import Seed, check_key, draw_key, make_key
from mtlgrad_jax.oracles.linearize import linearize
from mtlgrad_jax.oracles.task_value_and_grad import task_value_and_grad


def ntk_traces(
    residual_fns: PyTree,
    params: PyTree,
    points: PyTree,
    num_probes: int | None = None,
    key: Seed | None = None,
    average: bool = True,
    at_once: int = 1,
) -> PyTree:
    r"""Return the trace of the neural tangent kernel of every task's residuals.

    .. math:: \operatorname{tr} J J^\top = \sum_n \| \nabla_\theta r_n \|^2
              \approx \frac{1}{m} \sum_{p=1}^m \| J^\top v_p \|^2

    with :math:`J` the Jacobian of the task's residuals r in the parameters. The sum is exact, at the cost of one
    backward pass through the residual at every point, and the memory of `at_once` gradients. The second form,
    Hutchinson's estimator with random signs v, costs m backward passes through all points together. It has no bias and
    a variance of :math:`\frac{2}{m} \sum_{n \ne l} (J J^\top)_{nl}^2`. Gradients at nearby points are much alike, so
    the standard deviation of a single probe can be 1.4 times the trace.

    Args:
      residual_fns: for every task a function `f(params, point)` that returns the residual at one point, an array of any
        shape; a pytree of functions under the tasks' names.
      params: the parameters.
      points: for every task its points, a tree of arrays with one row for every point.
      num_probes: m, number of random probes; None for exact traces.
      key: seed or key of the probes, required with `num_probes`: a new one for every step.
      average: whether to divide by the number of residuals, as for losses that are means (jaxpi), or not (official
        code, which takes equal numbers of points).
      at_once: exact traces: number of points whose gradients are computed together.

    Returns:
      The traces, a tree like `residual_fns`.

    Example:
      >>> import jax, jax.numpy as jnp, mtlgrad_jax as mtl
      >>> residual_fns = {"boundary": lambda w, x: w * x, "equation": lambda w, x: w**2 * x}
      >>> points = {"boundary": jnp.asarray([1.0, 3.0]), "equation": jnp.asarray([1.0, 1.0, 2.0])}
      >>> jax.tree.map(float, mtl.ntk_traces(residual_fns, 0.5, points))
      {'boundary': 5.0, 'equation': 2.0}
    """
    check_flag("average", average)
    check_count("at_once", at_once, at_least=1)
    if num_probes is not None:
        check_count("num_probes", num_probes, at_least=1)
    if num_probes is not None or key is not None:
        check_key(key)
    treedef: Any
    functions, treedef = jax.tree.flatten(residual_fns)
    if not functions:
        raise ValueError(f"`residual_fns` must hold a function for every task, got residual_fns={residual_fns!r}.")
    for function in functions:
        check_function("residual_fns", function)
    if not jax.tree.leaves(params):
        raise ValueError(f"`params` must be a tree of arrays, got params={params!r}.")
    sets = _sets_of_points(treedef, points)
    residuals = [_flat(function) for function in functions]
    counts = [_count(residual, params, own) for residual, own in zip(residuals, sets, strict=True)]
    if num_probes is None or key is None:
        traces = [_exact(residual, params, own, at_once) for residual, own in zip(residuals, sets, strict=True)]
    else:
        draws = jax.random.split(draw_key(make_key(key))[1], (len(sets), num_probes))
        traces = [_estimate(r, params, *task) for r, *task in zip(residuals, sets, counts, draws, strict=True)]
    if average:
        traces = [trace / count for trace, count in zip(traces, counts, strict=True)]
    return jax.lax.stop_gradient(treedef.unflatten(traces))


def _flat(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda params, point: jnp.ravel(function(params, point))


def _sets_of_points(treedef: Any, points: PyTree) -> list[PyTree]:
    """Return the points of every task; each set must be a tree of arrays of one length."""
    try:
        sets = treedef.flatten_up_to(points)
    except (ValueError, TypeError):
        sets = None
    if sets is None:
        raise ValueError(
            f"`points` must have the structure of residual_fns, {treedef}, at the top, "
            f"got {jax.tree.structure(points)}."
        )
    for own in sets:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(own)]
        if not shapes or any(shape[:1] in ((), (0,)) or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"`points` must hold arrays of one length >= 1 for every task, got shapes {shapes}.")
    return [jax.tree.map(jnp.asarray, own) for own in sets]


def _count(residual: Callable[..., Array], params: PyTree, points: PyTree) -> int:
    """Return the number of residuals at all points, of one or more each."""
    shape = jax.eval_shape(residual, params, jax.tree.map(lambda leaf: leaf[0], points))
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(f"`residual_fns` must return arrays of floating dtype, got {shape.dtype}.")
    return len(jax.tree.leaves(points)[0]) * shape.size


def _exact(residual: Callable[..., Array], params: PyTree, points: PyTree, at_once: int) -> Float[Array, ""]:
    def at(point: PyTree) -> Float[Array, ""]:
        _, rows = task_value_and_grad(lambda params: residual(params, point))(params)
        return jnp.sum(stacks.task_norms(rows) ** 2)

    return jnp.sum(loop(at, (points,), at_once))


def _estimate(
    residual: Callable[..., Array], params: PyTree, points: PyTree, count: int, draws: Array
) -> Float[Array, ""]:
    jacobian = linearize(lambda params: jnp.ravel(jax.vmap(residual, (None, 0))(params, points)), params)

    def square(draw: Array) -> Float[Array, ""]:
        gradient = jacobian.pullback(jax.random.rademacher(draw, (count,), float))
        return stacks.task_norms(jax.tree.map(lambda leaf: leaf[None], gradient))[0] ** 2

    return jnp.mean(loop(square, (draws,)))
