"""Weights from the traces of neural tangent kernels (Wang, Yu & Perdikaris 2020, arXiv 2007.14527).

Follows the paper's Algorithm 1, as the official code does (PredictiveIntelligenceLab/PINNsNTK). `scale="mean"` follows
jaxpi by the same authors.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import check_choice, check_numbers
from mtlgrad_jax._core.method import Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import CONTINUOUS, HOMOGENEOUS, LINEAR, Row
from mtlgrad_jax._core.weights import Present, of_tasks, ratios


def ntk(traces: PyTree, scale: Literal["sum", "mean"] = "sum") -> Method:
    r"""Weight every loss by its inverse rate of convergence, the trace of its residuals' neural tangent kernel.

    .. math:: w_i = \frac{S}{t_i}, \qquad t_i = \operatorname{tr} J_i J_i^\top, \qquad S = \sum_j t_j

    with :math:`J_i` the Jacobian of task i's residuals. `ntk_traces` computes the traces. They change with the
    parameters, so make the method inside the compiled step; the state may come from a method made outside. A function
    is called only where the weights are needed: inside `update_every`, only in the steps that compute them anew. Tasks
    with trace zero have weight zero.

    Args:
      traces: :math:`t` >= 0, (K,) or a pytree under the tasks' names; or a function without arguments that returns it.
      scale: :math:`S`: the sum of the traces ("sum", paper) or their mean ("mean", jaxpi).

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> residual_fns = {"boundary": lambda w, x: w[0] * x, "equation": lambda w, x: w[1] * x**2}
      >>> points = {"boundary": jnp.asarray([1.0, 1.0]), "equation": jnp.asarray([2.0])}
      >>> w = jnp.asarray([1.0, 1.0])
      >>> tx = mtl.ntk(lambda: mtl.ntk_traces(residual_fns, w, points), scale="mean")  # traces 1 and 16
      >>> losses = {"boundary": 1.0, "equation": 16.0}
      >>> update, _ = tx.update(jnp.asarray([[2.0, 0.0], [0.0, 32.0]]), tx.init(w), losses=losses)
      >>> update.tolist()
      [17.0, 17.0]
    """
    if not callable(traces):
        check_numbers("traces", traces, at_least=0)
    check_choice("scale", scale, ("sum", "mean"))

    def kernel(*, present: Present) -> Weights:
        own = of_tasks("traces", traces() if callable(traces) else traces, present, 0.0)
        some = own != 0
        safe = jnp.where(some, jax.lax.stop_gradient(own), 1)
        inverse = jnp.where(some, ratios(jnp.ones_like(safe), safe, some), 0)
        total = jnp.sum(1 / inverse, where=some)
        if scale == "mean":
            total = total / jnp.maximum(jnp.sum(present), 1)
        return total * inverse

    return from_kernel(kernel, per_task={"traces": traces})


ROW = Row(
    ntk,
    scale="K times the sum for equal traces",
    papers=(
        Paper(
            "When and why PINNs fail to train: A neural tangent kernel perspective",
            "Sifan Wang, Xinling Yu, Paris Perdikaris",
            2022,
            journal="Journal of Computational Physics",
            arxiv="2007.14527",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, CONTINUOUS, LINEAR}),
    kwargs=lambda num_tasks: {"traces": [1.0 + i for i in range(num_tasks)]},
)
