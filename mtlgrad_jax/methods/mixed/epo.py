"""EPO, exact Pareto optimal search (Mahapatra & Rajan 2020).

Follows the paper's program (24) and the official code (dbmptr/EPOSearch), which differ in the last constraint of a
descending step: it is the code's, and `relaxed` leaves it out as the paper does. The code's training loops also
multiply the result by K, and its toy experiments the step by 10 max(mu, 0.1); this does neither. Nearly equal relative
losses count as equal here, in the code only exactly equal ones.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._core.checks import Number, check_flag, check_number, check_numbers
from mtlgrad_jax._core.method import Gramian, Losses, Method, Weights, from_kernel
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, PERMUTATION, Row
from mtlgrad_jax._core.step import POSITIVE_LOSSES, PREFERENCE
from mtlgrad_jax._core.weights import Present, of_tasks, on_simplex
from mtlgrad_jax.solvers import cosines, linear_program, shift
from mtlgrad_jax.solvers._solution import INFEASIBLE

_TIE = 4  # in eps


def epo(preference: PyTree = None, tolerance: Number = 1e-4, relaxed: bool = False) -> Method:
    r"""Find the Pareto-optimal point at which the losses are inversely proportional to a preference.

    With the relative losses :math:`\hat l_i = r_i l_i / \sum_j r_j l_j`, their non-uniformity
    :math:`\mu = \sum_i \hat l_i \log (K \hat l_i)`, :math:`a_i = r_i (\log (K \hat l_i) - \mu)` and
    :math:`c = M a`, as long as :math:`\mu > \epsilon` a step balances the losses,

    .. math:: \max_{w \in \Delta} w^T c \quad \text{s.t.} \quad (M w)_j \ge \begin{cases} 0 & j \in \arg\max_i r_i l_i
              \\ -\infty & c_j > 0 \\ c_j & \text{otherwise} \end{cases}

    or :math:`M w \ge 0` if no :math:`c_j` is positive; then a step descends on all tasks and keeps the balance,

    .. math:: \max_{w \in \Delta} 1^T M w \quad \text{s.t.} \quad M w \ge 0, \quad w^T c \ge \min(0, \max_j c_j)

    Both linear programs are solved exactly. If the second one is infeasible, w is :math:`r / \sum_j r_j`, as in the
    official code, and this is counted. Losses must be positive; a step with a loss <= 0 is skipped and counted. The
    losses and preferences of absent tasks have no effect: those present are balanced among themselves.

    Args:
      preference: :math:`r` > 0, (K,) or a pytree under the tasks' names; 1 for None. An update's argument `preference`
        takes precedence. At the point found :math:`l_i \propto 1/r_i`: the larger, the smaller the loss. Only ratios
        determine that point; a longer r loosens the constraint on tasks that may ascend, :math:`c_j`.
      tolerance: :math:`\epsilon` >= 0.
      relaxed: whether a step that descends on all tasks may lose the balance: without the last constraint.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.epo(preference=[1.0, 2.0])
      >>> grads, losses = jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), jnp.asarray([1.0, 1.0])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> update.tolist()
      [0.0, 3.0]
    """
    check_numbers("preference", preference, optional=True, above=0)
    check_number("tolerance", tolerance, at_least=0)
    check_flag("relaxed", relaxed)
    fixed = preference

    def kernel(*, gramian: Gramian, losses: Losses, preference: Float[Array, " K"] | None, present: Present) -> Weights:
        r = of_tasks("preference", fixed, present, 1.0) if preference is None else preference
        C, inverse = cosines(gramian)
        norms = jnp.where(inverse > 0, jnp.sqrt(jnp.diagonal(gramian)), 0)
        smallest = jnp.min(norms, where=norms > 0, initial=jnp.inf)
        smallest, largest = (jnp.where(jnp.any(norms > 0), size, 1) for size in (smallest, jnp.max(norms)))
        unit = jnp.where(norms > 0, smallest / jnp.where(norms > 0, norms, 1), 1)  # w = unit v, G^T w = sum v_i u_i
        spread = largest / smallest

        a, nonuniformity, worst = _adjustments(losses, r, present)
        pull = C @ (a * norms / largest)  # c_j / (n_j largest)
        noise = shift(C) * (jnp.abs(C) @ jnp.abs(a * norms / largest))
        rising = pull > noise
        balance = jnp.where(worst | ~jnp.any(rising), 0, jnp.where(rising, -jnp.inf, spread * jnp.minimum(pull, 0)))
        gain = jnp.max(pull / unit, where=present, initial=-jnp.inf)
        keeping = -jnp.inf if relaxed else jnp.minimum(gain, 0)
        balancing = nonuniformity > tolerance
        solved = linear_program(
            jnp.where(balancing, pull, C @ (norms / largest)),
            jnp.concatenate([C + shift(C) * jnp.diag(jnp.diagonal(C)), pull[None]]),
            jnp.append(jnp.where(balancing, balance, 0), jnp.where(balancing, -jnp.inf, keeping)),
            unit,
            present,
        )
        weights = jnp.where(solved.result == INFEASIBLE, on_simplex(r, present), solved.value * unit)
        return solved._replace(value=weights)

    arguments = (POSITIVE_LOSSES, PREFERENCE._replace(above=0))
    return from_kernel(kernel, arguments=arguments, per_task={"preference": preference}, mean_like=True)


def _adjustments(
    losses: Losses, r: Float[Array, " K"], present: Present
) -> tuple[Float[Array, " K"], Float[Array, ""], Bool[Array, " K"]]:
    """Return a, the non-uniformity and which tasks have the largest relative loss; in logarithms, to be finite."""
    log_relative = jnp.where(present, jnp.log(losses) + jnp.log(jnp.where(present, r, 1)), -jnp.inf)
    largest = jnp.max(log_relative, initial=jnp.finfo(losses.dtype).min)
    share = jnp.where(present, jnp.exp(log_relative - largest), 0)
    total = jnp.maximum(jnp.sum(share), 1)
    excess = jnp.where(present, log_relative - largest - jnp.log(total / jnp.maximum(jnp.sum(present), 1)), 0)
    nonuniformity = jnp.sum(share / total * excess)
    worst = present & (share >= 1 - _TIE * jnp.finfo(losses.dtype).eps)
    return jnp.where(present, r * (excess - nonuniformity), 0), nonuniformity, worst


ROW = Row(
    epo,
    scale="mean (weights sum to 1)",
    papers=(
        Paper(
            "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto Optimization",
            "Debabrata Mahapatra, Vaibhav Rajan",
            2020,
            booktitle="ICML",
        ),
    ),
    promises=frozenset({HOMOGENEOUS, PERMUTATION}),
    checked="vertex enumeration and scipy's linear programs; duality; formula from official code",
)
