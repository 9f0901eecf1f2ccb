"""PCGrad, projecting conflicting gradients (Yu et al. 2020, arXiv 2001.06782).

Projections act on coefficients, so only the Gramian is needed. Unlike in LibMTL, no gradient is projected on itself.
Unlike in the official code, where the shuffle has no effect, every task draws its own order.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtlgrad_jax._core.checks import check_choice
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, draw_orders, make_key
from mtlgrad_jax._core.row import HOMOGENEOUS, LINEAR, PERMUTATION, Row
from mtlgrad_jax._core.weights import Present

UNROLLED = 8  # tasks up to which the visits are one program: a GPU then launches fewer kernels


class PCGradState(NamedTuple):
    """State of pcgrad."""

    key: Key  # for the next step's orders


def pcgrad(
    reduction: Literal["sum", "mean"] = "sum", order: Literal["random", "fixed"] = "random", key: Seed = 0
) -> Method:
    r"""Project every gradient, one after the other, onto the normal planes of those it conflicts with.

    .. math:: \hat g_i \leftarrow \hat g_i - \frac{\min(\langle \hat g_i, g_j \rangle, 0)}{\|g_j\|^2} g_j
              \quad (j \ne i), \qquad d = \sum_i \hat g_i

    Args:
      reduction: "sum" (official code, LibMTL, TorchJD) or "mean" (how other papers describe it).
      order: order in which the other tasks are visited: random for every task and step (paper) or "fixed", 0 to K-1.
      key: seed or key; the same on every process. Under vmap over runs, make the method inside, `pcgrad(..., key=key)`,
        with a key for each run: `vmap(tx.init)` gives all runs the same key.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.pcgrad()
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist()
      [0.5848, 3.8012, 3.8012]
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    check_choice("order", order, ("random", "fixed"))
    check_key(key)

    def kernel(*, gramian: Gramian, present: Present, state: PCGradState) -> tuple[Weights, PCGradState]:
        following, draw = draw_key(state.key)
        weights = _projections(gramian, draw_orders(draw, order, len(gramian))).sum(axis=0)
        weights = weights / jnp.maximum(jnp.sum(present), 1) if reduction == "mean" else weights
        return weights, PCGradState(following)

    return from_kernel(kernel, lambda num_tasks: PCGradState(make_key(key)))


@jax.jit
def _projections(gramian: Gramian, orders: Int[Array, "K K"]) -> Float[Array, "K K"]:
    """Return the coefficients of every projected gradient; gradient i visits the tasks in the order of row i."""
    tasks = jnp.arange(len(orders))

    def project(i: Array, order: Array) -> Array:
        def visit(step: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            coefficients, products = carry  # products of the projected gradient with all gradients
            j = order[step]
            inner, square = products[j], gramian[j, j]
            conflict = (inner < 0) & (j != i) & (square > 0)
            change = -jnp.where(conflict, inner / jnp.where(square > 0, square, 1), 0)
            return coefficients + jnp.where(tasks == j, change, 0), products + change * gramian[j]

        own = jnp.zeros(len(order), gramian.dtype).at[i].set(1)
        return jax.lax.fori_loop(0, len(order), visit, (own, gramian[i]), unroll=len(order) <= UNROLLED)[0]

    return jax.vmap(project)(tasks, orders)


ROW = Row(
    pcgrad,
    scale="sum (K times the mean if nothing conflicts)",
    state="a random key",
    papers=(
        Paper(
            "Gradient Surgery for Multi-Task Learning",
            "Tianhe Yu, Saurabh Kumar, Abhishek Gupta, Sergey Levine, Karol Hausman, Chelsea Finn",
            2020,
            booktitle="NeurIPS",
            arxiv="2001.06782",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
    checked="numpy float64 of the published formula over all orders; published values; formula from official code",
    randomized=True,
)
