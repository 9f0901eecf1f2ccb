"""PIVRG, performance-informed variance reduction of gradients (Qin et al., CVPR 2025).

Formulas from the official code (jianke0604/MTLlib), which solves the equation with scipy, multiplies the result by K
and clips it to norm 1; this does none of these.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_number, check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import DESCENT, NON_CONFLICTING, Row
from mtlgrad_jax._core.step import SCORES
from mtlgrad_jax._core.tasks import task_vector
from mtlgrad_jax._core.weights import Present, over_mean
from mtlgrad_jax.solvers import alpha_fair


def pivrg(scores: PyTree = None, bound: Number = 2.0, min_temperature: Number = 10.0) -> Method:
    r"""Share the decrease of the losses fairly, with priority for tasks far behind their single-task baselines.

    .. math:: d = \sum_i w_i g_i, \qquad \langle g_i, d \rangle = \sqrt{p_i / w_i}, \quad w_i > 0, \qquad
              p = K \operatorname{softmax}(s / T), \qquad T = \max\Bigl(\frac{\max s - \min s}{\log b}, T_0\Bigr)

    With equal scores this is `fairgrad` at alpha = 2. Scores are measured from time to time, in the official code after
    every epoch: the mean relative drop of a task's metrics against a model trained on that task alone, in percent,
    positive if the task is worse. They are given at construction or as the update's argument `scores`, which takes
    precedence. Only tasks present count in K, the softmax and T.

    Every task descends. Tasks with zero gradient take no part. At Pareto-stationary points the equation has no
    solution; the weights stay finite and d small, see `mtlgrad_jax.solvers`. The official code multiplies d by K.

    Args:
      scores: :math:`s`, (K,) or a pytree under the tasks' names; if None, every update needs `scores`.
      bound: largest ratio :math:`b` > 1 of two priorities.
      min_temperature: least temperature :math:`T_0` > 0, in the units of the scores: priorities differ by less than the
        bound if the scores differ by less than :math:`T_0 \log b`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.pivrg()
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), scores=jnp.asarray([-5.0, 15.0]))
      >>> (update**3).tolist()  # the priorities
      [0.6667, 1.3333]
    """
    check_numbers("scores", scores, optional=True)
    check_number("bound", bound, above=1)
    check_number("min_temperature", min_temperature, above=0)
    fixed = scores

    def kernel(*, gramian: Gramian, scores: Float[Array, " K"] | None, present: Present) -> Weights:
        given = task_vector("scores", fixed).astype(gramian.dtype) if scores is None else scores
        ahead = jnp.where(present, jnp.max(given, where=present, initial=-jnp.inf) - given, 0)
        temperature = jnp.maximum(jnp.max(ahead) / jnp.log(bound), min_temperature)
        return alpha_fair(gramian, 2.0, over_mean(jnp.exp(-ahead / temperature), present))

    argument = SCORES if fixed is None else SCORES._replace(required=False)
    return from_kernel(kernel, arguments=(argument,), per_task={"scores": fixed})


ROW = Row(
    pivrg,
    scale="as solved",
    papers=(
        Paper(
            "Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction",
            "Xiaohan Qin, Xiaoxing Wang, Junchi Yan",
            2025,
            booktitle="CVPR",
        ),
    ),
    note="formulas from the official code, not compared with the paper",
    promises=frozenset({NON_CONFLICTING, DESCENT}),
    kwargs=lambda num_tasks: {"scores": [10.0 * i for i in range(num_tasks)]},
    checked="an independent solve of the equation in float64; formula from official code",
)
