"""All K gradients of K losses."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax._core.checks import check_choice, check_count
from mtlgrad_jax._core.control import loop, stack_rows
from mtlgrad_jax.oracles.losses import Argnums, bind, check_averaged, check_oracle, count_losses, flatten_losses

Strategy = Literal["auto", "vmap", "unrolled"] | int

# Up to this many backward passes are written out one after the other: XLA:CPU then runs convolutions up to 2 times
# faster than in a vmap and up to 20 times faster than in a loop. The time to compile grows with the number of passes.
UNROLLED_TASKS = 8
UNROLLED_LOSSES = 40  # in a pytree: their passes leave out the heads of others (docs/training_step.md has times)


def task_value_and_grad(
    losses_fn: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, strategy: Strategy = "auto"
) -> Callable[..., tuple[Any, PyTree]]:
    """Return a function that gives the K losses and their K gradients: `jax.value_and_grad` for many losses.

    Args:
      losses_fn: returns a (K,) array or a pytree of K scalars, preferably a dict keyed by task name; with `has_aux`, a
        pair of losses and anything else.
      argnums: positional arguments to differentiate with respect to. Leaves that are not floating get zero gradients.
      has_aux: whether `losses_fn` returns (losses, aux).
      strategy: how the K backward passes run. "vmap": all at once. An int: that many at once, in a loop; 1 never uses
        vmap. "unrolled": one after the other; each entry of a pytree of losses is differentiated separately, so its
        backward pass leaves out what only other tasks use, such as their heads, and a NaN there does not reach it
        (this runs the forward pass once under jit, but K + 1 times without). "auto": "unrolled" for up to 40 named
        losses and up to 8 in an array, "vmap" for more. "unrolled" compiles a pass for each task, which may take twice
        as long as "vmap" or a loop.

    Returns:
      `f(*args, **kwargs) -> (losses, grads)`, or `((losses, aux), grads)`; the leaves of grads have shape
      `(K, *leaf shape)`, tasks in the flattened (sorted) order of the losses.

    Raises:
      ValueError: `losses_fn` returns anything else.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> def losses_fn(w):
      ...     return {"seg": jnp.sum(w**2), "depth": jnp.sum(3 * w)}
      >>> losses, grads = mtl.task_value_and_grad(losses_fn)(jnp.asarray([1.0, 2.0]))
      >>> grads.tolist()  # depth, seg
      [[3.0, 3.0], [2.0, 4.0]]
    """
    check_oracle(losses_fn, argnums, has_aux)
    check_strategy(strategy)

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        function, floating, rest = bind(losses_fn, args, kwargs, argnums, has_aux)
        losses, vjp, aux = jax.vjp(function, floating, has_aux=True)
        check_averaged(losses, floating)
        K, separate = count_losses(losses)
        if separate and is_unrolled(strategy, K, separate=True):
            del vjp  # and what it holds
            rows = _entry_by_entry(lambda leaves: function(leaves)[0], floating, K)
        else:
            rows = pull_rows(lambda row: vjp(like_losses(row, losses))[0], flatten_losses(losses), strategy)
        grads = rest.fill(rows, leading=(K,))
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


def check_strategy(strategy: Strategy) -> None:
    """Raise a ValueError unless `strategy` is one of those of `task_value_and_grad`."""
    if isinstance(strategy, str):
        check_choice("strategy", strategy, ("auto", "vmap", "unrolled"))
    else:
        check_count("strategy", strategy, at_least=1)


def like_losses(row: Array, losses: PyTree) -> PyTree:
    """Return a (K,) cotangent with the structure and dtypes of the losses."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(losses)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 1:
        return treedef.unflatten([row.astype(leaves[0].dtype)])
    return treedef.unflatten([entry.astype(leaf.dtype) for entry, leaf in zip(row, leaves, strict=True)])


def each_task(row: Callable[..., Any], stacked: PyTree, strategy: Strategy, separate: bool = False) -> Any:
    """Apply a function to every task's part of `stacked`, a tuple of its arguments, and stack the results.

    Args:
      row: the function.
      stacked: arguments of all tasks.
      strategy: as in `task_value_and_grad`.
      separate: whether the losses are separate entries of a pytree.
    """
    if is_unrolled(strategy, len(jax.tree.leaves(stacked)[0]), separate):
        return loop(row, stacked, unrolled=True)
    return loop(row, stacked, strategy) if isinstance(strategy, int) else jax.vmap(row)(*stacked)


def is_unrolled(strategy: Strategy, num_tasks: int, separate: bool = False) -> bool:
    """Return whether the tasks' passes are written out one after the other, for losses that are `separate` or not."""
    most = UNROLLED_LOSSES if separate else UNROLLED_TASKS
    return strategy == "unrolled" or (strategy == "auto" and num_tasks <= most)


def pull_rows(pull: Callable[[Array], list[Array]], losses: Array, strategy: Strategy) -> list[Array]:
    """Return the stacked gradients that a pullback gives for the K unit cotangents."""
    return each_task(pull, (jnp.eye(len(losses), dtype=losses.dtype),), strategy)


def _entry_by_entry(function: Callable[[list[Array]], PyTree], floating: list[Array], num_tasks: int) -> list[Array]:
    """Return the stacked gradients, each of one loss on its own, which a NaN in another cannot reach."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        function = jax.jit(function)  # traced once, not once for every task

    def row(i: int) -> list[Array]:
        return jax.grad(lambda leaves: jax.tree.leaves(function(leaves))[i])(floating)

    return stack_rows([row(i) for i in range(num_tasks)])
