"""GradVac, gradient vaccine (Wang et al. 2021, arXiv 2010.05874).

The corrections act on coefficients, so only the Gramian is needed. The paper's moving average has the rate 0.01;
TorchJD, LibMTL and Samsung's code take 0.5. Samsung's code also updates it only after corrections, so that targets
never rise above zero. The paper sets targets per group of parameters; `grouped` does that.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_number
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.random import Key, Seed, check_key, draw_key, draw_orders, make_key
from mtlgrad_jax._core.row import HOMOGENEOUS, LINEAR, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax.methods.gramian.pcgrad import UNROLLED


class GradVacState(NamedTuple):
    """State of gradvac."""

    target: Float[Array, "K K"]  # target cosine of the corrected row i with row j
    key: Key  # for the next step's orders


def gradvac(
    num_tasks: int,
    beta: Number = 0.01,
    target: Number | None = None,
    update: Literal["always", "on_conflict"] = "always",
    order: Literal["random", "fixed"] = "random",
    key: Seed = 0,
) -> Method:
    r"""Turn every gradient, one after the other, towards those to which it is less similar than on average.

    .. math:: \hat g_i \leftarrow \hat g_i + \frac{\|\hat g_i\| \bigl(\hat\phi_{ij} \sqrt{1 - \phi^2} - \phi
              \sqrt{1 - \hat\phi_{ij}^2}\bigr)}{\|g_j\| \sqrt{1 - \hat\phi_{ij}^2}} \, g_j
              \quad \text{where} \quad \phi = \cos(\hat g_i, g_j) < \hat\phi_{ij}, \qquad d = \sum_i \hat g_i

    followed by :math:`\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi`. Targets begin at 0, where this
    is PCGrad.

    Args:
      num_tasks: K.
      beta: rate :math:`\beta` in [0, 1] at which the targets follow the cosines.
      target: a fixed :math:`\hat\phi` in (-1, 1) for all pairs, instead of the averages.
      update: when to update the targets: after every visit of a pair (TorchJD, LibMTL) or only after a correction
        (Samsung's code).
      order: order in which the other tasks are visited: random for every task and step, or "fixed", 0 to K-1.
      key: seed or key; the same on every process. Under vmap over runs, make the method inside, `gradvac(..., key=key)`
        with a key for each run: `vmap(tx.init)` gives all runs the same key.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.gradvac(num_tasks=2)
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> gradient, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> gradient.tolist()
      [0.5848, 3.8012, 3.8012]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("beta", beta, at_least=0, at_most=1)
    if target is not None:
        check_number("target", target, above=-1, below=1)
    check_choice("update", update, ("always", "on_conflict"))
    check_choice("order", order, ("random", "fixed"))
    check_key(key)

    def init(num_tasks: int) -> GradVacState:
        targets = jnp.full((num_tasks, num_tasks), 0.0 if target is None else target, accumulator_dtype())
        return GradVacState(targets, make_key(key))

    def kernel(*, gramian: Gramian, state: GradVacState) -> tuple[Weights, GradVacState]:
        following, draw = draw_key(state.key)
        orders = draw_orders(draw, order, len(gramian))
        goals = state.target if target is None else jnp.full_like(state.target, target)
        coefficients, cosines, defined, corrected = _vaccinate(gramian, jnp.arange(len(gramian)), orders, goals)
        seen = defined if update == "always" else corrected
        moved = (1 - beta) * state.target + beta * cosines
        targets = jnp.where(seen & (target is None), moved, state.target)
        return coefficients.sum(axis=0), GradVacState(targets, following)

    return from_kernel(kernel, init, num_tasks=num_tasks)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0, 0))
def _vaccinate(
    gramian: Gramian, i: Array, order: Array, target: Float[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, " K"], Bool[Array, " K"], Bool[Array, " K"]]:
    """Return the coefficients of the corrected row i, its cosines on the way, which are defined, which changed it."""
    K, eps, sizes = len(order), jnp.finfo(gramian.dtype).eps, jnp.sqrt(jnp.diagonal(gramian))

    def visit(step: Array | int, carry: tuple) -> tuple:
        coefficients, products, *seen = carry  # products of the corrected row with all rows
        j = order[step]
        square, size, goal = coefficients @ products, sizes[j], jnp.clip(target[j], -1 + eps, 1 - eps)
        rounding = 4 * K * eps * (jnp.abs(coefficients) @ sizes) ** 2
        norm = jnp.sqrt(jnp.maximum(square, 0))
        defined = (square > rounding) & (size > 0) & (j != i)
        safe_norm, safe_size = jnp.where(defined, norm, 1), jnp.where(defined, size, 1)
        cosine = jnp.clip(products[j] / safe_norm / safe_size, -1, 1)
        below = defined & (cosine < goal)
        tangent = goal / jnp.sqrt((1 - goal) * (1 + goal))
        pull = safe_norm / safe_size * (tangent * jnp.sqrt((1 - cosine) * (1 + cosine)) - cosine)
        change, here = jnp.where(below, pull, 0), jnp.arange(K) == j  # selecting takes fewer launches than scattering
        seen = [jnp.where(here, new, old) for old, new in zip(seen, (cosine, defined, below), strict=True)]
        return coefficients + jnp.where(here, change, 0), products + change * gramian[j], *seen

    none, nothing = jnp.zeros(K, bool), jnp.zeros(K, gramian.dtype)
    start = nothing.at[i].set(1), gramian[i], nothing, none, none
    coefficients, _, *seen = jax.lax.fori_loop(0, K, visit, start, unroll=K <= UNROLLED)
    return coefficients, *seen


ROW = Row(
    gradvac,
    scale="sum",
    state="K×K target cosines and a random key",
    papers=(
        Paper(
            "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models",
            "Zirui Wang, Yulia Tsvetkov, Orhan Firat, Yuan Cao",
            2021,
            booktitle="ICLR",
            arxiv="2010.05874",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION, LINEAR}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; TorchJD",
    randomized=True,
)
