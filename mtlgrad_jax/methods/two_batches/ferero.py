"""FERERO, preference-guided multi-objective learning (Chen et al. 2024, arXiv 2412.01773).

Formulas from the official code (lisha-chen/FERERO), which has two tasks only; any orthonormal basis of the complement
of the preference gives the same update, so none is needed here. Its MultiMNIST script steps the weights by 1e-5 with
c = 1/2, and starts lambda_f anew in every step; its toy script by 0.1 with c = 0.1, and does not normalise them. Here
lambda_f is kept.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_count, check_flag, check_number, check_numbers
from mtlgrad_jax._core.method import Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax._core.step import PREFERENCE
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present, of_tasks, on_simplex, share
from mtlgrad_jax.solvers import project_simplex


class FEREROState(NamedTuple):
    """State of ferero."""

    weights: Float[Array, " K"]  # lambda_f
    constraint: Float[Array, " K"]  # B_h^T lambda_h, the constraint's part of the weights


def ferero(
    num_tasks: int,
    preference: PyTree = None,
    learning_rate: Number = 0.1,
    strength: Number = 0.5,
    normalize: bool = True,
) -> Method:
    r"""Drive the losses towards a ray and descend along it, with weights learned from two independent batches.

    .. math:: \lambda_f \leftarrow \Pi_\Delta (\lambda_f - \gamma A \lambda), \qquad
              \nu \leftarrow P \bigl( \nu - \gamma (A \lambda - c \, l) \bigr), \qquad
              w = \frac{\lambda}{\|\lambda\|_1}, \quad \lambda = \lambda_f + \nu

    with :math:`P = I - r r^T / \|r\|^2`, so that :math:`P l = 0` if the losses are proportional to r; the paper writes
    :math:`\nu = B_h^T \lambda_h` with a basis :math:`B_h` of the complement of r. :math:`A \lambda` uses the last w in
    place of :math:`\lambda`, and :math:`A_{ij} = \langle g_i^{(1)}, g_j^{(2)} \rangle` is the update's argument
    `cross_gramian`; without it the Gramian is used, which is biased. A step uses the new weights; they may be negative.
    State of absent tasks does not change; those present share the rest of the total of 1 in :math:`\lambda_f`, with r
    and :math:`\nu` those of the tasks present, :math:`\nu` projected by their P.

    Args:
      num_tasks: K.
      preference: :math:`r` > 0, (K,) or a pytree under the tasks' names; 1 for None. An update's argument `preference`
        takes precedence. At the point found :math:`l \propto r`: the larger, the larger the loss; the official scripts
        take the complement of a preference for small losses, :math:`\sqrt{1 - p^2}`.
      learning_rate: :math:`\gamma` > 0 for the weights; not scale-free.
      strength: pull :math:`c` >= 0 towards the ray.
      normalize: whether the absolute weights sum to 1 (MultiMNIST script) or are :math:`\lambda` itself (toy script).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.ferero(num_tasks=2, preference=[1.0, 1.0])
      >>> grads, losses = jnp.eye(2), jnp.asarray([5.0, 1.0])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> update.tolist(), state.method.constraint.tolist()
      ([0.6, 0.4], [0.1, -0.1])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_numbers("preference", preference, optional=True, above=0)
    check_number("learning_rate", learning_rate, above=0)
    check_number("strength", strength, at_least=0)
    check_flag("normalize", normalize)
    fixed = preference

    def init(num_tasks: int) -> FEREROState:
        dtype = accumulator_dtype()
        return FEREROState(jnp.full((num_tasks,), 1 / num_tasks, dtype), jnp.zeros((num_tasks,), dtype))

    def kernel(
        *,
        cross_gramian: Float[Array, "K K"],
        losses: Losses,
        preference: Float[Array, " K"] | None,
        present: Present,
        state: FEREROState,
    ) -> tuple[Weights, FEREROState]:
        r = of_tasks("preference", fixed, present, 1.0) if preference is None else jnp.where(present, preference, 0)
        ray = r / jnp.maximum(jnp.max(r), jnp.finfo(r.dtype).tiny)
        ray = ray / jnp.maximum(jnp.linalg.norm(ray), 1)

        def off_ray(vector: Array) -> Array:
            kept = jnp.where(present, vector, 0)
            return kept - (ray @ kept) * ray

        def combined(weights: Array, constraint: Array) -> Array:
            total = weights + constraint
            size = jnp.sum(jnp.abs(total)) if normalize else 1
            return total / jnp.where(size > 0, size, 1)

        start, constraint = on_simplex(state.weights, present), off_ray(state.constraint)
        slope = cross_gramian @ combined(start, constraint)
        weights = project_simplex(start - learning_rate * slope, present)
        constraint = off_ray(constraint - learning_rate * (slope - strength * losses))
        return combined(weights, constraint), FEREROState(weights * share(state.weights, present), constraint)

    return from_kernel(
        kernel,
        init,
        arguments=(PREFERENCE._replace(above=0),),
        num_tasks=num_tasks,
        per_task={"preference": preference},
        mean_like=True,
    )


ROW = Row(
    ferero,
    scale="mean (absolute weights sum to 1)",
    state="2 K weights",
    papers=(
        Paper(
            "FERERO: A Flexible Framework for Preference-Guided Multi-Objective Learning",
            "Lisha Chen, A. F. M. Saif, Yanning Shen, Tianyi Chen",
            2024,
            booktitle="NeurIPS",
            arxiv="2412.01773",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({PERMUTATION, CONTINUOUS}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the official code's formula, with a basis",
)
