"""IMTL, impartial learning (Liu et al. 2021, ICLR): IMTL-L scales the losses, IMTL-G combines their gradients."""

from typing import Literal

import optax

from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_number
from mtlgrad_jax._core.learned import check_optimizer, learn
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row, num_tasks_only
from mtlgrad_jax.methods.gramian.imtl_g import ROW as IMTL_G
from mtlgrad_jax.methods.gramian.imtl_g import impartial_weights
from mtlgrad_jax.methods.losses.imtl_l import IMTLLState, scales


def imtl(
    num_tasks: int,
    sign: Literal["paper", "descent"] = "paper",
    optimizer: optax.GradientTransformation | None = None,
    init: Number = 0.0,
) -> Method:
    r"""Apply `imtl_g` to the gradients of the losses that `imtl_l` has scaled.

    .. math:: d = \sum_i \alpha_i e^{s_i} g_i, \qquad \langle d, g_i / \|g_i\| \rangle \text{ equal for all } i, \qquad
              \sum_i \alpha_i = 1, \qquad w_i = \alpha_i e^{s_i}

    The direction is that of `imtl_g`, which does not depend on the scales; only the length of the update and the
    gradients of the heads do.

    Args:
      num_tasks: K.
      sign: as in `imtl_g`.
      optimizer: optimizer of s, one copy per task; `optax.adam(0.025)` for None.
      init: initial :math:`s_i`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.imtl(num_tasks=2)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.asarray([0.3, 2.0]))
      >>> update.tolist()
      [0.75, 0.75]
    """
    check_count("num_tasks", num_tasks, at_least=1)
    check_choice("sign", sign, ("paper", "descent"))
    check_number("init", init)
    check_optimizer(optimizer)
    inner = optax.adam(0.025) if optimizer is None else optimizer

    def start(num_tasks: int) -> IMTLLState:
        return IMTLLState(learn(num_tasks, init, inner))

    def kernel(*, gramian: Gramian, losses: Losses, state: IMTLLState) -> tuple[Weights, IMTLLState]:
        scale, following = scales(losses, state, inner)
        return impartial_weights(gramian, sign, scale), following

    return from_kernel(kernel, start, num_tasks=num_tasks, mean_like=True)


ROW = Row(
    imtl,
    scale="weights of the scaled losses sum to 1",
    state="K log-scales and their optimizer's state",
    papers=IMTL_G.papers,
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    kwargs=num_tasks_only,
)
