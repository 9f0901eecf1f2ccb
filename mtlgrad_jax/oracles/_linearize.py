"""The Jacobian of K losses as an operator: its products with vectors, never its K×P entries.

With J the K×P Jacobian at hand only through its transpose (the vjp), J itself is the transpose of that
(`jax.linear_transpose`), so everything runs in reverse mode, and custom_vjp, remat, scan and aux work as usual.
Column i of the Gramian is J (J^T e_i): two passes, one gradient in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._checks import check_count
from mtlgrad_jax._control import loop
from mtlgrad_jax._tasks import accumulator_dtype, task_names, task_vector
from mtlgrad_jax.oracles._losses import Argnums, Rest, at_leaf, bind, check_oracle, flatten_losses
from mtlgrad_jax.oracles._task_value_and_grad import (
    UNROLLED_TASKS,
    Strategy,
    check_strategy,
    like_losses,
    pull_rows,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaskJacobian:
    """The Jacobian of K losses in P parameters, by its products; a pytree that crosses jit and cond.

    Attributes:
      losses: what `losses_fn` returned.
      aux: its aux, or None.
    """

    losses: PyTree
    aux: PyTree
    _vjp: Callable[[PyTree], tuple[list[Array]]]
    _rest: Rest = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(flatten_losses(self.losses))

    def pullback(self, weights: PyTree) -> PyTree:
        """Return J^T w, the gradient of the weighted sum of the losses; one backward pass.

        Weights that are all zero give zero whatever the gradients hold: so weightings skip a step that is not finite.

        Args:
          weights: a (K,) array, as weightings return it, or a pytree like the losses; of named losses never a list.
        """
        names = None if jax.tree_util.all_leaves([weights]) else task_names(self.losses)
        vector = task_vector("weights", weights, num_tasks=self.num_tasks, names=names)
        used = jnp.any(vector != 0)
        return self._rest.fill([jnp.where(used, leaf, jnp.zeros_like(leaf)) for leaf in self._pull(vector)])

    def pushforward(self, direction: PyTree) -> Float[Array, " K"]:
        """Return J d, the first-order change of every loss along a direction with the structure of the parameters."""
        expected = jax.eval_shape(self.pullback, jnp.zeros((self.num_tasks,)))
        return self._push(self._rest.pick(_fit(direction, expected))).astype(accumulator_dtype())

    def gramian(self, rows: int | None = None) -> Float[Array, "K K"]:
        """Return the Gramian J J^T, as exact as the model's own arithmetic, at the memory of one backward pass.

        Args:
          rows: build it of blocks of so many gradients instead, in float32 at the highest matmul precision: for bf16
            models and TPU's default precision. K^2 / rows more backward passes, the memory of 2 rows gradients.
        """
        if rows is not None:
            check_count("rows", rows, at_least=1)
            return self._gramian_of_blocks(rows)
        units = jnp.eye(self.num_tasks, dtype=accumulator_dtype())

        def column(unit: Array) -> Array:
            return self._push(self._pull(unit)).astype(unit.dtype)

        matrix = loop(column, (units,), unrolled=self.num_tasks <= UNROLLED_TASKS)
        return (matrix + matrix.T) / 2

    def rows(self, strategy: Strategy = "vmap") -> PyTree:
        """Return all K gradients stacked, as `task_value_and_grad` does."""
        check_strategy(strategy)
        return self._rest.fill(pull_rows(self._pull, flatten_losses(self.losses), strategy), (self.num_tasks,))

    def _pull(self, vector: Array) -> list[Array]:
        return self._vjp(like_losses(vector, self.losses))[0]

    def _push(self, gradient: list[Array]) -> Array:
        unit = jax.ShapeDtypeStruct((self.num_tasks,), flatten_losses(self.losses).dtype)
        return jax.linear_transpose(self._pull, unit)(gradient)[0]

    def _gramian_of_blocks(self, rows: int) -> Array:
        K = self.num_tasks
        blocks = -(-K // rows)
        units = jnp.eye(blocks * rows, K, dtype=flatten_losses(self.losses).dtype).reshape(blocks, rows, K)

        def against(first: Array) -> Array:
            mine = jax.vmap(self._pull)(first)
            return loop(lambda second: stacks.cross_gramian(mine, jax.vmap(self._pull)(second)), (units,))

        matrix = loop(against, (units,))  # (blocks, blocks, rows, rows)
        matrix = matrix.transpose(0, 2, 1, 3).reshape(blocks * rows, blocks * rows)[:K, :K]
        return (matrix + matrix.T) / 2


def _fit(direction: PyTree, params: PyTree) -> PyTree:
    """Return a direction in the parameters' dtypes; it must have their structure and shapes."""
    structure: Any = jax.tree.structure(direction)
    wanted: Any = jax.tree.structure(params)
    if structure != wanted:
        raise ValueError(f"`direction` must have the structure of the parameters, {wanted}, got {structure}.")

    def fit(path: tuple[Any, ...], leaf: Any, param: jax.ShapeDtypeStruct) -> Array:
        if jnp.shape(leaf) != param.shape:
            expected, got = param.shape, jnp.shape(leaf)
            raise ValueError(f"`direction` must have its parameter's shape {expected}, got {got}{at_leaf(path)}.")
        return jnp.asarray(leaf, param.dtype)

    return jax.tree_util.tree_map_with_path(fit, direction, params)


def linearize(
    losses_fn: Callable[..., Any], *args: Any, argnums: Argnums = 0, has_aux: bool = False, **kwargs: Any
) -> TaskJacobian:
    """Run `losses_fn` forward once and return its Jacobian as an operator.

    A backward pass of your own (custom_vjp) must be one that JAX can transpose: linear in its cotangent, no clipping
    and no kernel in it. Otherwise the Gramian comes from `gramian(rows=b)`, which needs no transpose.

    Args:
      losses_fn: returns a (K,) array or a pytree of K scalars; with `has_aux`, a pair of that and anything.
      *args: its arguments.
      argnums: which of them to differentiate in. Leaves that are not floating get zero gradients.
      has_aux: whether `losses_fn` returns (losses, aux).
      **kwargs: its keyword arguments.

    Returns:
      A TaskJacobian with `losses`, `aux`, `gramian()`, `pullback(weights)`, `pushforward(direction)` and `rows()`.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> jac = mtl.linearize(lambda w: jnp.stack([jnp.sum(w**2), jnp.sum(3 * w)]), jnp.asarray([1.0, 2.0]))
      >>> jac.gramian().tolist()
      [[20.0, 18.0], [18.0, 18.0]]
      >>> jac.pullback(jnp.asarray([0.5, 0.5])).tolist()
      [2.5, 3.5]
    """
    check_oracle(losses_fn, argnums, has_aux)
    function, floating, rest = bind(losses_fn, args, kwargs, argnums, has_aux)
    losses, vjp, aux = jax.vjp(function, floating, has_aux=True)
    return TaskJacobian(losses, aux, vjp, rest)
