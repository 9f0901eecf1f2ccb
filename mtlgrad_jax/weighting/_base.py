"""The weighting protocol, and the adapter that makes a weighting of a method's formula."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax._tasks import (
    Info,
    accumulator_dtype,
    agree_num_tasks,
    first_info,
    keep_absent,
    next_info,
    present_tasks,
    task_names,
    task_vector,
)
from mtlgrad_jax.solvers._solution import Solution

Gramian = Float[Array, "K K"] | Callable[[], Float[Array, "K K"]]
Kernel = Callable[[Any, PyTree, Any, Bool[Array, " K"]], tuple[Any, PyTree]]


class Weighting(NamedTuple):
    """A pair of pure functions, like an optax transformation, from the K×K Gramian to the K weights of the tasks.

    Attributes:
      init: `init(num_tasks=None) -> state`.
      update: `update(gramian, state, *, losses=None, task_mask=None) -> (weights, state)`. The Gramian may be an array
        or a function of no arguments, called only by weightings that need it.
      needs: "gramian", "losses": what every update looks at.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[Float[Array, " K"], PyTree]]
    needs: frozenset[str] = frozenset({"gramian"})


class WeightingState(NamedTuple):
    """State of a weighting: the method's own, and how the last step went."""

    method: PyTree  # what the method keeps; leaves with a leading axis K hold one entry per task
    info: Info


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
      needs: "gramian", "losses"; the kernel gets None for what is not listed.
      num_tasks: K, where the method keeps per-task state.
      per_task: the per-task arguments of the factory, checked against the tasks' names and number.
      fewest: present tasks without which the weights are those of the mean.
    """
    needs = frozenset(needs)
    method_name = kernel.__qualname__.split(".")[0]
    known_tasks = num_tasks

    def init_fn(num_tasks: int | None = None) -> WeightingState:
        K = agree_num_tasks(known_tasks, num_tasks)
        return WeightingState(init(K) if init is not None else optax.EmptyState(), first_info())

    def update_fn(
        gramian: Gramian | None,
        state: WeightingState,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **unused: Any,
    ) -> tuple[Float[Array, " K"], WeightingState]:
        if losses is None and "losses" in needs:
            raise ValueError(f"`losses` must be given: {method_name} needs it. Write update(..., losses=losses).")
        names = task_names(losses)
        matrix: Any = gramian() if callable(gramian) and "gramian" in needs else gramian
        K = _count_tasks(matrix, losses, known_tasks)
        if known_tasks is not None and known_tasks != K:
            raise ValueError(f"`num_tasks` must be the number of tasks, {K}, got num_tasks={known_tasks}.")
        for name, values in (per_task or {}).items():
            if values is not None:
                task_vector(name, values, num_tasks=K, names=names)
        present = present_tasks(task_mask, K, names)
        finite = jnp.asarray(True)
        dtype = accumulator_dtype()
        if "gramian" in needs:
            matrix = jax.lax.stop_gradient(jnp.asarray(matrix, dtype))
            if matrix.shape != (K, K):
                raise ValueError(f"`gramian` must have shape ({K}, {K}), got shape {matrix.shape}.")
            matrix = jnp.where(present[:, None] & present[None, :], matrix, 0)
            finite &= jnp.isfinite(matrix).all()
        if losses is not None:
            vector = task_vector("losses", losses, num_tasks=K).astype(dtype)
            vector = jnp.where(present, jax.lax.stop_gradient(vector), 1)
            finite &= jnp.isfinite(vector).all()
        present = present & finite
        count = jnp.sum(present)
        solved, method_state = kernel(
            jnp.where(finite, matrix, 0) if "gramian" in needs else None,
            state.method,
            jnp.where(finite, vector, 1) if "losses" in needs else None,
            present,
        )
        if not isinstance(solved, Solution):
            solved = Solution(solved, jnp.zeros((), dtype), jnp.zeros((), int), jnp.zeros((), int))
        sane = jnp.isfinite(jnp.where(present, solved.value, 0)).all()
        enough = sane & (count >= fewest)
        weights = jnp.where(enough, solved.value, 1 / jnp.maximum(count, 1).astype(dtype))
        info = next_info(
            state.info,
            residual=solved.residual,
            steps=solved.steps,
            result=solved.result,
            count=count,
            fewest=fewest,
            finite=finite,
            solved=sane,
        )
        method_state = keep_absent(method_state, state.method, present, enough & (count > 0))
        return jnp.where(present, weights, 0), WeightingState(method_state, info)

    return Weighting(init_fn, update_fn, needs)


def _count_tasks(gramian: Gramian | None, losses: PyTree, num_tasks: int | None) -> int:
    if gramian is not None and not callable(gramian):
        return jnp.shape(gramian)[0]
    if losses is not None:
        return task_vector("losses", losses).shape[0]
    if num_tasks is not None:
        return num_tasks
    if gramian is None:
        raise ValueError("`gramian` must be given where neither losses nor num_tasks tell the number of tasks.")
    return jax.eval_shape(gramian).shape[0]
