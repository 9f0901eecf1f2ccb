"""MoCo, multi-objective gradient correction (Fernando et al. 2023, arXiv 2210.12624).

The defaults are those of the authors' code (heshandevaka/Trade-Off-MOL). Their first code (heshandevaka/MoCo) has
decaying step sizes, no regularisation and twice the product; LibMTL has a softmax in place of the projection.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_dtype, check_number
from mtlgrad_jax._core.method import Losses, Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import POSITIVE_LOSSES
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, on_simplex, share, softmax
from mtlgrad_jax.solvers import project_simplex


class MoCoState(NamedTuple):
    """State of moco."""

    tracked: PyTree  # leaves (K, *parameter shape)
    weights: Float[Array, " K"]


def moco(
    num_tasks: int,
    beta: Number = 0.1,
    gamma: Number = 0.1,
    rho: Number = 0.1,
    projection: Literal["simplex", "softmax"] = "simplex",
    normalize: Literal["none", "l2", "loss", "loss+", "unit_loss"] = "none",
    buffer_dtype: DTypeLike | None = None,
) -> Method:
    r"""Learn the weights of the min-norm point from running averages of the gradients, so that noise biases them less.

    .. math:: y_i \leftarrow y_i - \beta (y_i - g_i), \qquad
              w \leftarrow \Pi_\Delta \bigl( w - \gamma (Y Y^\top w + \rho w) \bigr), \qquad d = \sum_i w_i y_i

    A step uses the new averages, which start at zero without bias correction, and the new weights. Weights of absent
    tasks do not change; those present share the rest of the total of 1.

    The state holds K times the parameters.

    Args:
      num_tasks: K.
      beta: step size :math:`\beta` of the averages, in (0, 1]. Their first code and LibMTL divide beta and gamma by the
        root of the step number: schedules, under `optax.inject_hyperparams`.
      gamma: step size :math:`\gamma` >= 0 of the weights; not scale-free.
      rho: regularisation :math:`\rho` >= 0 of the weights.
      projection: :math:`\Pi_\Delta` is the projection on the simplex, or LibMTL's "softmax", which with gradients of
        length 1 stays near equal weights.
      normalize: divide y by its norm ("l2"), the loss ("loss") or both ("loss+"), in d too (authors' code); or track
        gradients whose norm is the loss ("unit_loss", LibMTL). All but "l2" need positive losses.
      buffer_dtype: dtype of the K buffers; the parameters' for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.moco(num_tasks=2, beta=1.0, rho=0.0)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 2.0]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> state.method.weights.tolist(), update.tolist()
      ([0.575, 0.425], [0.575, 0.85])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("beta", beta, above=0, at_most=1)
    check_number("gamma", gamma, at_least=0)
    check_number("rho", rho, at_least=0)
    check_choice("projection", projection, ("simplex", "softmax"))
    check_choice("normalize", normalize, ("none", "l2", "loss", "loss+", "unit_loss"))
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> MoCoState:
        weights = jnp.full((num_tasks,), 1 / num_tasks, accumulator_dtype())
        return MoCoState(stacks.zeros(params, num_tasks, buffer_dtype), weights)

    def rule(
        task_grads: PyTree, *, present: Present, state: MoCoState, losses: Losses | float = 1.0
    ) -> tuple[PyTree, MoCoState]:
        rate = jnp.full((num_tasks,), beta, accumulator_dtype())
        scale = losses * _inverse(stacks.task_norms(task_grads), present) if normalize == "unit_loss" else 1
        tracked = stacks.mix(1 - rate, state.tracked, rate * scale, task_grads)
        gramian = stacks.gramian(jax.lax.stop_gradient(tracked), present)
        inverse = jnp.ones_like(rate)
        if normalize in ("l2", "loss+"):
            inverse = inverse * _inverse(jnp.sqrt(jnp.diagonal(gramian)), present)
        if normalize in ("loss", "loss+"):
            inverse = inverse / losses

        start = on_simplex(state.weights, present)
        product = inverse * (gramian @ (inverse * start))
        point = start - gamma * (product + rho * start)
        weights = project_simplex(point, present) if projection == "simplex" else softmax(point, present)
        kept = MoCoState(tracked, weights * share(state.weights, present))
        return stacks.combine(jnp.where(present, weights * inverse, 0), tracked), kept

    by_loss = normalize in ("loss", "loss+", "unit_loss")
    return from_rule(
        rule, init, arguments=(POSITIVE_LOSSES,) if by_loss else (), num_tasks=num_tasks, leaves_alike=True
    )


def _inverse(norms: Float[Array, " K"], among: Present) -> Float[Array, " K"]:
    positive = among & (norms > 0)
    return jnp.where(positive, 1 / jnp.where(positive, norms, 1), 0)


ROW = Row(
    moco,
    scale="mean (weights sum to 1)",
    state="K gradients, K weights",
    papers=(
        Paper(
            "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
            "Heshan Fernando, Han Shen, Miao Liu, Subhajit Chaudhury, Keerthiram Murugesan, Tianyi Chen",
            2023,
            booktitle="ICLR",
            arxiv="2210.12624",
        ),
    ),
    promises=frozenset({PERMUTATION, CONTINUOUS}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; formulas from official code and LibMTL",
)
