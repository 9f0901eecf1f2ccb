"""The Jacobian of losses that depend on a trunk's parameters only through its features.

The chain rule is cut at the features: their K gradients come from one backward pass through the heads, and only these
K cotangents go through the trunk. To the oracle, this is another loss function with the same values and gradients:

    l_i(params, z_0) + <dl_i/dz, z(params) - z_0>,    z_0 = z(params) held fixed
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_flag, check_function
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax.oracles.linearize import TaskJacobian, linearize
from mtlgrad_jax.oracles.losses import (
    check_differentiable,
    check_oracle,
    count_losses,
    flatten_losses,
    read_losses,
    varying,
)
from mtlgrad_jax.oracles.task_value_and_grad import like_losses, task_value_and_grad


def linearize_features(
    features_fn: Callable[..., PyTree],
    losses_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    bound: bool = False,
    has_aux: bool = False,
    rows: int | None = None,
    **kwargs: Any,
) -> TaskJacobian:
    """Run a trunk and its heads forward once and return the losses' Jacobian as an operator, as `linearize` does.

    The heads' backward pass runs once for the K gradients of the features. With `shared_private` and under jit, the
    passes of `linearize` then go through the trunk only. So return the losses by name: each is differentiated through
    its own head, whereas those in an array each take a pass through all heads. Features and their K gradients are held
    in memory. A NaN or inf in the features' gradient of one task reaches all tasks, with `rows` too.

    With `bound`, the Gramian is that of the features' gradients, as in MGDA-UB (Sener & Koltun, NeurIPS 2018, arXiv
    1810.04650), for any method that looks at the Gramian, and over any leaves (`gram_over`, `partition`). The only pass
    through the trunk is that of the weighted sum, so a step costs little more than a plain one, whatever K. Since g_i =
    J^T z_i for features with Jacobian J, the weighted sum of gradients is at most ||J|| times as long as that of the
    z_i; if J has full row rank, Pareto-stationary points are the same. Otherwise, what the method guarantees holds for
    the features, and need not hold for the parameters.

    Args:
      features_fn: `features_fn(params, *args, **kwargs)` returns the features, an array or a pytree.
      losses_fn: `losses_fn(params, features, *args, **kwargs)` returns a (K,) array or a pytree of K scalars; with
        `has_aux`, a pair of losses and anything else, such as batch statistics that `features_fn` returned.
      params: all parameters, of the trunk and the heads. Gradients that bypass the features are exact too.
      *args: other arguments of both functions.
      bound: whether to take the features' Gramian for that of the parameters. Together with `shared_private`, the heads
        get their own gradients.
      has_aux: whether `losses_fn` returns (losses, aux).
      rows: gradients held at a time, as in `linearize`.
      **kwargs: keyword arguments of both functions.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> trunk = lambda p, x: x * p["trunk"]
      >>> heads = lambda p, z, x: {"a": jnp.sum(p["a"] * z), "b": -2 * jnp.sum(p["b"] * z)}
      >>> params, x = {"trunk": jnp.asarray(1.0), "a": jnp.ones(2), "b": jnp.ones(2)}, jnp.asarray([3.0, 4.0])
      >>> exact = mtl.linearize_features(trunk, heads, params, x)
      >>> exact.pullback(jnp.ones(2))["trunk"].item()
      -7.0
      >>> mtl.linearize_features(trunk, heads, params, x, bound=True).gramian().tolist()
      [[2.0, -4.0], [-4.0, 8.0]]
    """
    check_function("features_fn", features_fn)
    check_oracle(losses_fn, 0, has_aux)
    check_flag("bound", bound)
    check_differentiable(params, "`params` must hold")

    def cut(params: PyTree) -> tuple[PyTree, tuple[Any, PyTree]]:
        features = features_fn(params, *args, **kwargs)
        fixed, held = lax.stop_gradient((features, params))
        check_differentiable(fixed, "`features_fn` must return")

        @jax.jit  # traced once for all tasks
        def at(features: PyTree) -> PyTree:
            return read_losses(losses_fn(held, features, *args, **kwargs), has_aux)[0]

        _, separate = count_losses(jax.eval_shape(at, fixed))
        gradients = task_value_and_grad(at, strategy="unrolled" if separate else "auto")(fixed)[1]
        losses, aux = read_losses(losses_fn(params, fixed, *args, **kwargs), has_aux)
        axes = sorted(varying(features) - varying(losses))
        if axes:
            raise ValueError(
                f"`losses_fn` must see all features, got some that vary over the mesh axes {axes} inside "
                "jax.shard_map. Use linearize there, or shard the batch under jit."
            )
        vector = _follow(flatten_losses(losses), gradients, features)
        return like_losses(vector, losses), (aux, gradients)

    jacobian = linearize(cut, params, has_aux=True, rows=rows)
    jacobian.aux, gradients = jacobian.aux
    return jacobian.with_gramian(stacks.gramian(gradients)) if bound else jacobian


@jax.custom_jvp
def _follow(losses: Float[Array, " K"], gradients: PyTree, features: PyTree) -> Float[Array, " K"]:
    """Return the losses, as functions of the features with the given gradients."""
    del gradients, features
    return losses


@_follow.defjvp
def _changes(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (losses, gradients, _), (change, _, moved) = primals, tangents
    total = change.astype(accumulator_dtype())
    for rows, dz in zip(jax.tree.leaves(gradients), jax.tree.leaves(moved), strict=True):
        if jnp.issubdtype(rows.dtype, jnp.floating):
            wide = (rows.astype(total.dtype), dz.astype(total.dtype))
            total += jnp.tensordot(*wide, dz.ndim, precision=lax.Precision.HIGHEST)
    return losses, total.astype(losses.dtype)
