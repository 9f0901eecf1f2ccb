"""`Method`, the one kind of object of this library, and the two ways to make one from a formula.

    update -> canonical -> wrappers, outer to inner -> read_step -> formula -> commit

The outermost `Method` checks the arguments of an update and gives them one form (`canonical`). The innermost one keeps
from its formula whatever is absent or not finite (`read_step`), and works out the next state and its `Info` (`commit`).
"""

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._core.checks import check_count, check_flag, check_function, check_state, check_surroundings, leaf_name
from mtlgrad_jax._core.control import cond, map_leaves, once, promoting
from mtlgrad_jax._core.joined import Leaves, joined, marked
from mtlgrad_jax._core.step import (
    STANDARD,
    TASK_MASK,
    Argument,
    MethodState,
    Step,
    canonical,
    commit,
    first_info,
    is_canonical,
    keep_infos,
    mark_skipped,
    read_step,
    task_axes,
    was_empty,
    was_skipped,
)
from mtlgrad_jax._core.tasks import Jacobian, accumulator_dtype, check_num_tasks, own_losses, task_vector
from mtlgrad_jax._core.trees import row_shapes, unaliased
from mtlgrad_jax._core.weights import fit, uniform
from mtlgrad_jax.solvers._solution import FAILED, Solution, closed_form, in_full_precision

Gramian = Float[Array, "K K"]
Losses = Float[Array, " K"]
Weights = Float[Array, " K"] | Solution
LazyGramian = Gramian | Callable[[], Gramian]


class Method(optax.GradientTransformationExtraArgs):
    """An optax transformation from K gradients to one.

    Attributes:
      init: `init(params) -> state`; params are not stacked. JAX must be able to trace it, since every update compares
        its state's shapes with those of `init`.
      update: `update(task_grads, state, params=None, **extra_args) -> (gradient, state)`; `task_grads` is a stack,
        leaves `(K, *parameter shape)`, or a TaskJacobian.
      weigh: `weigh(gramian, state, **extra_args) -> (weights, state)`, or None if the gradient is not a weighted sum
        of the task gradients. `gramian` may be a function that returns it, called only if the Gramian is needed.
      arguments: what `update` and `weigh` look at besides the gradients.
      mean_like: whether the weights of alike tasks are proportional to 1/K, so that a subset counts for its share.
      leaves_alike: whether init and update treat all leaves alike; always true of a weighted sum.
    """

    weigh: Callable[..., tuple[Float[Array, " K"], PyTree]] | None = None
    arguments: tuple[Argument, ...] = (TASK_MASK,)
    mean_like: bool = False
    leaves_alike: bool = False
    looks: bool = False  # whether `weigh` always uses the Gramian, and gives zero weights if that is not finite

    def __new__(
        cls,
        init: Callable[[PyTree], PyTree],
        update: Callable[..., tuple[PyTree, PyTree]] | None = None,
        weigh: Callable[..., tuple[Float[Array, " K"], PyTree]] | None = None,
        arguments: Iterable[Argument] = (),
        *,
        like: Any = None,
        mean_like: bool = False,
        looks: bool = False,
        takes_jacobian: bool = False,
        num_tasks: int | None = None,
        leaves_alike: bool = False,
    ) -> "Method":
        """Make a method from functions, and add the checks that all methods share.

        The functions get the arguments of an update in one form: `losses` and all others with an entry for every task
        as (K,) arrays, `task_mask` even if it was not given, and `task_names`, those of the losses.

        Args:
          init: takes the parameters; must accept None too if there is `weigh`.
          update: takes a stack; None for the sum of the gradients with the weights that `weigh` returns.
          weigh: maps the Gramian to weights.
          arguments: what they look at; `task_mask` is always included.
          like: the wrapped transformation, which has the same arguments and scale.
          mean_like: whether the weights of alike tasks are proportional to 1/K.
          looks: whether `weigh` always uses the Gramian and gives zero weights if that is not finite.
          takes_jacobian: whether `update` takes a TaskJacobian itself instead of its rows.
          num_tasks: K if made for a number of tasks, which every update checks.
          leaves_alike: whether init and update treat all leaves alike, whatever the structure of the trees. Inside
            `fs_mtl`, on one CPU, they then see short leaves joined, so init must make what follows the parameters with
            `jax.tree.map`, one array for each, with the same leading axes. Always true without `update`.
        """
        if update is None:
            if weigh is None:
                raise ValueError("`update` must be given, or `weigh`.")
            update, takes_jacobian, leaves_alike = _weighted_sum(weigh, looks), True, True
        known = tuple({id(own): own for own in (*arguments, *getattr(like, "arguments", ()), TASK_MASK)}.values())
        shared = update

        def init_fn(params: PyTree) -> PyTree:
            check_surroundings()
            reject_masked(params)
            return unaliased(init(params), params)

        def update_fn(
            task_grads: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, PyTree]:
            check_surroundings()
            outermost = not is_canonical(extra)
            if outermost and isinstance(task_grads, Jacobian):
                extra["losses"] = own_losses(task_grads, extra.get("losses"))
            if isinstance(task_grads, Jacobian) and not takes_jacobian:
                task_grads = task_grads.rows()
            reject_masked(task_grads)
            K = stacks.num_tasks(task_grads, params)
            check_num_tasks(num_tasks, K)
            if not isinstance(task_grads, Jacobian):
                task_grads = jax.tree.map(jnp.asarray, task_grads)
            if outermost:
                check_state(state, init, row_shapes(task_grads))
                extra = canonical(extra, K, known)
            return shared(task_grads, state, params, **extra)

        def weigh_fn(gramian: Any, state: PyTree, **extra: Any) -> tuple[Float[Array, " K"], PyTree]:
            assert weigh is not None
            if not is_canonical(extra):
                extra = canonical(extra, _count_tasks(gramian, extra.get("losses"), num_tasks), known)
            check_num_tasks(num_tasks, len(extra["task_mask"]))
            return weigh(gramian, state, **extra)

        self = super().__new__(cls, promoting(init_fn), promoting(update_fn))
        self.weigh, self.arguments, self.looks = weigh and promoting(weigh_fn), known, looks
        self.mean_like, self.leaves_alike = mean_like or getattr(like, "mean_like", False), leaves_alike
        return self

    def _replace(self, **changes: Any) -> "Method":
        """Return a copy with another init or update; with another update, the copy has no `weigh`."""
        new = super()._replace(**changes)
        new.arguments, new.mean_like = self.arguments, self.mean_like
        new.leaves_alike = self.leaves_alike and not changes
        if "update" not in changes:
            new.weigh, new.looks = self.weigh, self.looks
        return new


