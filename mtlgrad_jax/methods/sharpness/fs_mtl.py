"""FS-MTL, sharpness-aware multi-task learning (Phan et al., ICCV 2025, arXiv 2211.13723, v5).

The official code (github VietHoang1512/FS-MTL) has only the modes "individual" and "direct", uses adaptive
perturbations by default in three of its four experiments, and normalises F-MGDA's rows in two of them, as
`mtlgrad_jax.mgda(normalization="l2", apply_to="normalized")` does.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_flag, check_function
from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.joined import Leaves, joined, marked
from mtlgrad_jax._core.method import (
    Method,
    check_transformation,
    skip_together,
    update_without_task_axis,
)
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import repeat_state
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.step import mark_idle
from mtlgrad_jax._core.tasks import check_num_tasks
from mtlgrad_jax._core.trees import Labels, row_shapes
from mtlgrad_jax.oracles.perturbed import check_radii, sam_perturbation
from mtlgrad_jax.wrappers.shared_private import own_heads

_ROUNDING = 8  # in eps of the gradient's norm: a flat part no longer than this is rounding error
_ROUNDING_OF_HALVES = 2  # the same for 16 bits, where 8 eps would be 6 percent

Mode = Literal["individual", "direct", "second", "each"]
COPIES = {
    "individual": ("loss", "flat"),
    "direct": ("sam",),
    "second": ("loss", "flat", "both"),
    "each": ("each", "all"),
}
"""The copies of the method that each mode keeps, each with its own state."""


class FSMTLState(NamedTuple):
    """State of fs_mtl."""

    copies: dict[str, PyTree]  # the method's states


def fs_mtl(
    method: optax.GradientTransformation,
    rho_shared: Number = 0.05,
    rho_private: Number | None = None,
    *,
    is_shared: Labels | None = None,
    adaptive: bool = False,
    joint: bool = False,
    mode: Mode = "individual",
    num_tasks: int | None = None,
) -> Method:
    r"""Make any method sharpness-aware: aggregate loss and flatness gradients separately, then add the results.

    .. math:: g_i^{flat} = \nabla l_i(\theta + e_i) - g_i, \qquad
              d = \operatorname{Agg}(g_1, \ldots, g_K) + \operatorname{Agg}(g_1^{flat}, \ldots, g_K^{flat})

    with :math:`e_i` from `sam_perturbation`. The two aggregations use two copies of the method, each with its own
    state. Heads (where `is_shared` is False) get their own task's :math:`\nabla l_i(\theta + e_i)`. A flat part no
    longer than rounding, 8 eps of the task's gradient (2 in 16 bits), counts as zero: with rho = 0 this is the method
    itself. Averaging methods give plain SAM.

    There are two forms of update. The first takes the gradients at the perturbed points, which `sam_value_and_grad`
    returns with the clean ones: `update(perturbed_grads, state, params, clean_grads=grads)`; the radii given here are
    then unused. The second takes an oracle, like the opaque mode of `optax.contrib.sam`:
    `update(grads, state, params, grad_fn=f)`, where `f(params, perturbations)` is `perturbed_task_grad` on the current
    batch. If a task's gradient is NaN or inf at its perturbed point, `skip_nonfinite_tasks` drops the task in the first
    form; in the second, the step is skipped.

    Args:
      method: any transformation of this library, or a chain that begins with one.
      rho_shared: radius >= 0 of the perturbation of shared parameters. Official code: 2 with adaptive perturbations,
        0.05 without (MultiMNIST).
      rho_private: radius of the perturbation of a head; None for the value of `rho_shared`.
      is_shared: a pytree of bool with the structure of params, or a function of a leaf's path; None: all are shared.
      adaptive: whether radii are measured in units of the parameters (ASAM).
      joint: whether to use one norm and one radius over shared parameters and head together (official code for
        MultiMNIST), instead of separate ones (paper, and the rest of the official code).
      mode: "individual" as above. The paper's ablations: "direct" aggregates the perturbed gradients; "second"
        aggregates the two aggregates again instead of adding them; "each" aggregates :math:`g_i` and
        :math:`g_i^{flat}` of each task, then the tasks. For the last two, the method must accept two gradients without
        losses, and sees a flat part of zero as a zero gradient, for which MGDA returns zero.
      num_tasks: K, for mode "each", which keeps a state of the method for every task.

    Returns:
      A transformation with the two forms of update above, which also take `losses` and `task_mask`.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> def losses_fn(p):
      ...     return {"a": jnp.sum((p - 1.0) ** 2), "b": jnp.sum(p**4)}
      >>> tx = optax.chain(mtl.fs_mtl(mtl.cagrad(), rho_shared=0.1), optax.sgd(0.1))
      >>> params = jnp.asarray([1.0, 0.5])
      >>> state = tx.init(params)
      >>> losses, clean, perturbed = mtl.sam_value_and_grad(losses_fn, rho_shared=0.1)(params)
      >>> update, _ = tx.update(perturbed, state, params, clean_grads=clean)
      >>> losses, grads = mtl.task_value_and_grad(losses_fn)(params)
      >>> same, _ = tx.update(grads, state, params, grad_fn=mtl.perturbed_task_grad(losses_fn))
      >>> bool(jnp.allclose(update, same))
      True
    """
    check_transformation(method)
    check_radii(rho_shared, rho_private)
    check_choice("mode", mode, tuple(COPIES))
    check_flag("adaptive", adaptive)
    check_flag("joint", joint)
    if joint and rho_private is not None:
        raise ValueError(f"`rho_private` must be None with joint=True, which has one radius, got {rho_private}.")
    if mode == "each" or num_tasks is not None:
        check_count("num_tasks", num_tasks, at_least=1)
    aggregation = _aggregation(method, mode, num_tasks)
    if is_shared is not None:
        aggregation = own_heads(aggregation, is_shared, also=("clean_grads",))
    elif mode != "each" and getattr(method, "leaves_alike", False):
        aggregation = _joined(aggregation)

    def update(
        task_grads: PyTree,
        state: FSMTLState,
        params: PyTree | None,
        *,
        clean_grads: PyTree = None,
        grad_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, FSMTLState]:
        if (clean_grads is None) == (grad_fn is None):
            raise ValueError(
                "`clean_grads` must be given, or `grad_fn`, and not both: update(perturbed_grads, state, params, "
                "clean_grads=grads), or update(grads, state, params, grad_fn=f)."
            )
        if grad_fn is not None:
            check_function("grad_fn", grad_fn)
            if params is None:
                raise ValueError("`params` must be given with grad_fn, which is called as grad_fn(params, e).")
            clean_grads = task_grads
            blocks = None if joint else is_shared
            e = sam_perturbation(clean_grads, params, rho_shared, rho_private, is_shared=blocks, adaptive=adaptive)
            perturbed_grads = grad_fn(params, e)
            stacks.check_like("grad_fn", perturbed_grads, clean_grads, rows=True)
            task_grads = stacks.select(stacks.task_norms(e) != 0, perturbed_grads, clean_grads)
        stacks.check_like("clean_grads", clean_grads, task_grads, rows=True)
        return aggregation.update(task_grads, state, params, clean_grads=clean_grads, **extra)

    return Method(aggregation.init, update)


def _aggregation(method: optax.GradientTransformation, mode: Mode, num_tasks: int | None) -> Method:
    """Return a method that aggregates the perturbed gradients and `clean_grads` according to `mode`."""

    def aggregate(task_grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        return update_without_task_axis("method", method, task_grads, state, params, **extra)

    def init(params: PyTree) -> FSMTLState:
        names = COPIES[mode]
        states = repeat_state(method.init(params), len(names))
        copies = {name: jax.tree.map(lambda leaf, i=i: leaf[i], states) for i, name in enumerate(names)}
        if mode == "each":
            assert num_tasks is not None
            copies["each"] = repeat_state(copies["each"], num_tasks)
        return FSMTLState(copies)

    def update(
        perturbed_grads: PyTree, state: FSMTLState, params: PyTree | None, *, clean_grads: PyTree, **extra: Any
    ) -> tuple[PyTree, FSMTLState]:
        new = dict(state.copies)

        def run(name: str, task_grads: PyTree, **extra: Any) -> PyTree:
            gradient, new[name] = aggregate(task_grads, state.copies[name], params, **extra)
            return gradient

        if mode == "direct":
            gradient = run("sam", perturbed_grads, **extra)
            return skip_together(gradient, FSMTLState(new), state)
        flat_grads = _flat_part(perturbed_grads, clean_grads)
        if mode == "each":
            K = stacks.num_tasks(clean_grads)
            check_num_tasks(num_tasks, K)
            present = extra["task_mask"]
            pairs = stacks.select(present, map_leaves(_pair(axis=1), clean_grads, flat_grads))
            rows, states = jax.vmap(lambda pair, own: aggregate(pair, own, params))(pairs, state.copies["each"])
            new["each"] = stacks.select(present, states, mark_idle(state.copies["each"], jnp.zeros_like(present)))
            gradient = run("all", rows, **extra)
        else:
            parts = run("loss", clean_grads, **extra), run("flat", flat_grads, **extra)
            join = jnp.add if mode == "individual" else _pair(axis=0)
            gradient = map_leaves(join, *parts)
            if mode == "second":
                gradient = run("both", gradient)
        return skip_together(gradient, FSMTLState(new), state)

    return Method(init, update)


def _joined(aggregation: Method) -> Method:
    """Return the same aggregation, which under jit on one CPU sees short leaves joined."""
    shapes = functools.partial(jax.eval_shape, aggregation.init)

    def update(
        task_grads: PyTree, state: FSMTLState, params: PyTree | None, *, clean_grads: PyTree, **extra: Any
    ) -> tuple[PyTree, FSMTLState]:
        def aggregate(
            task_grads: PyTree, clean_grads: PyTree, state: FSMTLState, *params: PyTree
        ) -> tuple[Leaves, FSMTLState]:
            gradient, new = aggregation.update(task_grads, state, *params, clean_grads=clean_grads, **extra)
            return Leaves(gradient), marked(new, shapes, row_shapes(task_grads))

        like, given = row_shapes(task_grads), () if params is None else (Leaves(params),)
        trees = (like, clean_grads, *given)
        if len({tuple(map(jnp.result_type, jax.tree.leaves(tree))) for tree in trees}) > 1:  # draws are by dtype
            return aggregation.update(task_grads, state, params, clean_grads=clean_grads, **extra)
        return joined(aggregate, like, Leaves(task_grads), Leaves(clean_grads), marked(state, shapes, like), *given)

    return Method(aggregation.init, update)


def _pair(axis: int) -> Callable[[Array, Array], Array]:
    return lambda first, second: jnp.stack([first, second], axis)


def _flat_part(perturbed_grads: PyTree, clean_grads: PyTree) -> PyTree:
    """Return the difference of two stacks, with zeros for rows that are rounding error."""

    def difference(perturbed: Array, clean: Array) -> Array:
        return perturbed - clean if jnp.issubdtype(clean.dtype, jnp.floating) else clean

    flat = map_leaves(difference, perturbed_grads, clean_grads)
    return stacks.select(~(stacks.task_norms(flat) <= _rounding(clean_grads)), flat)  # keeps NaN


def _rounding(task_grads: PyTree) -> Array:
    """Return the norm of differences of rounding errors: a few eps, by dtype, of the gradients' norms."""
    leaves = [leaf for leaf in jax.tree.leaves(task_grads) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    lengths = [jnp.zeros((stacks.num_tasks(task_grads),))]
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        eps = float(jnp.finfo(dtype).eps) * (_ROUNDING if dtype.itemsize > 2 else _ROUNDING_OF_HALVES)
        lengths.append(eps * stacks.task_norms([leaf for leaf in leaves if leaf.dtype == dtype]))
    return functools.reduce(jnp.hypot, lengths)


ROW = Row(
    fs_mtl,
    scale="the method's, for losses plus flat parts",
    state="two copies of the method's",
    papers=(
        Paper(
            "Beyond Losses Reweighting: Empowering Multi-Task Learning via the Generalization Perspective",
            "Hoang Phan, Lam Tran, Quyen Tran, Ngoc Tran, Tuan Truong, Qi Lei, Nhat Ho, Dinh Phung, Trung Le",
            2025,
            booktitle="ICCV",
            arxiv="2211.13723",
        ),
    ),
    wraps="mgda",
    functions=("clean_grads` or `grad_fn",),
    checked="numpy float64 of the published formula; plain SAM for averages",
)
