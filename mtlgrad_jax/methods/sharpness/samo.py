"""SAMO, a lightweight sharpness-aware approach (Ban, Subramani & Ji, ICCV 2025, arXiv 2507.07883).

Formulas from the official code (github OptMN-Lab/SAMO). Departures: a task whose two losses are equal has no local
part, where the code divides 0 by 0; and the estimate runs the network in the mode of the caller's `losses_fn`, not in
evaluation mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, as_array, check_flag, check_function, check_number
from mtlgrad_jax._core.control import map_leaves, once
from mtlgrad_jax._core.joined import draw_like
from mtlgrad_jax._core.method import check_transformation, reject_masked, skip_together
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, make_key
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.trees import cut, label_leaves, merge
from mtlgrad_jax.oracles.losses import count_losses, loss_of, read_losses
from mtlgrad_jax.oracles.perturbed import sam_perturbation
from mtlgrad_jax.oracles.task_value_and_grad import each_task
from mtlgrad_jax.wrappers.shared_private import own_heads


class SAMOState(NamedTuple):
    """State of samo."""

    key: Key  # for the next step's probes
    inner: PyTree  # the method's state


def samo(
    method: optax.GradientTransformation,
    rho: Number = 0.003,
    beta: Number = 0.1,
    *,
    probe: Number = 0.01,
    heads: Callable[[Any], Any] | None = None,
    adaptive: bool = False,
    key: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Make any method sharpness-aware with one gradient and 2K forward passes for all K perturbations.

    .. math:: s_i = \operatorname{sign}(l_i(\theta + \delta z_i) - l_i(\theta - \delta z_i)), \qquad
              e_i \propto (1 - \beta) \, g_0 + \beta \, \|g_0\| \, s_i \, z_i / \|z_i\|, \qquad \|e_i\| = \rho

    with :math:`g_0` the gradient of the mean loss, :math:`z_i` normal, and the norms in the :math:`\beta` term taken
    per leaf (the code's "layer"). The method then combines the gradients at :math:`\theta + e_i`. A zeroth-order
    estimate of the gradient is a multiple of :math:`z_i`; after normalisation only its sign matters. Heads are
    perturbed along their own gradient, with radius rho, and get the gradient of their task at the perturbed point.

        update(mean_grad, state, params, losses_fn=losses_of, grad_fn=f)

    where `mean_grad` is an ordinary gradient, `losses_of(params)` gives the losses on the current batch, and
    `f(params, perturbations)` is `perturbed_task_grad` on it.

    Args:
      method: any transformation of this library, or a chain that begins with one.
      rho: radius >= 0 of the perturbations. Official code: 0.003 by default, 0.001 in its runs.
      beta: share :math:`\beta` of the local part, in [0, 1]. Official code: 0.1 by default, 0.5 in its runs.
      probe: step :math:`\delta` > 0 of the difference, in units of the parameters.
      heads: a function of a leaf's path that returns the name of its head, or None for shared leaves.
      adaptive: whether rho is measured in units of the parameters, as in `sam_perturbation`.
      key: seed or key; the same on every process. Under vmap over runs, make the method inside, `samo(..., key=key)`,
        with a key for each run: `vmap(tx.init)` gives all runs the same key.

    Returns:
      An optax transformation from ordinary gradients to ordinary gradients.

    Example:
      >>> import jax, jax.numpy as jnp, mtlgrad_jax as mtl
      >>> def losses_fn(p):
      ...     return {"a": jnp.sum((p - 1.0) ** 2), "b": jnp.sum((p + 1.0) ** 2)}
      >>> tx, params = mtl.samo(mtl.mean(), rho=0.5, beta=0.0), jnp.asarray([3.0, 4.0])
      >>> mean_grad = jax.grad(lambda p: sum(losses_fn(p).values()) / 2)(params)
      >>> update, _ = tx.update(
      ...     mean_grad, tx.init(params), params, losses_fn=losses_fn, grad_fn=mtl.perturbed_task_grad(losses_fn)
      ... )
      >>> update.tolist()
      [6.6, 8.8]
    """
    check_transformation(method)
    check_number("rho", rho, at_least=0)
    check_number("beta", beta, at_least=0, at_most=1)
    check_number("probe", probe, above=0)
    check_flag("adaptive", adaptive)
    check_key(key)
    if heads is not None:
        check_function("heads", heads)
    inner = method if heads is None else own_heads(method, lambda path: heads(path) is None)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SAMOState:
        reject_masked(params)
        return SAMOState(make_key(key), inner.init(params))

    def update(
        mean_grad: PyTree,
        state: SAMOState,
        params: PyTree | None = None,
        *,
        losses_fn: Callable[[PyTree], PyTree] | None = None,
        grad_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SAMOState]:
        for name, given in (("params", params), ("losses_fn", losses_fn), ("grad_fn", grad_fn)):
            if given is None:
                raise ValueError(
                    f"`{name}` must be given: update(mean_grad, state, params, losses_fn=losses_of, grad_fn=f)."
                )
        assert losses_fn is not None
        assert grad_fn is not None
        check_function("losses_fn", losses_fn)
        check_function("grad_fn", grad_fn)
        mean_grad = jax.tree.map(partial(as_array, "mean_grad"), mean_grad)
        given, wanted = (
            (jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (mean_grad, params)
        )
        if given != wanted:
            raise ValueError(f"`mean_grad` must be one gradient and no stack, {wanted} as params, got {given}.")
        labels = label_leaves(heads or (lambda path: None), params, "heads")
        if None not in labels:
            raise ValueError("`heads` must be None for some leaf, which all tasks share, got none.")
        shapes = jax.eval_shape(lambda params: read_losses(losses_fn(params), has_aux=False)[0], params)
        K, separate = count_losses(shapes)
        following, draw = draw_key(state.key)
        drawn = [
            label is None and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            for leaf, label in zip(jax.tree.leaves(params), labels, strict=True)
        ]
        shared = _pick(params, drawn)
        probes = draw_like(jax.random.normal, draw, [jax.ShapeDtypeStruct((K, *p.shape), p.dtype) for p in shared])
        probes = map_leaves(lambda z, p: z.astype(p.dtype), probes, shared)

        def sign(i: Any, probe_of_task: list[Array]) -> Float[Array, ""]:
            def at(step: Number) -> Float[Array, ""]:
                moved = map_leaves(lambda p, z: p + step * z, shared, probe_of_task)
                return loss_of(losses_fn(_put(params, drawn, moved)), i)

            return jnp.sign(at(probe) - at(-probe))

        signs = once(each_task(sign, (np.arange(K), probes), "auto", separate))
        rows = map_leaves(lambda g: _repeat(g, K), mean_grad)
        rows = _put(rows, drawn, _rows(_pick(mean_grad, drawn), probes, signs, beta))
        groups = [(cut(rows, labels, label), cut(params, labels, label)) for label in dict.fromkeys(labels)]
        e = merge(params, *[sam_perturbation(*group, rho, adaptive=adaptive) for group in groups])
        task_grads = grad_fn(params, e)
        stacks.check_like("grad_fn", task_grads, e, rows=True)
        gradient, new_inner = inner.update(task_grads, state.inner, params, **extra)
        return skip_together(gradient, SAMOState(following, new_inner), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _pick(tree: PyTree, flags: list[bool]) -> list[Array]:
    return [jnp.asarray(leaf) for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]


def _put(tree: PyTree, flags: list[bool], values: list[Array]) -> PyTree:
    """Return a tree with new values in the flagged leaves."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    others = iter(values)
    return treedef.unflatten([next(others) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)])


def _repeat(leaf: Array, K: int) -> Array:
    """Return a floating leaf repeated K times, or zeros for another leaf."""
    return jnp.broadcast_to(leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, (K, *leaf.shape))


def _rows(mean_grad: list[Array], probes: list[Array], signs: Float[Array, " K"], beta: Number) -> list[Array]:
    """Return (1 - beta) g + beta |g| s z / |z| for each leaf and task, or g where there is no probe."""

    def rows(z: Array, g: Array) -> Array:
        length, lengths = stacks.leaf_norms(g[None]), stacks.leaf_norms(z)
        probed = lengths > 0
        local = jnp.where(probed, beta * length * signs / jnp.where(probed, lengths, 1), 0)
        keep = jnp.where(probed, 1 - beta, 1)
        return (stacks.column(keep, z) * g[None] + stacks.column(local, z) * z).astype(g.dtype)

    return stacks.map_rows(rows, probes, mean_grad)


ROW = Row(
    samo,
    scale="the method's",
    state="the method's and a random key",
    papers=(
        Paper(
            "SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task Optimization with Joint Global-Local "
            "Perturbation",
            "Hao Ban, Gokul Ram Subramani, Kaiyi Ji",
            2025,
            booktitle="ICCV",
            arxiv="2507.07883",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    wraps="mgda",
    functions=("losses_fn", "grad_fn"),
    checked="numpy float64 of the official code's formula",
    randomized=True,
)
