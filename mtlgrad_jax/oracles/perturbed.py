"""Sharpness-aware oracles: each task's perturbation of the parameters, and its gradient at the perturbed parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_flag, check_number
from mtlgrad_jax._core.control import map_leaves, once
from mtlgrad_jax._core.trees import Labels, cut, flag_leaves, merge
from mtlgrad_jax.oracles.losses import bind, check_averaged, check_oracle, count_losses, loss_of
from mtlgrad_jax.oracles.task_value_and_grad import Strategy, check_strategy, each_task, task_value_and_grad


def sam_perturbation(
    task_grads: PyTree,
    params: PyTree,
    rho_shared: Number = 0.05,
    rho_private: Number | None = None,
    *,
    is_shared: Labels | None = None,
    adaptive: bool = False,
) -> PyTree:
    r"""Return each task's perturbation of the parameters towards its worst loss nearby, to first order.

    .. math:: e_i = \rho \, g_i / \|g_i\|, \qquad \text{adaptive: } e_i = \rho \, p^2 g_i / \| \, |p| \, g_i \|

    elementwise, with :math:`p` the parameters. A zero gradient perturbs nothing. Foret et al., ICLR 2021, arXiv
    2010.01412; adaptive: Kwon et al., ICML 2021, arXiv 2102.11600, without its eta, as in the official code of FS-MTL.

    Args:
      task_grads: stack of K gradients.
      params: the parameters, in float32 or float64; in 16 bits, rounding removes most of a perturbation.
      rho_shared: radius >= 0 in the shared parameters.
      rho_private: radius in a task's own parameters; None for the value of `rho_shared`.
      is_shared: a pytree of bool with the structure of params, or a function of a leaf's path. None: one norm and one
        radius over all parameters that a task uses, including its head.
      adaptive: whether the radius is measured in units of the parameters.

    Returns:
      A stack of K perturbations.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> grads = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
      >>> mtl.sam_perturbation(grads, jnp.zeros(2), rho_shared=0.5).tolist()
      [[0.3, 0.4], [0.0, 0.0]]
    """
    check_radii(rho_shared, rho_private)
    check_flag("adaptive", adaptive)
    if is_shared is None and rho_private is not None:
        raise ValueError("`is_shared` must be given with rho_private: without it there is one radius for all.")
    stacks.num_tasks(task_grads, params)
    if is_shared is None:
        return _scaled(task_grads, params, rho_shared, adaptive)
    flags = flag_leaves(is_shared, params, "is_shared")
    radii = {True: rho_shared, False: rho_shared if rho_private is None else rho_private}
    parts = [(cut(task_grads, flags, flag), cut(params, flags, flag), rho) for flag, rho in radii.items()]
    return merge(task_grads, *[_scaled(grads, own, rho, adaptive) for grads, own, rho in parts if jax.tree.leaves(own)])


def check_radii(rho_shared: Any, rho_private: Any) -> None:
    """Raise a ValueError unless both radii are >= 0; the second may be None."""
    check_number("rho_shared", rho_shared, at_least=0)
    if rho_private is not None:
        check_number("rho_private", rho_private, at_least=0)


def _scaled(task_grads: PyTree, params: PyTree, rho: Number, adaptive: bool) -> PyTree:
    """Return g scaled to norm rho, or if adaptive p (p g) scaled so that (p g) has norm rho."""
    direction = task_grads
    if adaptive:
        direction = map_leaves(lambda g, p: g * jnp.abs(p).astype(g.dtype), task_grads, params)
    norms = stacks.task_norms(direction)
    scale = once(jnp.where(norms == 0, 0, rho / jnp.where(norms == 0, 1, norms)))

    def perturb(g: Array, p: Array) -> Array:
        if not jnp.issubdtype(g.dtype, jnp.floating):
            return g
        scaled = g.astype(scale.dtype) * scale.reshape(-1, *(1,) * (g.ndim - 1))
        return (scaled * jnp.abs(p) if adaptive else scaled).astype(g.dtype)

    return map_leaves(perturb, direction, params)


def perturbed_task_grad(
    losses_fn: Callable[..., Any], has_aux: bool = False, strategy: Strategy = "auto"
) -> Callable[..., PyTree]:
    """Return a function that gives each task's gradient at its own perturbation of the parameters.

    This takes K forward and backward passes; when unrolled and with named losses, each computes one task only.
    Anything `losses_fn` returns besides the losses, such as BatchNorm statistics, is dropped: keep those of the
    clean pass. Use the same batch and dropout key as in the clean pass.

    Args:
      losses_fn: called as `losses_fn(params, *args, **kwargs)`; returns a (K,) array or a pytree of K scalars; with
        `has_aux`, a pair of losses and anything else.
      has_aux: whether `losses_fn` returns (losses, aux).
      strategy: "unrolled": one pass after the other. "vmap": all at once, each with all tasks' heads. An int: that
        many at once. "auto": as in `task_value_and_grad`.

    Returns:
      `f(params, perturbations, *args, **kwargs) -> task_grads`, where `perturbations` is a stack: row i is the gradient
      of loss i at params plus row i of the perturbations.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> f = mtl.perturbed_task_grad(lambda p: {"a": p[0] ** 2, "b": p[1] ** 3})
      >>> f(jnp.asarray([1.0, 1.0]), jnp.asarray([[0.5, 0.0], [0.0, 1.0]])).tolist()
      [[3.0, 0.0], [0.0, 12.0]]
    """
    check_oracle(losses_fn, 0, has_aux)
    check_strategy(strategy)

    def grad(params: PyTree, perturbations: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        function, floating, rest = bind(losses_fn, (params, *args), kwargs, 0, has_aux)
        stacks.check_like("perturbations", perturbations, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params))
        K = stacks.num_tasks(perturbations)
        moves = rest.pick(perturbations)
        losses = jax.eval_shape(lambda leaves: function(leaves)[0], floating)
        found, separate = count_losses(losses)
        if found != K:
            raise ValueError(f"`perturbations` must have one row per loss, {found}, got {K}.")

        def row(i: Any, move: list[Array]) -> list[Array]:
            moved = [leaf + step.astype(leaf.dtype) for leaf, step in zip(floating, move, strict=True)]

            def value(leaves: list[Array]) -> Array:
                losses = function(leaves)[0]
                check_averaged(losses, leaves)
                return loss_of(losses, i)

            return jax.grad(value)(moved)

        rows = each_task(row, (np.arange(K), moves), strategy, separate)
        return rest.fill(rows, leading=(K,))

    return grad


def sam_value_and_grad(
    losses_fn: Callable[..., Any],
    rho_shared: Number = 0.05,
    rho_private: Number | None = None,
    *,
    is_shared: Labels | None = None,
    adaptive: bool = False,
    has_aux: bool = False,
    strategy: Strategy = "auto",
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """Return a function that gives the K losses, their gradients, and the gradients at each task's worst point nearby.

    Combines `task_value_and_grad`, `sam_perturbation` and `perturbed_task_grad` on one batch and one dropout key. The
    losses and `aux` are those of the clean pass.

    Args:
      losses_fn: called as `losses_fn(params, *args, **kwargs)`, as in `task_value_and_grad`.
      rho_shared: as in `sam_perturbation`, with `rho_private`, `is_shared`, `adaptive`.
      rho_private: see there.
      is_shared: see there.
      adaptive: see there.
      has_aux: whether `losses_fn` returns (losses, aux).
      strategy: as in `task_value_and_grad`.

    Returns:
      `f(params, *args, **kwargs) -> (losses, clean_grads, perturbed_grads)`; with `has_aux`
      `((losses, aux), clean_grads, perturbed_grads)`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> f = mtl.sam_value_and_grad(lambda p: jnp.stack([p[0] ** 2, p[1] ** 2]), rho_shared=0.5)
      >>> losses, clean, perturbed = f(jnp.asarray([1.0, 2.0]))
      >>> clean.tolist(), perturbed.tolist()
      ([[2.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 5.0]])
    """
    check_radii(rho_shared, rho_private)
    check_flag("adaptive", adaptive)
    clean_fn = task_value_and_grad(losses_fn, has_aux=has_aux, strategy=strategy)
    perturbed_fn = perturbed_task_grad(losses_fn, has_aux=has_aux, strategy=strategy)

    def value_and_grad(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, PyTree]:
        values, clean = clean_fn(params, *args, **kwargs)
        clean = jax.lax.optimization_barrier(clean)  # or XLA would keep its rows in memory beside the stack
        perturbations = sam_perturbation(clean, params, rho_shared, rho_private, is_shared=is_shared, adaptive=adaptive)
        return values, clean, perturbed_fn(params, perturbations, *args, **kwargs)

    return value_and_grad
