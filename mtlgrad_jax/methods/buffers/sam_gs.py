"""SAM-GS, similarity-aware momentum gradient surgery (Borsani et al., ECML-PKDD 2025, arXiv 2506.06130).

Not sharpness-aware. The defaults follow the official code (github ThomBors/samgs). Where the paper's Algorithm 1
differs, its version is an option, except that its printed update multiplies the equalised gradients by the gradients
once more.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_dtype, check_number
from mtlgrad_jax._core.control import map_leaves
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype, widened
from mtlgrad_jax._core.weights import Present, mean_of

_EPSILON = 1e-8  # added to squares of similarities, which have no scale


class SAMGSState(NamedTuple):
    """State of sam_gs."""

    momentum: PyTree  # leaves (K, *parameter shape)
    seen: Int[Array, " K"]  # steps in which each task was present
    dissimilarity: Float[Array, ""]  # running mean of (1 - similarity)^2
    step: Int[Array, ""]


def sam_gs(
    num_tasks: int,
    gamma: Number = 0.7,
    b1: Number = 0.9,
    b2: Number = 0.99,
    similarity: Literal["pairs", "paper_mean"] = "pairs",
    reduction: Literal["mean", "min"] = "mean",
    epsilon: Literal["code", "paper"] = "code",
    aligned: Literal["momentum", "sum"] = "momentum",
    buffer_dtype: DTypeLike | None = None,
) -> Method:
    r"""Equalise gradients of dissimilar length; scale similar ones by their momentum, coordinate by coordinate.

    .. math:: \psi_{ij} = \frac{2 n_i n_j}{n_i^2 + n_j^2}, \qquad
              h \leftarrow \beta_2 h + (1 - \beta_2) (1 - \Psi)^2 + \epsilon, \qquad
              m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i
    .. math:: d = \sum_i \frac{\bar n}{n_i} g_i \quad (\Psi < \gamma), \qquad
              d = \sum_i g_i \odot |\hat m_i| / \sqrt{\hat h} \quad (\text{else})

    with :math:`n_i` the norms, :math:`\bar n` their mean, :math:`\Psi` the mean of :math:`\psi`, hats for bias
    correction, and :math:`\epsilon` = 1e-8. The second form is quadratic in the gradients and up to a thousand times
    longer if the lengths are equal. As in the paper, follow it with clipping and Adam:

        optax.chain(mtl.sam_gs(K), optax.scale(K), optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    where the official code scales by K. The method neither uses angles nor removes conflicts. A zero gradient has
    similarity 0 to a nonzero gradient and 1 to another zero gradient.

    The state holds K times the parameters.

    Args:
      num_tasks: K.
      gamma: similarity :math:`\gamma` >= 0 below which gradients are equalised: 0 for never, above 1 for always. The
        official code has 0.7, and 0.1 on its toy problems; the paper's best value is 0.9.
      b1: decay :math:`\beta_1` of the momentum, in [0, 1).
      b2: decay :math:`\beta_2` of the dissimilarity, in [0, 1).
      similarity: :math:`\Psi` is the mean over pairs ("pairs", code), or over all entries including the diagonal of
        ones ("paper_mean"), which is 1/K + (1 - 1/K) times the former: the same gamma then equalises less often.
      reduction: compare gamma with the mean, or with the smallest over the pairs ("min", reinforcement learning).
      epsilon: added to h ("code"), or also to its root ("paper").
      aligned: what to do with gradients of similar length: scale them by momentum, or sum them if their pairwise
        products are positive on average ("sum": PAMGS, a follow-up; the order of its tests is a reconstruction).
      buffer_dtype: dtype of the K buffers; the parameters' for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.sam_gs(num_tasks=2)
      >>> update, _ = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 5.0]]), tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [3.0, 3.0]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_number("gamma", gamma, at_least=0)
    check_number("b1", b1, at_least=0, below=1)
    check_number("b2", b2, at_least=0, below=1)
    check_choice("similarity", similarity, ("pairs", "paper_mean"))
    check_choice("reduction", reduction, ("mean", "min"))
    check_choice("epsilon", epsilon, ("code", "paper"))
    check_choice("aligned", aligned, ("momentum", "sum"))
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> SAMGSState:
        zero = jnp.zeros((), accumulator_dtype())
        seen, step = (jnp.zeros(shape, jnp.int32) for shape in ((num_tasks,), ()))
        return SAMGSState(stacks.zeros(params, num_tasks, buffer_dtype), seen, zero, step)

    def rule(task_grads: PyTree, *, present: Present, state: SAMGSState) -> tuple[PyTree, SAMGSState]:
        norms = jnp.where(present, stacks.task_norms(task_grads), 0)
        among = present[:, None] & present[None, :]
        pairs = _similarity(norms)
        counted = among if similarity == "paper_mean" else jnp.triu(among, 1)
        alike = mean_of(pairs.ravel(), counted.ravel())
        alike = jnp.where(jnp.sum(present) > 1, alike, 1)
        compared = jnp.min(jnp.where(among, pairs, 1)) if reduction == "min" else alike

        rates = jnp.full((num_tasks,), b1, norms.dtype)
        momentum = stacks.mix(rates, state.momentum, 1 - rates, task_grads)
        seen, step = optax.safe_increment(state.seen), optax.safe_increment(state.step)
        dissimilarity = b2 * state.dissimilarity + (1 - b2) * (1 - alike) ** 2 + _EPSILON
        root = jnp.sqrt(dissimilarity / (1 - b2 ** step.astype(norms.dtype)))
        root = root + _EPSILON if epsilon == "paper" else root

        positive = norms > 0
        equal = jnp.where(positive, mean_of(norms, present) / jnp.where(positive, norms, 1), 0)
        scaled = jnp.where(present, 1 / ((1 - b1 ** seen.astype(norms.dtype)) * root), 0)
        branch = jnp.where(compared < gamma, 0, 1)
        if aligned == "sum":
            agreeing = jnp.sum(jnp.triu(stacks.gramian(task_grads, present), 1)) > 0
            branch = jnp.where((branch == 1) & agreeing, 2, branch)
        gradient = _combine(branch, task_grads, momentum, equal, scaled, present.astype(norms.dtype))
        return gradient, SAMGSState(momentum, seen, dissimilarity, step)

    return from_rule(rule, init, num_tasks=num_tasks, leaves_alike=True)


