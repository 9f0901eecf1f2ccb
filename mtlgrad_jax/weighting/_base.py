"""The weighting protocol, and the adapter that makes a weighting of a method's formula."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from mtlgrad_jax._checks import check_count, check_function
from mtlgrad_jax._step import BIASED, SOLVED, MethodState, first_info, guard_step
from mtlgrad_jax._tasks import accumulator_dtype, agree_num_tasks, check_num_tasks, task_names, task_vector
from mtlgrad_jax._trees import unaliased
from mtlgrad_jax.solvers._solution import Solution

# What a formula is given (None for what it does not need), and what it returns.
Gramian = Float[Array, "K K"]
Losses = Float[Array, " K"]
Present = Bool[Array, " K"]
Weights = Shaped[Array, " K"] | Solution

LazyGramian = Float[Array, "K K"] | Callable[[], Float[Array, "K K"]]
Kernel = Callable[[Any, Any, Any, Present], tuple[Any, PyTree]]


class Weighting(NamedTuple):
    """A pair of pure functions, like an optax transformation, from the K×K Gramian to the K weights of the tasks.

    Attributes:
      init: `init(num_tasks=None) -> state`.
      update: `update(gramian, state, *, losses=None, task_mask=None) -> (weights, state)`. The Gramian may be an array
        or a function of no arguments, called only by weightings that need it.
      needs: "gramian", "losses", ...: what every update looks at.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[Float[Array, " K"], PyTree]]
    needs: frozenset[str] = frozenset({"gramian"})


NEEDS = frozenset({"gramian", "cross_gramian", "losses", "positive losses"})


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """Return what a method declares to need, or raise for anything else."""
    if isinstance(needs, str) or not isinstance(needs, Iterable) or not NEEDS.issuperset(needs):
        raise ValueError(f"`needs` must be a collection of {', '.join(sorted(NEEDS))}, got needs={needs!r}.")
    return frozenset(needs)


def check_parts(name: str, formula: Any, init: Any, num_tasks: Any, fewest: Any) -> None:
    """Raise a ValueError unless a method can be made of a formula, an init and two numbers of tasks."""
    check_function(name, formula)
    if init is not None:
        check_function("init", init)
    if num_tasks is not None:
        check_count("num_tasks", num_tasks, at_least=1)
    check_count("fewest", fewest, at_least=1)


def from_kernel(
    kernel: Kernel,
    init: Callable[[Any], PyTree] | None = None,
    *,
    needs: Iterable[str] = ("gramian",),
    num_tasks: int | None = None,
    per_task: dict[str, PyTree] | None = None,
    fewest: int = 1,
) -> Weighting:
    """Make a Weighting of a method's formula; everything that all methods share happens here, once.

    The formula sees a Gramian and losses that are finite, float32 (float64 under x64) and constants to differentiation.
    Rows and columns of absent tasks are zero, their losses one; whatever it returns for them is ignored. Named tasks
    are flattened, missing arguments and wrong shapes raise, a step with a loss or gradient that is not finite gives
    zero weights, too few tasks give their mean, and all of it is counted in the state's `info`.

    Args:
      kernel: `(gramian, state, losses, present) -> (weights, state)`; the weights are (K,) or a solver's Solution.
      init: makes the method's own state for K tasks; None for a method without state.
      needs: "gramian", "losses", "positive losses"; the kernel gets None for what is not listed. With "cross_gramian"
        it gets, in place of the Gramian, the update's argument of this name, and the Gramian where that is missing,
        which the result code then says.
      num_tasks: K, where the method keeps per-task state: leaves with a leading axis K, one entry per task.
      per_task: the per-task arguments of the factory, checked against the tasks' names and number.
      fewest: present tasks without which the weights are those of the mean.
    """
    needs = check_needs(needs)
    check_parts("kernel", kernel, init, num_tasks, fewest)
    if not isinstance(per_task, dict | None):
        raise ValueError(f"`per_task` must be a dict of arguments by name, got per_task={per_task!r}.")
    known_tasks = num_tasks

    def init_fn(num_tasks: int | None = None) -> MethodState:
        K = agree_num_tasks(known_tasks, num_tasks)
        return unaliased(MethodState(init(K) if init is not None else optax.EmptyState(), first_info()))

    def update_fn(
        gramian: LazyGramian | None,
        state: MethodState,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        cross_gramian: Float[Array, "K K"] | None = None,
        **unused: Any,
    ) -> tuple[Float[Array, " K"], MethodState]:
        crossed = "cross_gramian" in needs and cross_gramian is not None
        wanted = not needs.isdisjoint({"gramian", "cross_gramian"})
        source: Any = cross_gramian if crossed else gramian
        matrix: Any = source() if callable(source) and wanted else source
        if wanted and matrix is None:
            raise ValueError("`gramian` must be a (K, K) array or a function that returns one, got None.")
        if wanted and (jnp.ndim(matrix) != 2 or (crossed and known_tasks not in (None, len(matrix)))):
            _refuse(crossed, known_tasks, matrix)
        K = _count_tasks(matrix, losses, known_tasks)
        check_num_tasks(known_tasks, K)
        for name, values in (per_task or {}).items():
            if values is not None:
                task_vector(name, values, num_tasks=K, names=task_names(losses))
        guard = guard_step(_name(kernel), needs, K, losses, task_mask)
        if wanted:
            matrix = jax.lax.stop_gradient(jnp.asarray(matrix, accumulator_dtype()))
            if matrix.shape != (K, K):
                _refuse(crossed, K, matrix)
            matrix = jnp.where(guard.present[:, None] & guard.present[None, :], matrix, 0)
            guard = guard.also(jnp.isfinite(matrix).all())
            matrix = jnp.where(guard.finite, matrix, 0)
        solved, method_state = kernel(matrix if wanted else None, state.method, guard.losses, guard.present)
        if not isinstance(solved, Solution):
            code = BIASED if "cross_gramian" in needs and not crossed else SOLVED
            solved = Solution(solved, jnp.zeros(()), jnp.zeros((), int), jnp.asarray(code))
        if jnp.shape(solved.value) != (K,):
            raise ValueError(f"`kernel` must return weights of shape ({K},), got shape {jnp.shape(solved.value)}.")
        sane = fit(solved.value, matrix if "gramian" in needs else None, guard.present)
        sane &= guard.intact(state, method_state, known_tasks)
        enough = sane & (guard.num_present >= fewest)
        weights = jnp.where(guard.present, jnp.where(enough, solved.value, uniform(guard.present)), 0)
        outcome = {"residual": solved.residual, "steps": solved.steps, "result": solved.result, "solved": sane}
        return weights, guard.advance(
            state, method_state, num_tasks=known_tasks, enough=enough, fewest=fewest, **outcome
        )

    return Weighting(init_fn, update_fn, needs)


