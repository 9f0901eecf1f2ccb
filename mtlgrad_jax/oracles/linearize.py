"""The Jacobian of K losses as an operator: its products with vectors, never its K×P entries.

The K×P Jacobian J is available only through its transpose, the vjp. J itself is the transpose of the vjp
(`jax.linear_transpose`), so everything runs in reverse mode, and custom_vjp, remat, scan and aux work as usual.
Column i of the Gramian is J (J^T e_i): two passes, one gradient in memory.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count
from mtlgrad_jax._core.control import after, loop, repeat
from mtlgrad_jax._core.tasks import Jacobian, accumulator_dtype, task_names, task_vector
from mtlgrad_jax.oracles.losses import (
    Argnums,
    Rest,
    at_leaf,
    bind,
    check_averaged,
    check_oracle,
    check_tracked,
    flatten_losses,
)
from mtlgrad_jax.oracles.task_value_and_grad import (
    UNROLLED_TASKS,
    Strategy,
    check_strategy,
    like_losses,
    pull_rows,
)

Groups = list[list[bool]]  # for each group, which leaves are in it


class TaskJacobian(Jacobian):
    """The Jacobian of K losses in P parameters, as an operator; everything that takes a stack takes a TaskJacobian.

    It is not a pytree and cannot cross a jit, scan or vmap boundary: make it inside the compiled step.

    Attributes:
      losses: what `losses_fn` returned.
      aux: its aux, or None.
      num_tasks: K.
    """

    _bound: Array | None = None  # a Gramian that stands in for its own
    _isolated = False  # whether a NaN or inf in a row must stay there

    def __init__(
        self,
        losses: PyTree,
        aux: PyTree,
        vjp: Callable[[PyTree], tuple[list[Array]]],
        rest: Rest,
        block: int | None = None,
    ) -> None:
        """Store the results of `linearize`."""
        self.losses, self.aux, self._vjp, self._rest, self._block = losses, aux, vjp, rest, block
        self.num_tasks = len(flatten_losses(losses))

    def pullback(self, weights: PyTree) -> PyTree:
        """Return J^T w, the gradient of the weighted sum of the losses; one backward pass, or K by blocks of rows.

        If all weights are zero, so is the result, whatever the gradients hold: methods skip a step with a NaN or inf
        this way. In a single pass the weights are rounded to the losses' dtype.

        Args:
          weights: a (K,) array, as methods return it, or a pytree like the losses; not a list if the losses are named.
        """
        names = None if jax.tree_util.all_leaves([weights]) else task_names(self.losses)
        vector = task_vector("weights", weights, num_tasks=self.num_tasks, names=names)
        if self._single:
            return self._pull_once(vector)[0]
        return self.pullbacks(vector[None], [[True] * len(self._rest.fixed)])

    def pullback_and_check(self, weights: Float[Array, " K"]) -> tuple[PyTree, Bool[Array, ""]]:
        """Return J^T w as `pullback` does, and whether it is finite."""
        if not self._single:
            gradient = self.pullback(weights)
            return gradient, stacks.all_finite(gradient)
        gradient, leaves = self._pull_once(weights)
        return gradient, stacks.all_finite(leaves) | ~jnp.any(weights != 0)

    def total(self, tasks: Bool[Array, " K"]) -> PyTree:
        """Return the sum of the gradients of some tasks: one backward pass, with `rows` too."""
        weights = tasks.astype(accumulator_dtype())
        return self.pullback(weights) if self._isolated else self._pull_once(weights)[0]

    def pushforward(self, direction: PyTree) -> Float[Array, " K"]:
        """Return J d, the first-order change of every loss along a direction with the structure of the parameters."""
        picked = self._rest.pick(_fit(direction, self.like))
        if self._block is None:
            return self._push(picked).astype(accumulator_dtype())
        products = loop(lambda units: stacks.project(self._rows(units), picked), (self._units(),))
        return products.reshape(-1)[: self.num_tasks]

    def gramian(self) -> Float[Array, "K K"]:
        """Return the Gramian J J^T.

        With the memory of one backward pass it is as exact as the model's own arithmetic. By blocks of rows it is
        accurate to float32 at the highest matmul precision.

        Raises:
          ValueError: 16-bit losses, or a backward pass that JAX cannot transpose, without `rows=`.
        """
        if self._bound is not None:
            return self._bound
        if self._block is not None:
            return self.gramians([[True] * len(self._rest.fixed)])[0][0]
        dtype = flatten_losses(self.losses).dtype
        if dtype.itemsize < 4:
            raise ValueError(
                f"`rows` must be given for losses of dtype {dtype}, through which the Gramian would pass: write "
                "rows=8, or any number of gradients that fit into memory, in linearize or balanced_value_and_grad; or "
                "return losses in float32."
            )
        units = jnp.eye(self.num_tasks, dtype=accumulator_dtype())

        def column(unit: Array) -> Array:
            return self._push(self._pull(unit)).astype(unit.dtype)

        if self.num_tasks > UNROLLED_TASKS:
            matrix = loop(column, (units,))
        else:
            columns = [column(units[0])]
            for unit in units[1:]:
                columns.append(column(after(columns[-1], unit)))
            matrix = jnp.stack(columns)
        matrix = (matrix + matrix.T) / 2
        return jnp.where((matrix < 0) & (units > 0), 0, matrix)  # a square that is only rounding

    def rows(self, strategy: Strategy = "vmap") -> PyTree:
        """Return all K gradients stacked, as `task_value_and_grad` does."""
        check_strategy(strategy)
        return self._rest.fill(pull_rows(self._pull, flatten_losses(self.losses), strategy), (self.num_tasks,))

    @property
    def like(self) -> PyTree:
        """A tree with the structure, shapes and dtypes of the parameters."""
        return jax.eval_shape(lambda: self._rest.fill([jnp.zeros(leaf.shape, leaf.dtype) for leaf in self._shapes()]))

    def part(self, flags: list[bool]) -> "TaskJacobian":
        """Return the Jacobian with respect to some of the leaves, a tree with None in place of the others."""
        rest, positions = self._rest.part(flags)

        def vjp(cotangent: PyTree) -> tuple[list[Array]]:
            leaves = self._vjp(cotangent)[0]
            return ([leaves[i] for i in positions],)

        return self._with(_vjp=vjp, _rest=rest)

    def gramians(self, groups: Groups) -> tuple[Float[Array, "groups K K"], Bool[Array, "groups K"]]:
        """Return the Gramian of each group of leaves, and which tasks have a nonzero entry there.

        Computed by blocks of rows, of one row each without `rows`, on and above the diagonal.

        Raises:
          ValueError: the Gramian is that of the features, which no group of leaves has.
        """
        if self._bound is not None:
            raise ValueError(
                "`bound` must be False where several groups of leaves have a Gramian each, as in grouped: the features "
                "have only one."
            )
        units, places = self._units(), self._places(groups)
        blocks, size = units.shape[:2]

        def parts(i: Any) -> list[list[Array]]:
            rows = self._rows(units[i])
            return [[rows[place] for place in group] for group in places]

        def row(i: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
            (matrices, used), mine = found, parts(i)

            def against(j: Any, matrices: Array) -> Array:
                products = stacks.cross_gramians(mine, parts(j))
                return matrices.at[i, j].set(products).at[j, i].set(products.mT)

            matrices = matrices.at[i, i].set(stacks.gramians(mine))
            return repeat(i + 1, blocks, against, matrices), used.at[i].set(stacks.used(mine))

        nothing = jnp.zeros((blocks, blocks, len(groups), size, size), accumulator_dtype())
        matrices, used = repeat(0, blocks, row, (nothing, jnp.zeros((blocks, len(groups), size), bool)))
        K, padded = self.num_tasks, blocks * size
        matrices = matrices.transpose(2, 0, 3, 1, 4).reshape(len(groups), padded, padded)
        return matrices[:, :K, :K], used.swapaxes(0, 1).reshape(len(groups), padded)[:, :K]

    def pullbacks(self, weights: Float[Array, "groups K"], groups: Groups) -> PyTree:
        """Return J^T w, with separate weights for each group of leaves, by blocks of rows."""
        units, places = self._units(), self._places(groups)
        blocks, size = units.shape[:2]
        padded = jnp.pad(weights, ((0, 0), (0, blocks * size - self.num_tasks))).reshape(-1, blocks, size)
        sums = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in self._shapes()]

        def add(i: Any, sums: list[Array]) -> list[Array]:
            rows, sums = self._rows(units[i]), list(sums)
            for group, own in zip(places, padded[:, i], strict=True):
                wide = [rows[place].astype(sums[place].dtype) for place in group]
                for place, part in zip(group, stacks.combine(own, wide), strict=True):
                    sums[place] += part
            return sums

        total = repeat(0, blocks, add, sums)
        return self._rest.fill([leaf.astype(like.dtype) for leaf, like in zip(total, self._shapes(), strict=True)])

    def by_rows(self) -> "TaskJacobian":
        """Return the same Jacobian, computed by blocks of rows: a NaN or inf in a row then stays in that row."""
        return self._with(_block=self._block or 1, _isolated=True)

    def with_gramian(self, gramian: Float[Array, "K K"]) -> "TaskJacobian":
        """Return the same Jacobian with another Gramian in place of its own."""
        return self._with(_bound=gramian)

    def finite_tasks(self) -> Bool[Array, " K"]:
        """Return for every task whether its whole gradient is finite, by blocks of rows."""
        finite = loop(lambda units: stacks.finite_tasks(self._rows(units)), (self._units(),))
        return finite.reshape(-1)[: self.num_tasks]

    def _with(self, **changes: Any) -> "TaskJacobian":
        new = copy.copy(self)
        vars(new).update(changes)
        return new

    @property
    def _single(self) -> bool:
        """Whether a weighted sum takes one backward pass."""
        return self._block is None or (self._bound is not None and not self._isolated)

    def _pull_once(self, vector: Array) -> tuple[PyTree, list[Array]]:
        """Return the gradient, zero if all weights are, and its leaves as the backward pass gives them."""
        used, leaves = jnp.any(vector != 0), self._pull(vector)
        return self._rest.fill([jnp.where(used, leaf, jnp.zeros_like(leaf)) for leaf in leaves]), leaves

    def _places(self, groups: Groups) -> list[list[int]]:
        return [self._rest.part(flags)[1] for flags in groups]

    def _pull(self, vector: Array) -> list[Array]:
        return self._vjp(like_losses(vector, self.losses))[0]

    def _push(self, gradient: list[Array]) -> Array:
        unit = jax.ShapeDtypeStruct((self.num_tasks,), flatten_losses(self.losses).dtype)
        try:
            return jax.linear_transpose(self._pull, unit)(gradient)[0]
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                "`rows` must be given: JAX cannot transpose this backward pass, for instance because a custom_vjp "
                "holds a kernel or is not linear in its cotangent. Write rows=8, or any number of gradients that fit "
                f"into memory, in linearize or balanced_value_and_grad. JAX says: {error}"
            ) from error

    def _shapes(self) -> Any:
        return jax.eval_shape(self._pull, jax.ShapeDtypeStruct((self.num_tasks,), accumulator_dtype()))

    def _units(self) -> Array:
        """Return the unit cotangents in blocks, the last padded with zeros."""
        size = self._block or 1
        blocks, dtype = -(-self.num_tasks // size), flatten_losses(self.losses).dtype
        return jnp.eye(blocks * size, self.num_tasks, dtype=dtype).reshape(blocks, size, -1)

    def _rows(self, units: Array) -> list[Array]:
        return jax.vmap(self._pull)(units)

    def __jax_array__(self, *_: Any) -> Any:
        """Raise, as there are no entries to compute with."""
        raise TypeError(_OPAQUE)

    __mul__ = __rmul__ = __pow__ = __add__ = __radd__ = __truediv__ = __neg__ = __jax_array__

    @property
    def shape(self) -> Any:
        """Raise, as there are no entries to compute with."""
        raise AttributeError(_OPAQUE)

    dtype = real = shape


_OPAQUE = (
    "A TaskJacobian has no entries to compute with. Transformations of the gradients come after its rows(), or before "
    "the method in mtlgrad_jax.chain, which makes them. It crosses no jit, scan or vmap: make it inside."
)


def _fit(direction: PyTree, params: PyTree) -> PyTree:
    """Cast a direction to the parameters' dtypes; it must have their structure and shapes."""
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
    losses_fn: Callable[..., Any],
    *args: Any,
    argnums: Argnums = 0,
    has_aux: bool = False,
    rows: int | None = None,
    **kwargs: Any,
) -> TaskJacobian:
    """Run `losses_fn` forward once and return its Jacobian as an operator.

    The Gramian takes 2K passes and the weighted sum one. They run one after the other, so memory does not grow with
    K. JAX must be able to transpose a backward pass of your own (custom_vjp): it must be linear in its cotangent,
    without clipping or kernels. `rows` instead computes that many gradients at a time, for Gramian, sum and
    pushforward. This needs no transpose, and products of gradients are accurate to float32 with 16-bit losses and
    with the default precision of GPUs and TPUs.

    Inside `jax.shard_map`, average the losses over the devices that share the batch, `jax.lax.pmean(losses, axis)`, and
    leave `check_vma` on.

    Args:
      losses_fn: returns a (K,) array or a pytree of K scalars; with `has_aux`, a pair of losses and anything else.
      *args: its arguments.
      argnums: arguments to differentiate with respect to. Leaves that are not floating get zero gradients.
      has_aux: whether `losses_fn` returns (losses, aux).
      rows: number b of gradients computed at a time: the Gramian then costs K + K(K/b - 1)/2 backward passes and the
        sum K, with the memory of 2b gradients. None: one backward pass at a time, through the transpose.
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
    if rows is not None:
        check_count("rows", rows, at_least=1)
    function, floating, rest = bind(losses_fn, args, kwargs, argnums, has_aux)
    check_tracked()
    losses, vjp, aux = jax.vjp(function, floating, has_aux=True)
    check_averaged(losses, floating)
    return TaskJacobian(losses, aux, vjp, rest, None if rows is None else min(rows, len(flatten_losses(losses))))