def _weighted_sum(weigh: Callable[..., Any], looks: bool) -> Callable[..., tuple[PyTree, PyTree]]:
    def update(task_grads: PyTree, state: PyTree, params: PyTree | None, **extra: Any) -> tuple[PyTree, PyTree]:
        return sum_by_weights(weigh, looks, task_grads, task_grads, state, **extra)

    return update


def sum_by_weights(
    weigh: Callable[..., Any],
    looks: bool,
    shown: PyTree,
    task_grads: PyTree,
    state: PyTree,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Return the sum of the gradients with weights computed from the Gramian of `shown`, and the next state."""
    weights, new_state = weigh(lambda: stacks.gramian(shown, extra["task_mask"]), state, **extra)
    if isinstance(task_grads, Jacobian):
        gradient, finite = task_grads.pullback_and_check(weights)
        return skip_unless(finite, gradient, new_state, state)
    gradient = stacks.combine(weights, task_grads)
    if looks and not _narrow(gradient):
        return gradient, new_state
    return skip_unless(stacks.all_finite(gradient), gradient, new_state, state)


def weighed_over(method: Method, weigh: Callable[..., Any], part: Callable[[PyTree], PyTree]) -> Method:
    """Return a method that computes its weights from a part of the stack and applies them to all of it."""

    def init(params: PyTree) -> PyTree:
        part(params)
        return method.init(params)

    def update(task_grads: PyTree, state: PyTree, params: PyTree | None, **extra: Any) -> tuple[PyTree, PyTree]:
        return sum_by_weights(weigh, False, part(task_grads), task_grads, state, **extra)

    return Method(init, update, like=method, takes_jacobian=True)


def _narrow(tree: PyTree) -> bool:
    """Return whether a tree has a dtype of smaller range than the Gramian, so that it may overflow on its own."""
    wide = jnp.finfo(accumulator_dtype()).maxexp
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
    return any(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).maxexp < wide for dtype in dtypes)


def skip_unless(finite: Array, gradient: PyTree, new_state: PyTree, old_state: PyTree) -> tuple[PyTree, PyTree]:
    """Return gradient and new state if `finite`, else zero and the old state, whose infos count a skipped step."""
    finite = once(finite)
    gradient = map_leaves(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), gradient)
    return gradient, map_leaves(lambda new, old: jnp.where(finite, new, old), new_state, mark_skipped(old_state))


def skip_together(gradient: PyTree, new_state: PyTree, old_state: PyTree) -> tuple[PyTree, PyTree]:
    """Skip a step of several parts if any part is not finite or was itself skipped; without tasks, only infos move."""
    finite = stacks.all_finite(gradient) & ~was_skipped(new_state)
    return skip_unless(finite, gradient, still_if_empty(new_state, old_state), old_state)


def still_if_empty(new_state: PyTree, old_state: PyTree) -> PyTree:
    """Return the new state, or after a step that changed nothing the old one with the new infos."""
    empty = once(was_empty(new_state))
    return map_leaves(lambda new, old: jnp.where(empty, old, new), new_state, keep_infos(old_state, new_state))


def from_kernel(
    kernel: Callable[..., Any],
    init: Callable[[Any], PyTree] | None = None,
    *,
    arguments: Iterable[Argument] = (),
    num_tasks: int | None = None,
    per_task: dict[str, PyTree] | None = None,
    fewest: int = 1,
    mean_like: bool = False,
) -> Method:
    """Make a method from a formula for its weights; everything that all methods share happens here, once.

    The names of the formula's keyword arguments determine what it gets:

    - `gramian`: the K×K Gramian of the gradients,
    - `losses`: the K losses,
    - `cross_gramian`, `new_losses`: the update's argument of this name; if it is missing, the Gramian or the losses are
      used instead, and the result code says so,
    - `epoch_end` (a flag), `scores`, `preference`: the update's argument of this name; without a preference, None,
    - `present`: which tasks take part in this step, (K,) bool,
    - `state`: its own state; the formula then returns `(weights, state)`, otherwise only the weights.

    A keyword with a default is passed only if `arguments` declares it.

    Inputs are finite, float32 (float64 under x64) and treated as constants in differentiation. Rows and columns of
    absent tasks are zero and their losses one; whatever the formula returns for them is ignored. Named tasks are
    flattened; missing arguments and wrong shapes raise. If a loss or gradient is not finite, the weights are zero. If
    too few tasks are present, their mean is used. Both are counted in the state's `info`.

    Args:
      kernel: the formula; its weights are (K,) or a solver's Solution. If they are not finite, or the Solution has
        FAILED, the mean is used, and counted.
      init: `init(num_tasks)` makes the method's own state; None for a method without state.
      arguments: other or stricter arguments of the update than those above, such as `POSITIVE_LOSSES`.
      num_tasks: K, if the method keeps per-task state: axes whose length depends on K hold one entry per task.
      per_task: the per-task arguments of the factory, or functions that return them, checked against the tasks' names
        and number.
      fewest: tasks that must be present; with fewer, the weights are those of the mean.
      mean_like: whether the weights of alike tasks are proportional to 1/K; `grouped` then keeps the mean's scale.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> def louder(*, gramian):  # weights by squared gradient norm
      ...     return jnp.diagonal(gramian)
      >>> tx = mtl.from_kernel(louder)
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.0, 27.0]
    """
    declared, wanted = declare("kernel", kernel, ("gramian", "present", "state"), arguments)
    _check_parts(init, num_tasks, fewest)
    check_flag("mean_like", mean_like)
    _check_per_task(per_task)
    known_tasks = num_tasks

    def init_fn(params: PyTree) -> MethodState:
        return MethodState(optax.EmptyState() if init is None else init(known_tasks), first_info())

    def weigh(
        gramian: LazyGramian | None, state: MethodState, *, task_names: Any, **extra: Any
    ) -> tuple[Float[Array, " K"], MethodState]:
        crossed = any(a.stand_in == "gramian" and extra.get(a.name) is None for a in declared)
        matrix = as_matrix(gramian, known_tasks) if "gramian" in wanted or crossed else None
        step = read_step(declared, name=_name(kernel), gramian=matrix, **extra)
        K = len(step.present)
        _check_fit(per_task, K, task_names)
        nobody = ~jnp.any(step.present)  # the formula then sees everybody, with neutral values, and divides by no zero
        given = {"present": step.present | nobody, "state": state.method, **step.values}
        with in_full_precision():
            solved = kernel(**{name: given[name] for name in wanted})
        solved, method_state = solved if "state" in wanted else (solved, state.method)
        if not isinstance(solved, Solution):
            solved = closed_form(solved)
        if jnp.shape(solved.value) != (K,):
            raise ValueError(f"`kernel` must return weights of shape ({K},), got shape {jnp.shape(solved.value)}.")
        axes = task_axes(None if init is None else lambda K: jax.eval_shape(lambda: init(K)), known_tasks)
        sane = fit(solved.value, step.values["gramian"] if "gramian" in wanted else None, step.present)
        sane = sane & (solved.result != FAILED)
        new_state, enough = commit(step, state, method_state, axes, sane=sane, fewest=fewest, solved=solved)
        weights = jnp.where(enough, solved.value, uniform(step.present))
        return jnp.where(step.present, weights, 0), new_state

    looks = "gramian" in wanted
    return Method(init_fn, weigh=weigh, arguments=declared, mean_like=mean_like, looks=looks, num_tasks=num_tasks)


def from_rule(
    rule: Callable[..., Any],
    init: Callable[[PyTree, Any], PyTree] | None = None,
    *,
    arguments: Iterable[Argument] = (),
    num_tasks: int | None = None,
    per_task: dict[str, PyTree] | None = None,
    fewest: int = 1,
    leaves_alike: bool = False,
    shows_nonfinite: bool = False,
) -> Method:
    """Make a method from a rule on the stack itself: coordinate-wise, or with a buffer for every task.

    What `from_kernel` guarantees to a formula holds here for a rule, except that rows of absent tasks may hold
    anything, even NaN: select, do not multiply.

    Args:
      rule: called as `rule(task_grads, ...)` with those of the keywords `losses`, `present` and `state` that it names;
        returns the gradient, or `(gradient, state)` if it names `state`.
      init: `init(params, num_tasks)` makes the method's own state; None for a method without state.
      arguments: other or stricter arguments of the update, such as `POSITIVE_LOSSES`.
      num_tasks: K, if the method keeps per-task state: axes whose length depends on K hold one entry per task.
      per_task: the per-task arguments of the factory, checked against the tasks' names and number.
      fewest: tasks that must be present; with fewer, the gradient is their mean.
      leaves_alike: whether rule and init treat all leaves alike, whatever the structure of the trees. On one CPU, the
        rule then gets short leaves joined, which takes much less time to compile.
      shows_nonfinite: whether the gradient is not finite if that of a task present is not, as with
        `stacks.by_coordinate` and `present`. The stack is then not read once more to find that out.

    Example:
      >>> import jax, jax.numpy as jnp, mtlgrad_jax as mtl
      >>> def largest(task_grads, *, present):
      ...     seen = mtl.stacks.select(present, task_grads)
      ...     return jax.tree.map(lambda leaf: jnp.max(leaf, axis=0), seen)
      >>> tx = mtl.from_rule(largest)
      >>> update, _ = tx.update(jnp.asarray([[1.0, 0.0], [0.0, 3.0]]), tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.0, 3.0]
    """
    declared, wanted = declare("rule", rule, ("present", "state"), arguments, positional=1)
    _check_parts(init, num_tasks, fewest)
    check_flag("leaves_alike", leaves_alike)
    check_flag("shows_nonfinite", shows_nonfinite)
    _check_per_task(per_task)
    known_tasks = num_tasks

    def init_fn(params: PyTree) -> MethodState:
        return MethodState(optax.EmptyState() if init is None else init(params, known_tasks), first_info())

    def update_fn(
        task_grads: PyTree, state: MethodState, params: PyTree | None, *, task_names: Any, **extra: Any
    ) -> tuple[PyTree, MethodState]:
        step = read_step(declared, name=_name(rule), **extra)
        _check_fit(per_task, len(step.present), task_names)
        like = row_shapes(task_grads)
        if not leaves_alike:
            return advance(step, task_grads, state)

        def advance_joined(step: Step, task_grads: PyTree, state: MethodState) -> tuple[Leaves, MethodState]:
            update, new_state = advance(step, task_grads, state)
            return Leaves(update), own_marked(new_state, row_shapes(task_grads))

        return joined(advance_joined, like, step, Leaves(task_grads), own_marked(state, like))

    def advance(step: Step, task_grads: PyTree, state: MethodState) -> tuple[PyTree, MethodState]:
        def finite() -> Array:
            return jnp.all(stacks.finite_tasks(task_grads) | ~step.present)

        step = step if shows_nonfinite else step.also(finite())
        given = {"present": step.present, "state": state.method, **step.values}
        with in_full_precision():
            gradient = rule(task_grads, **{name: given[name] for name in wanted})
        gradient, method_state = gradient if "state" in wanted else (gradient, state.method)
        own = map_leaves(lambda leaf, like: leaf.astype(like.dtype), gradient, task_grads)
        fits = stacks.all_finite(own)
        if shows_nonfinite:
            step = step.also(cond(fits, lambda: fits, finite))
        fits = fits | ~step.finite | (step.num_present < fewest)
        axes = task_axes(None if init is None else partial(shapes, row_shapes(task_grads)), known_tasks)
        new_state, enough = commit(step.also(fits), state, method_state, axes, fewest=fewest)
        mean = uniform(step.present & fits)
        update = cond(enough, lambda: own, lambda: _bounded(stacks.combine(mean, task_grads)))
        return update, new_state

    def shapes(params: PyTree, num_tasks: int | None) -> PyTree:
        return known_shapes(jax.tree.structure(params), tuple(jax.tree.leaves(params)), num_tasks)

    @lru_cache
    def known_shapes(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], num_tasks: int | None) -> PyTree:
        assert init is not None
        return jax.eval_shape(lambda leaves: init(structure.unflatten(leaves), num_tasks), leaves)

    def own_marked(state: MethodState, params: PyTree) -> MethodState:
        if init is None:
            return state
        return state._replace(method=marked(state.method, lambda params: shapes(params, known_tasks), params))

    return Method(init_fn, update_fn, arguments=declared, num_tasks=num_tasks, leaves_alike=leaves_alike)


def _bounded(mean: PyTree) -> PyTree:
    """Return a mean of finite gradients, clipped to the largest number where rounding made it overflow."""

    def bound(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        largest = jnp.finfo(leaf.dtype).max
        return jnp.clip(leaf, -largest, largest)

    return map_leaves(bound, mean)


def declare(
    name: str, formula: Any, given: tuple[str, ...], arguments: Iterable[Argument], positional: int = 0
) -> tuple[tuple[Argument, ...], tuple[str, ...]]:
    """Return the arguments of the update that a formula declares by its keywords, and all keywords to pass it."""
    check_function(name, formula)
    if not isinstance(arguments, Iterable) or not all(isinstance(argument, Argument) for argument in arguments):
        raise ValueError(f"`arguments` must be a collection of Argument, got arguments={arguments!r}.")
    arguments = tuple(arguments)
    standard = {argument.name: argument for argument in (*STANDARD, *arguments)}
    keywords = list(inspect.signature(formula).parameters.values())[positional:]
    own = {argument.name for argument in arguments}
    wanted = tuple(k.name for k in keywords if k.default is k.empty or k.name in own)
    unknown = sorted(set(wanted) - {*given, *standard})
    if unknown:
        known = ", ".join([*given, *standard])
        raise ValueError(f"`{name}` must take keywords among {known}, got {', '.join(unknown)}.")
    return tuple(standard[keyword] for keyword in wanted if keyword in standard), wanted


def _check_parts(init: Any, num_tasks: Any, fewest: Any) -> None:
    if init is not None:
        check_function("init", init)
    if num_tasks is not None:
        check_count("num_tasks", num_tasks, at_least=1)
    check_count("fewest", fewest, at_least=1)


def _check_per_task(per_task: Any) -> None:
    if not isinstance(per_task, dict | None):
        raise ValueError(f"`per_task` must be a dict of arguments by name, got per_task={per_task!r}.")


def _check_fit(per_task: dict[str, PyTree] | None, num_tasks: int, names: Any) -> None:
    for name, values in (per_task or {}).items():
        if callable(values):
            values = jax.tree.map(jnp.zeros_like, jax.eval_shape(values))
        if values is not None:
            task_vector(name, values, num_tasks=num_tasks, names=names)


def _name(formula: Any) -> str:
    return getattr(formula, "__qualname__", repr(formula)).split(".")[0]


def as_matrix(gramian: Any, num_tasks: int | None) -> Gramian:
    """Return the Gramian given to `weigh`, or raise a ValueError."""
    matrix = gramian() if callable(gramian) else gramian
    if matrix is None:
        raise ValueError("`gramian` must be a (K, K) array or a function that returns one, got None.")
    K = "K" if num_tasks is None else num_tasks
    shape = jnp.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"`gramian` must have shape ({K}, {K}), got shape {shape}.")
    return matrix


def _count_tasks(gramian: Any, losses: PyTree, num_tasks: int | None) -> int:
    if gramian is not None and not callable(gramian):
        return len(as_matrix(gramian, num_tasks))
    if losses is not None:
        return task_vector("losses", losses).shape[0]
    if num_tasks is not None:
        return num_tasks
    if gramian is None:
        raise ValueError("`gramian` must be given where neither losses nor num_tasks tell the number of tasks.")
    return jax.eval_shape(gramian).shape[0]


def update_without_task_axis(
    name: str,
    transform: optax.GradientTransformation,
    task_grads: PyTree,
    state: PyTree,
    params: PyTree | None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Update with the transformation given as the argument `name`; raise if a leaf comes out with its task axis."""
    update, new_state = optax.with_extra_args_support(transform).update(task_grads, state, params, **extra)
    if isinstance(task_grads, Jacobian):
        return update, new_state
    for (path, leaf), rows in zip(
        jax.tree_util.tree_leaves_with_path(update), jax.tree.leaves(task_grads), strict=True
    ):
        got, expected = jnp.shape(leaf), jnp.shape(rows)[1:]
        if got != expected:
            raise ValueError(
                f"`{name}` must take the task axis away: {leaf_name(path)} came out with shape {got}, expected "
                f"{expected}. Begin it with a method: optax.chain(mtlgrad_jax.mean(), ...)."
            )
    return update, new_state