def _refuse(crossed: bool, num_tasks: int | None, matrix: Any) -> None:
    name, K = "cross_gramian" if crossed else "gramian", "K" if num_tasks is None else num_tasks
    raise ValueError(f"`{name}` must have shape ({K}, {K}), got shape {jnp.shape(matrix)}.")


def uniform(present: Present) -> Float[Array, " K"]:
    """Return 1/K over the K tasks present."""
    return present / jnp.maximum(jnp.sum(present), 1).astype(accumulator_dtype())


def of_tasks(name: str, values: PyTree, present: Present, default: Float[Array, " K"] | float) -> Float[Array, " K"]:
    """Return a per-task argument of a factory as an array, or a default for None; zero for absent tasks."""
    values = default if values is None else task_vector(name, values)
    return jnp.where(present, values, 0).astype(accumulator_dtype())


def fit(weights: Float[Array, " K"], gramian: Gramian | None, among: Present) -> Bool[Array, ""]:
    """Return whether a weighted sum of the gradients of some tasks cannot overflow, whatever their angles."""
    lengths = 1 if gramian is None else jnp.sqrt(jnp.diagonal(gramian))
    longest = jnp.sum(jnp.where(among, jnp.abs(weights) * lengths, 0))
    return jnp.isfinite(2 * longest)  # twice: rounding


def ratios(values: Float[Array, " K"], by: Float[Array, " K"], among: Present) -> Float[Array, " K"]:
    """Return values / by, all times one power of two that makes the largest among some tasks about 1.

    So their relations are exact and finite, however far apart their scales.
    """
    (numerators, up), (denominators, down) = jnp.frexp(values), jnp.frexp(by)
    exponents = up - down
    largest = jnp.max(exponents, where=among & (values != 0), initial=4 * jnp.finfo(values.dtype).minexp)
    return jnp.ldexp(numerators / denominators, jnp.minimum(exponents - largest, 0))


def mean_of(values: Float[Array, " K"], among: Present) -> Float[Array, ""]:
    """Return the mean over some tasks, 0 over none."""
    return jnp.sum(jnp.where(among, values, 0)) / jnp.maximum(jnp.sum(among), 1)


def over_mean(values: Float[Array, " K"], among: Present) -> Float[Array, " K"]:
    """Return values over their mean over some tasks, so that there they add up to the number of those tasks."""
    mean = mean_of(values, among)
    return values / jnp.where(mean != 0, mean, 1)


def share(weights: Float[Array, " K"], present: Present, whole: int = 1) -> Float[Array, ""]:
    """Return what absent tasks leave of a whole to those present, which thus keep their sum and no rounding adds up.

    Where that is nothing it is eps squared of it, which no sum shows, so that those present can have ratios to learn.
    """
    absent = jnp.sum(jnp.where(present, 0, weights))
    return jnp.maximum(whole - absent, whole * jnp.finfo(weights.dtype).eps ** 2)


def on_simplex(weights: Float[Array, " K"], present: Present) -> Float[Array, " K"]:
    """Return weights of sum one on the tasks present, in the ratios of those kept, or equal where those are zero."""
    kept = jnp.where(present, weights, 0)
    total = jnp.sum(kept)
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), uniform(present))


def _name(kernel: Kernel) -> str:
    return getattr(kernel, "__qualname__", repr(kernel)).split(".")[0]


def _count_tasks(gramian: LazyGramian | None, losses: PyTree, num_tasks: int | None) -> int:
    if gramian is not None and not callable(gramian):
        return jnp.shape(gramian)[0]
    if losses is not None:
        return task_vector("losses", losses).shape[0]
    if num_tasks is not None:
        return num_tasks
    if gramian is None:
        raise ValueError("`gramian` must be given where neither losses nor num_tasks tell the number of tasks.")
    return jax.eval_shape(gramian).shape[0]