def _similarity(norms: Float[Array, " K"]) -> Float[Array, "K K"]:
    """Return 2 n_i n_j / (n_i^2 + n_j^2) from ratios, which neither overflow nor underflow; 1 for two zeros."""
    low, high = (pick(norms[:, None], norms[None, :]) for pick in (jnp.minimum, jnp.maximum))
    ratio = jnp.where(high > 0, low / jnp.where(high > 0, high, 1), 1)
    return 2 * ratio / (1 + ratio**2)


@jax.jit
def _combine(branch: Array, task_grads: PyTree, momentum: PyTree, equal: Array, scaled: Array, ones: Array) -> PyTree:
    """Return the weighted sum of the rows at equal length, of the rows times their momentum, or of the rows as is."""

    def by_momentum() -> PyTree:
        rows = map_leaves(lambda g, m: (g * jnp.abs(m)).astype(g.dtype), widened(task_grads), momentum)
        return stacks.combine(scaled, rows)

    weights = jnp.where(branch == 0, equal, ones)
    return lax.cond(branch == 1, by_momentum, lambda: widened(stacks.combine(weights, task_grads)))


ROW = Row(
    sam_gs,
    scale="the paper's, without the official code's factor K; quadratic in the gradients in the momentum branch",
    state="K gradients, a running dissimilarity",
    papers=(
        Paper(
            "Gradient Similarity Surgery in Multi-Task Deep Learning",
            "Thomas Borsani, Andrea Rosani, Giuseppe Nicosia, Giuseppe Di~Fatta",
            2025,
            booktitle="ECML-PKDD",
            arxiv="2506.06130",
        ),
    ),
    promises=frozenset({PERMUTATION}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the published formula; published values; formula from official code",
)
