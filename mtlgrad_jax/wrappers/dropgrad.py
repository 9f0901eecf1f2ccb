"""DropGrad, gradient dropout (Tseng et al. 2020, arXiv 2004.05859); not GradDrop, which drops signs.

Follows the official code (hytseng0509/DropGrad), which applies it to the inner steps of meta-learning. That code's
linear schedule scales the standard deviation of the gaussian kind; a schedule of `rate` does not.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_choice, check_number
from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.joined import draw_like
from mtlgrad_jax._core.method import reject_masked
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, make_key, uniform
from mtlgrad_jax._core.row import Row
from mtlgrad_jax._core.tasks import present_tasks, task_names


class DropGradState(NamedTuple):
    """State of dropgrad."""

    key: Key  # for the next step's noise


def dropgrad(
    rate: Number = 0.1, kind: Literal["gaussian", "binary"] = "gaussian", key: Seed = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply every coordinate of every task's gradient by noise of mean one, before a method combines them.

    .. math:: g'_{ij} = g_{ij} z_{ij}, \qquad z_{ij} \sim \mathcal N\bigl(1, \tfrac{p}{1 - p}\bigr) \quad \text{or}
              \quad z_{ij} \sim \tfrac{1}{1 - p} \operatorname{Bernoulli}(1 - p)

    Both have variance p / (1 - p). The task axis stays; chain a method after it. The gradient of an absent task, or one
    with a NaN or inf, is passed on unchanged.

    Args:
      rate: :math:`p`, in [0, 1); the authors recommend 0.1 to 0.2; 0 changes nothing.
      kind: "gaussian" or "binary".
      key: seed or key; the same on every process. Under vmap over runs, make it inside, `dropgrad(..., key=key)`, with
        a key for each run: `vmap(tx.init)` gives all runs the same key.

    Returns:
      A transformation from stacked gradients to stacked gradients.

    Example:
      >>> import jax.numpy as jnp, optax, mtlgrad_jax as mtl
      >>> tx = optax.chain(mtl.dropgrad(rate=0.5, kind="binary"), mtl.sum())
      >>> update, _ = tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))
      >>> set(update.tolist()) <= {0.0, 2.0, 4.0}
      True
    """
    check_number("rate", rate, at_least=0, below=1)
    check_choice("kind", kind, ("gaussian", "binary"))
    check_key(key)

    def init(params: PyTree) -> DropGradState:
        reject_masked(params)
        return DropGradState(make_key(key))

    def update(
        task_grads: PyTree,
        state: DropGradState,
        params: PyTree | None = None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **unused: Any,
    ) -> tuple[PyTree, DropGradState]:
        reject_masked(task_grads)
        K = stacks.num_tasks(task_grads, params)
        kept = present_tasks(task_mask, K, task_names(losses)) & stacks.finite_tasks(task_grads)

        def noise(draw: Array, shape: tuple[int, ...]) -> Array:
            if kind == "binary":
                return (uniform(draw, shape, dtype) < 1 - rate) / jnp.asarray(1 - rate, dtype)
            return 1 + jnp.sqrt(jnp.asarray(rate / (1 - rate), dtype)) * jax.random.normal(draw, shape, dtype)

        def dropped(leaf: Array, factor: Array) -> Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return jnp.where(stacks.column(kept, leaf), (leaf * factor).astype(leaf.dtype), leaf)

        task_grads = jax.tree.map(jnp.asarray, task_grads)
        floating = [leaf for leaf in jax.tree.leaves(task_grads) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        dtype = jnp.result_type(jnp.float32, *floating)
        following, draw = draw_key(state.key)
        factors = draw_like(noise, draw, task_grads)
        return map_leaves(dropped, task_grads, factors), DropGradState(following)

    return optax.GradientTransformationExtraArgs(init, update)


ROW = Row(
    dropgrad,
    scale="the gradients', on average",
    state="a random key",
    papers=(
        Paper(
            "Regularizing Meta-Learning via Gradient Dropout",
            "Hung-Yu Tseng, Yi-Wen Chen, Yi-Hsuan Tsai, Sifei Liu, Yen-Yu Lin, Ming-Hsuan Yang",
            2020,
            arxiv="2004.05859",
        ),
    ),
    note="formulas from the official code",
    randomized=True,
)
