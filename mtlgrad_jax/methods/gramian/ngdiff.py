"""NGDiff, normalised gradient difference (Jin, Bu et al. 2025, arXiv 2410.22086), for any number of tasks.

The formula follows the paper's abstract and independent implementations.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtlgrad_jax._core.checks import check_numbers
from mtlgrad_jax._core.method import Gramian, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import SCALE_FREE, Row
from mtlgrad_jax._core.tasks import task_vector
from mtlgrad_jax.solvers import inverse_sqrt


def ngdiff(signs: PyTree) -> Method:
    r"""Descend on the tasks to retain and ascend on those to forget, all gradients at unit length.

    .. math:: d = \sum_i s_i \frac{g_i}{\|g_i\|}

    With one task of each kind, both change as intended to first order. Tasks with zero gradient take no part.

    Args:
      signs: :math:`s`, +1 to retain and -1 to forget, (K,) or a pytree under the tasks' names.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.ngdiff({"forget": -1, "retain": 1})
      >>> grads = jnp.asarray([[0.0, 2.0], [3.0, 4.0]])  # rows in sorted order: forget, retain
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [0.6, -0.2]
    """
    check_numbers("signs", signs)
    for sign in jax.tree.leaves(signs):
        if not isinstance(sign, jax.core.Tracer) and not np.all(np.abs(sign) == 1):
            raise ValueError(f"`signs` must be +1 or -1 for every task, got signs={signs!r}.")

    def kernel(*, gramian: Gramian) -> Weights:
        return jnp.sign(task_vector("signs", signs)) * inverse_sqrt(jnp.diagonal(gramian))

    return from_kernel(kernel, per_task={"signs": signs})


ROW = Row(
    ngdiff,
    scale="unit (sum of unit gradients)",
    papers=(
        Paper(
            "Unlearning as multi-task optimization: A normalized gradient difference approach with an adaptive "
            "learning rate",
            "Xiaomeng Jin, Zhiqi Bu, Bhanukiran Vinzamuri, Anil Ramakrishna, Kai-Wei Chang, Volkan Cevher, Mingyi Hong",
            2025,
            booktitle="NAACL",
            arxiv="2410.22086",
        ),
    ),
    note="formula from secondary sources",
    promises=frozenset({SCALE_FREE}),
    kwargs=lambda num_tasks: {"signs": [1.0] + [-1.0] * (num_tasks - 1)},
)
