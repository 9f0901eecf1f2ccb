"""PMTL, Pareto multi-task learning (Lin et al. 2019, arXiv 1912.12854).

A step solves the paper's problem (14), an initial step its problem (9). A constraint is active where it is violated, as
in the official synthetic example (Xi-L/ParetoMTL); in the paper, also within a threshold of its boundary. The official
MultiMNIST script also multiplies the weights by K / sum |w|, and first takes at most two epochs of initial steps
(`initial_steps` here).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from mtlgrad_jax._core.checks import check_count, check_numbers
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, NON_CONFLICTING, Row
from mtlgrad_jax._core.weights import Present, of_tasks, unit
from mtlgrad_jax.solvers import min_norm

_ACTIVE = 4  # in eps: the least cosine by which another vector must be nearer


class PMTLState(NamedTuple):
    """State of pmtl."""

    initial: Int[Array, ""]  # initial steps left


def pmtl(preferences: Sequence[PyTree] | np.ndarray | Array, index: int | Array, initial_steps: int = 0) -> Method:
    r"""Find a Pareto-optimal point in one of several sectors of the losses, that of a reference vector.

    .. math:: w = B^T \arg\min_{v \in \Delta} \bigl\| G^T B^T v \bigr\|, \qquad
              B = \begin{pmatrix} I \\ (u_j - u_k)^T, \; j \in J \end{pmatrix}, \qquad
              J = \{ j : \langle u_j - u_k, l \rangle > 0 \}

    with the reference vectors :math:`u_j` at unit length: the losses l are in the sector of :math:`u_k`, the nearest
    vector by angle, if and only if J is empty. No task ascends, nor does a constraint in J. At any Pareto-optimal point
    d is zero, also outside of the sector, so it must be entered before: by initial steps, in which B has only the rows
    of J and tasks may ascend. They end with the first step in which J is empty.

    The vectors' entries for absent tasks have no effect: those for the tasks present are brought to unit length. A
    vector without any such entry takes no part; if it is :math:`u_k`, J is empty.

    Args:
      preferences: the reference vectors, at least one, each >= 0 and not all 0, (K,) or a pytree under the tasks'
        names. In the sector found, the losses are about proportional to the vector: the larger, the larger the loss.
      index: :math:`k`, the number of the vector of this run, from 0; may be traced. An update's argument `preference`
        replaces this vector.
      initial_steps: largest number of initial steps; at most two epochs in the official MultiMNIST script.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.pmtl(preferences=[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], index=1)
      >>> grads, losses = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.asarray([1.0, 0.1])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> update.tolist()
      [0.2118, 0.0471]
    """
    if not isinstance(preferences, Sequence | np.ndarray | jax.Array) or not len(preferences):
        raise ValueError(f"`preferences` must hold at least one vector, got preferences={preferences!r}.")
    for vector in preferences:
        check_numbers("preferences", vector, nonzero=True, at_least=0)
    _check_index(index, len(preferences))
    check_count("initial_steps", initial_steps, at_least=0)

    def init(num_tasks: int | None) -> PMTLState:
        return PMTLState(jnp.asarray(initial_steps, jnp.int32))

    def kernel(
        *,
        gramian: Gramian,
        losses: Losses,
        preference: Float[Array, " K"] | None,
        present: Present,
        state: PMTLState,
    ) -> tuple[Weights, PMTLState]:
        u = unit(jnp.stack([of_tasks("preferences", vector, present, 0.0) for vector in preferences]))
        own = u[index] if preference is None else unit(jnp.where(present, preference, 0)[None])[0]
        known = jnp.any(u > 0, axis=1) & jnp.any(own > 0) & (jnp.arange(len(u)) != index)
        apart = jnp.where(known[:, None], u - own[None], 0)
        direction = unit(jnp.where(present, losses, 0)[None])[0]
        active = known & (apart @ direction > _ACTIVE * jnp.finfo(u.dtype).eps)
        initial = (state.initial > 0) & jnp.any(active)
        B = jnp.concatenate([jnp.eye(len(present), dtype=u.dtype), apart])
        solved = min_norm(_between(B, gramian), jnp.concatenate([present & ~initial, active]))
        left = jnp.where(initial, state.initial - 1, 0)
        return solved._replace(value=solved.value @ B), PMTLState(left)

    named = {f"preferences[{j}]": vector for j, vector in enumerate(preferences)}
    return from_kernel(kernel, init, per_task=named, mean_like=True)


def _check_index(index: int | Array, count: int) -> None:
    """Raise unless `index` is an integer below the number of vectors; a traced one is not compared."""
    if isinstance(index, jax.Array):
        if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"`index` must be one integer, got shape {index.shape} and dtype {index.dtype}.")
    else:
        check_count("index", index, at_least=0)
    if not isinstance(index, jax.core.Tracer) and not 0 <= index < count:
        raise ValueError(f"`index` must be from 0 to {count - 1}, the number of a vector, got index={index}.")


def _between(B: Float[Array, "R K"], gramian: Gramian) -> Float[Array, "R R"]:
    """Return B M B^T, symmetric in spite of rounding."""
    product = jnp.einsum("ik,kl,jl->ij", B, gramian, B, precision="highest")
    return (product + product.T) / 2


def _smallest(num_tasks: int) -> dict[str, Any]:
    """Return the diagonal, for this run, and a vector near every axis but the first."""
    near = tuple([1.0 if i == j else 0.25 for i in range(num_tasks)] for j in range(1, num_tasks))
    return {"preferences": ([1.0] * num_tasks, *near), "index": 0}


ROW = Row(
    pmtl,
    scale="min-norm point of gradients and active constraints",
    state="a count",
    papers=(
        Paper(
            "Pareto Multi-Task Learning",
            "Xi Lin, Hui-Ling Zhen, Zhenhua Li, Qingfu Zhang, Sam Kwong",
            2019,
            booktitle="NeurIPS",
            arxiv="1912.12854",
        ),
    ),
    promises=frozenset({NON_CONFLICTING, DESCENT, HOMOGENEOUS, CONTINUOUS}),
    kwargs=_smallest,
    checked="support enumeration and scipy's NNLS; formula from official code",
)
