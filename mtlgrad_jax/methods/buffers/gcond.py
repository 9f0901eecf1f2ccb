"""GCond, the gradient conductor (Alves Limarenko & Studenikina 2025, arXiv 2509.07252).

The formulas are (3) to (9) of the paper, as in the official code (AlevLab-dev/GCond). Left out are what surrounds them,
accumulation and momentum (see `accumulate`). Departures from the code: the averages of the norms begin at a task's
first norm, not at 1; equal scores go to the longer gradient; a gradient is in no further conflict below a hundredth of
its length, not below a squared norm of 1e-8; and stability compares with the previous gradient as it was, as the paper
says, where the code has overwritten it with the resolved one.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import Number, check_choice, check_count, check_dtype, check_number
from mtlgrad_jax._core.method import Method, from_rule
from mtlgrad_jax._core.paper import Paper
from mtlgrad_jax._core.row import HOMOGENEOUS, Row, num_tasks_only
from mtlgrad_jax._core.tasks import accumulator_dtype
from mtlgrad_jax._core.weights import Present
from mtlgrad_jax.solvers import cosines, inverse_sqrt

_VANISHED = 0.01  # part of its length below which a gradient is in no further conflict


class GCondState(NamedTuple):
    """State of gcond."""

    previous: PyTree  # each task's last gradient, leaves (K, *parameter shape)
    norm: Float[Array, " K"]  # running averages of the norms, 0 until a task has one
    wins: Int[Array, " K"]  # conflicts won since a task last lost


def gcond(
    num_tasks: int,
    critical: Number = -0.8,
    main: Number = -0.5,
    weak: Number = 0.0,
    power: Number = 2.0,
    stability: Number = 0.8,
    window: int = 3,
    decay: Number = 0.95,
    resolution: Literal["smooth", "zones"] = "smooth",
    buffer_dtype: DTypeLike | None = None,
) -> Method:
    r"""Resolve the worst conflict of two tasks, again and again, mostly at the cost of the one with the lower score.

    For the pair of smallest cosine c, as long as it is below a threshold and at most 2K times, with winner a and loser
    b:

    .. math:: \hat g_a \leftarrow \hat g_a - \sigma_a \frac{\langle \hat g_a, \hat g_b \rangle}{\|\hat g_b\|^2}
              \hat g_b, \qquad
              \hat g_b \leftarrow \hat g_b - \sigma_b \frac{\langle \hat g_a, \hat g_b \rangle}{\|\hat g_a\|^2}
              \hat g_a, \qquad d = \sum_i \hat g_i
    .. math:: \sigma_b = \cos \tfrac{\pi}{2} u, \quad \sigma_a = \cos \tfrac{\pi}{2} \max(u, v^p), \quad
              u = \frac{c - t_{main}}{t_{weak} - t_{main}}, \quad v = \frac{t_{main} - c}{t_{main} - t_{critical}}

    with the old vectors on the right and u and v clipped to [0, 1]: weak conflicts change both gradients a little,
    those at :math:`t_{main}` are projected away from both, and from :math:`t_{critical}` on only the loser changes. The
    winner has the higher score

    .. math:: \alpha \max(\cos(\hat g_i, g_i'), 0) + (1 - \alpha) \frac{r_i}{r_i + r_j}, \qquad
              r_i = \frac{\|\hat g_i\|}{\bar n_i}

    with :math:`g_i'` the task's previous gradient and :math:`\bar n_i` the running average of its norm; but a task that
    won the last few conflicts loses. Conflicts can remain. Between equals the order of the tasks decides.

    The state holds K times the parameters.

    Args:
      num_tasks: K.
      critical: cosine :math:`t_{critical}` in [-1, 1] below which only the loser changes.
      main: cosine :math:`t_{main}` in [-1, 1] of the full projection of both; without effect unless between the other
        two.
      weak: cosine :math:`t_{weak}` in [-1, 1] below which two tasks are in conflict.
      power: exponent p > 0 of the transition from main to critical.
      stability: share :math:`\alpha` in [0, 1] of the stability in the score; the rest is the strength.
      window: number of wins in a row after which a task loses; 0 for never.
      decay: of the running averages of the norms, in [0, 1).
      resolution: "smooth" as above (default of the code), or by "zones": below critical the loser becomes zero, below
        main only the loser is projected, below weak both are.
      buffer_dtype: dtype of the K buffers; the parameters' for None.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> tx = mtl.gcond(num_tasks=2)
      >>> grads = jnp.asarray([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> update.tolist(), state.method.wins.tolist()
      ([5.4737, 2.5789, 2.5789], [0, 1])
    """
    check_count("num_tasks", num_tasks, at_least=1)
    for name, cosine in (("critical", critical), ("main", main), ("weak", weak)):
        check_number(name, cosine, at_least=-1, at_most=1)
    check_number("power", power, above=0)
    check_number("stability", stability, at_least=0, at_most=1)
    check_count("window", window, at_least=0)
    check_number("decay", decay, at_least=0, below=1)
    check_choice("resolution", resolution, ("smooth", "zones"))
    check_dtype("buffer_dtype", buffer_dtype)

    def init(params: PyTree, num_tasks: int) -> GCondState:
        norm, wins = jnp.zeros((num_tasks,), accumulator_dtype()), jnp.zeros((num_tasks,), jnp.int32)
        return GCondState(stacks.zeros(params, num_tasks, buffer_dtype), norm, wins)

    def rule(task_grads: PyTree, *, present: Present, state: GCondState) -> tuple[PyTree, GCondState]:
        constant = lax.stop_gradient(stacks.select(present, task_grads))
        C, inverse = cosines(stacks.gramian(constant, present))
        lengths = jnp.where(inverse > 0, 1 / jnp.where(inverse > 0, inverse, 1), 0)
        norm = jnp.where(state.norm > 0, decay * state.norm + (1 - decay) * lengths, lengths)
        before = inverse_sqrt(stacks.task_norms(state.previous) ** 2)
        steady = stacks.cross_gramian(constant, state.previous) * inverse[:, None] * before[None, :]
        seen = _Seen(C, steady, lengths, lengths / jnp.where(norm > 0, norm, 1), present & (inverse > 0))
        rules = _Rules(*(jnp.asarray(rule, C.dtype) for rule in (critical, main, weak, power, stability, window)))
        rows, wins = _resolve(seen, rules, state.wins, zones=resolution == "zones")
        weights = jnp.sum(lengths[:, None] * rows, axis=0) * inverse
        return stacks.combine(weights, task_grads), GCondState(constant, norm, wins)

    return from_rule(rule, init, num_tasks=num_tasks, leaves_alike=True)


class _Seen(NamedTuple):
    """What is known of the gradients of a step; their rows at unit length are u_k."""

    cosines: Float[Array, "K K"]
    steady: Float[Array, "K K"]  # cosine of u_k with the previous gradient of task i
    lengths: Float[Array, " K"]
    relative: Float[Array, " K"]  # length divided by the running average
    among: Bool[Array, " K"]  # present and not zero


class _Rules(NamedTuple):
    """The numbers among the arguments."""

    critical: Array
    main: Array
    weak: Array
    power: Array
    stability: Array
    window: Array


class _Search(NamedTuple):
    """State of the resolution; the gradient of task i is now its length times sum_k rows_ik u_k."""

    rows: Float[Array, "K K"]
    wins: Int[Array, " K"]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


@partial(jax.jit, static_argnames="zones")
def _resolve(
    seen: _Seen, rules: _Rules, wins: Int[Array, " K"], *, zones: bool
) -> tuple[Float[Array, "K K"], Int[Array, " K"]]:
    """Return the rows after all conflicts, and the wins."""
    K = len(wins)
    accuracy = 4 * K * jnp.finfo(seen.cosines.dtype).eps
    pairs = jnp.triu(seen.among[:, None] & seen.among[None, :], 1)

    def resolve_worst(s: _Search) -> _Search:
        products = s.rows @ seen.cosines @ s.rows.T
        reach = jnp.sum(jnp.abs(s.rows), axis=1)
        squares = jnp.diagonal(products)
        defined = squares > jnp.maximum(_VANISHED**2, accuracy * reach**2)
        sizes = jnp.sqrt(jnp.where(defined, squares, 1))
        angles = products / sizes[:, None] / sizes[None, :]
        counted = pairs & defined[:, None] & defined[None, :]
        rounding = accuracy * reach[:, None] * reach[None, :] / sizes[:, None] / sizes[None, :]
        smallest = jnp.min(angles, where=counted, initial=jnp.inf)
        first = jnp.argmax(counted & (angles <= smallest + rounding))
        i, j = first // K, first % K
        cosine = angles[i, j]
        conflict = jnp.any(counted) & (cosine < rules.weak - rounding[i, j])

        second = _second_wins(seen, rules, s, sizes, i, j)
        winner, loser = jnp.where(second, j, i), jnp.where(second, i, j)
        of_winner, of_loser, kept = _widths(cosine, rules, zones)
        dot = products[winner, loser]
        one = s.rows[winner] - of_winner * dot / sizes[loser] ** 2 * s.rows[loser]
        other = s.rows[loser] - of_loser * dot / sizes[winner] ** 2 * s.rows[winner]
        rows = s.rows.at[winner].set(one).at[loser].set(jnp.where(kept, other, 0))
        won = jnp.where(jnp.arange(K) == winner, optax.safe_increment(s.wins), 0)
        judged = conflict & (~jnp.asarray(zones) | (cosine < rules.main))
        return _Search(jnp.where(conflict, rows, s.rows), jnp.where(judged, won, s.wins), s.steps + 1, ~conflict)

    start = _Search(jnp.eye(K, dtype=seen.cosines.dtype), wins, jnp.asarray(0), ~jnp.any(pairs))
    most = 2 * jnp.sum(seen.among)
    end = lax.while_loop(lambda s: ~s.done & (s.steps < most), resolve_worst, start)
    return end.rows, end.wins


def _second_wins(seen: _Seen, rules: _Rules, s: _Search, sizes: Array, i: Array, j: Array) -> Bool[Array, ""]:
    """Return whether j wins against i."""
    pair = jnp.stack([i, j])
    steady = jnp.maximum(jnp.sum(s.rows[pair] * seen.steady[:, pair].T, axis=1) / sizes[pair], 0)
    strength = seen.relative[pair] * sizes[pair]
    score = rules.stability * steady + (1 - rules.stability) * strength / jnp.sum(strength)
    length = seen.lengths[pair] * sizes[pair]
    equal = 4 * len(s.wins) * jnp.finfo(score.dtype).eps
    longer = length[1] > (1 + equal) * length[0]
    better = jnp.where(jnp.abs(score[1] - score[0]) > equal, score[1] > score[0], longer)
    tired = (s.wins[pair] >= rules.window) & (rules.window > 0)
    return jnp.where(tired[0] == tired[1], better, tired[0])


def _widths(cosine: Array, rules: _Rules, zones: bool) -> tuple[Array, Array, Array]:
    """Return how far the winner and the loser are projected, and whether the loser is kept."""
    if zones:
        return jnp.where(cosine < rules.main, 0.0, 1.0), jnp.ones(()), cosine >= rules.critical
    up = _ramp(cosine - rules.main, rules.weak - rules.main)
    down = _ramp(rules.main - cosine, rules.main - rules.critical) ** rules.power
    return jnp.cos(jnp.pi / 2 * jnp.maximum(up, down)), jnp.cos(jnp.pi / 2 * up), jnp.asarray(True)


def _ramp(along: Array, length: Array) -> Array:
    """Return the part of a length covered, in [0, 1]; for a length of zero a step."""
    return jnp.where(along >= length, 1, jnp.clip(along / jnp.where(length > 0, length, 1), 0, 1))


ROW = Row(
    gcond,
    scale="sum",
    state="K gradients, K running averages of norms, K counts",
    papers=(
        Paper(
            "GCond: Gradient Conflict Resolution via Accumulation-based Stabilization for Large-Scale "
            "Multi-Task Learning",
            "Evgeny Alves~Limarenko, Anastasiia Studenikina",
            2025,
            arxiv="2509.07252",
        ),
    ),
    promises=frozenset({HOMOGENEOUS}),
    kwargs=num_tasks_only,
    checked="numpy float64 of the definition; formula from official code",
)