def check_transformation(method: Any) -> None:
    """Raise unless `method` is a transformation."""
    if not isinstance(method, optax.GradientTransformation):
        raise ValueError(
            f"`method` must be a transformation such as mtlgrad_jax.cagrad(), got {type(method).__name__}."
        )


def weights_of(method: Any, wrapper: str) -> Callable[..., tuple[Float[Array, " K"], PyTree]]:
    """Return the `weigh` of a method, or raise an error that names the wrapper that needs it."""
    check_transformation(method)
    weigh = getattr(method, "weigh", None)
    if weigh is None:
        raise ValueError(
            f"`method` must combine the tasks by weights, as mtlgrad_jax.cagrad() does: {wrapper} changes weights, got "
            f"{type(method).__name__} without any. Chain and wrap (inject_hyperparams, shared_private, ...) around it."
        )
    return weigh


def reject_masked(tree: PyTree) -> None:
    """Raise if leaves are masked out: they would keep their task axis."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    for path, leaf in leaves:
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"`params` must be a whole tree, got a MaskedNode at {leaf_name(path)}. optax.masked, multi_transform "
                "and partition pass on leaves that still have a task axis, and such a leaf changes its parameter's "
                "shape. Use mtlgrad_jax.partition(transforms, labels) for a method per group of leaves, "
                "mtlgrad_jax.shared_private(method, is_shared) for shared and task-specific leaves, "
                "mtlgrad_jax.grouped(method, labels) for a solve of one method per group, and for parameters that do "
                "not train optax.freeze(...) before the method."
            )
