"""From weightings and tree-level rules to optax transformations."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from mtlgrad_jax import stacks
from mtlgrad_jax._checks import check_function, leaf_name
from mtlgrad_jax._control import cond
from mtlgrad_jax._step import MethodState, first_info, guard_step, mark_skipped, was_skipped
from mtlgrad_jax._tasks import accumulator_dtype, check_num_tasks, present_tasks, task_vector
from mtlgrad_jax._trees import unaliased
from mtlgrad_jax.weighting._base import Weighting, check_needs, check_parts

P = ParamSpec("P")
Rule = Callable[[PyTree, Any, Any, Bool[Array, " K"]], tuple[PyTree, Any]]


class TaskTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation from stacked per-task gradients, leaves (K, *shape), to one gradient, leaves shape.

    Attributes:
      init: `init(params) -> state`; params are not stacked.
      update: `update(task_grads, state, params=None, *, losses=None, task_mask=None) -> (update, state)`.
      weighting: the Weighting it was made of, or None where the gradient is no weighted sum of the tasks'.
    """

    weighting: Weighting | None = None

    def __new__(
        cls,
        init: Callable[[PyTree], PyTree],
        update: Callable[..., tuple[PyTree, PyTree]],
        weighting: Weighting | None = None,
    ) -> "TaskTransformation":
        """Make one of an init and an update function that need not check their arguments."""

        def init_fn(params: PyTree) -> PyTree:
            reject_masked(params)
            return unaliased(init(params), params)

        def update_fn(
            task_grads: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, PyTree]:
            reject_masked(task_grads)
            stacks.num_tasks(task_grads, params)
            return update(jax.tree.map(jnp.asarray, task_grads), state, params, **extra)

        self = super().__new__(cls, init_fn, update_fn)
        self.weighting = weighting
        return self


def from_weighting(weighting: Weighting) -> TaskTransformation:
    """Make an optax transformation of a weighting: Gramian, weights, weighted sum.

    Args:
      weighting: of `mtlgrad_jax.weighting`, or your own: any `Weighting(init, update, needs)`.

    Returns:
      A transformation whose state is the weighting's.

    Example:
      >>> import jax.numpy as jnp, mtlgrad_jax as mtl
      >>> def louder(gramian, state, losses, present):  # a method of your own: weights by squared gradient norm
      ...     return jnp.diagonal(gramian), state
      >>> tx = mtl.from_weighting(mtl.weighting.from_kernel(louder))
      >>> grads = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> update.tolist()
      [1.0, 27.0]
    """
    if not isinstance(weighting, Weighting):
        raise ValueError(
            f"`weighting` must be a Weighting such as mtlgrad_jax.weighting.cagrad(), got {type(weighting).__name__}."
        )

    return weighted_sum(weighting)


def weighted_sum(weighting: Weighting, seen: Callable[[PyTree], PyTree] | None = None) -> TaskTransformation:
    """Make a transformation of a weighting that is shown all of a stack, or what `seen` makes of it."""

    def init(params: PyTree) -> PyTree:
        if seen is not None:
            seen(params)
        return weighting.init()

    def update(
        task_grads: PyTree,
        state: PyTree,
        params: PyTree | None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        K, shown = stacks.num_tasks(task_grads), task_grads if seen is None else seen(task_grads)
        present = present_tasks(task_mask, K, losses)
        if losses is not None:
            task_vector("losses", losses, num_tasks=K)
        weights, new_state = weighting.update(
            lambda: stacks.gramian(shown, present), state, losses=losses, task_mask=task_mask, **extra
        )
        gradient = stacks.combine(weights, task_grads)
        if seen is None:
            return settle(weighting, gradient, new_state, state)
        return skip_unless(stacks.all_finite(gradient), gradient, new_state, state)

    return TaskTransformation(init, update, None if seen else weighting)


def settle(weighting: Weighting, gradient: PyTree, new_state: PyTree, old_state: PyTree) -> tuple[PyTree, PyTree]:
    """Return gradient and state, or zero and the old state where the gradient is not finite.

    A weighting that looks at every Gramian has noticed itself, but for gradients of a dtype of smaller range.
    """
    leaves = jax.tree.leaves(gradient)
    range_seen = jnp.finfo(accumulator_dtype()).maxexp
    narrow = any(jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).maxexp < range_seen for x in leaves)
    if "gramian" in weighting.needs and not narrow:
        return gradient, new_state
    return skip_unless(stacks.all_finite(gradient), gradient, new_state, old_state)


def skip_unless(
    finite: Bool[Array, ""], gradient: PyTree, new_state: PyTree, old_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Return gradient and state, or zero and the old state, its infos counting, where something is not finite."""
    finite = stacks.once(finite)
    gradient = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), gradient)
    return gradient, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, mark_skipped(old_state))


def skip_together(gradient: PyTree, new_state: PyTree, old_state: PyTree) -> tuple[PyTree, PyTree]:
    """Skip a step of several parts where any part is not finite or was skipped itself."""
    finite = stacks.all_finite(gradient) & ~was_skipped(new_state, old_state)
    return skip_unless(finite, gradient, new_state, old_state)


def from_rule(
    rule: Rule,
    init: Callable[[PyTree], PyTree] | None = None,
    *,
    needs: Iterable[str] = (),
    num_tasks: int | None = None,
    fewest: int = 1,
) -> TaskTransformation:
    """Make an optax transformation of a method that is no weighting: coordinate-wise or with K buffers.

    What `weighting.from_kernel` promises to a formula on the Gramian holds here for one on the stack, but rows of
    absent tasks may hold anything: select, do not multiply.

    Args:
      rule: `(task_grads, state, losses, present) -> (gradient, state)`.
      init: makes the method's own state of params; None for a method without state.
      needs: "losses", "positive losses", or nothing; the rule gets None for what is not listed.
      num_tasks: K, where the method keeps per-task state: leaves with a leading axis K, one entry per task.
      fewest: present tasks without which the gradient is their mean.
    """
    needs = check_needs(needs)
    check_parts("rule", rule, init, num_tasks, fewest)
    method_name = rule.__qualname__.split(".")[0]

    def init_fn(params: PyTree) -> MethodState:
        return MethodState(init(params) if init is not None else optax.EmptyState(), first_info())

    def update_fn(
        task_grads: PyTree,
        state: MethodState,
        params: PyTree | None,
        *,
        losses: PyTree = None,
        task_mask: PyTree = None,
        **unused: Any,
    ) -> tuple[PyTree, MethodState]:
        K = stacks.num_tasks(task_grads)
        check_num_tasks(num_tasks, K)
        guard = guard_step(method_name, needs, K, losses, task_mask)
        guard = guard.also(jnp.all(stacks.finite_tasks(task_grads) | ~guard.present))
        gradient, method_state = rule(task_grads, state.method, guard.losses, guard.present)
        intact = stacks.once(guard.intact(state, method_state, num_tasks))
        enough = intact & (guard.num_present >= fewest)

        def mean() -> PyTree:
            equal = guard.present / jnp.maximum(guard.num_present, 1).astype(accumulator_dtype())
            return stacks.combine(equal, task_grads)

        def own() -> PyTree:
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), gradient, task_grads)

        update = cond(enough & (guard.num_present > 0), own, mean)
        new_state = guard.advance(state, method_state, num_tasks=num_tasks, enough=enough, fewest=fewest, solved=intact)
        return skip_unless(stacks.all_finite(update) | ~guard.finite, update, new_state, state)

    return TaskTransformation(init_fn, update_fn)


def lift(factory: Callable[P, Weighting]) -> Callable[P, TaskTransformation]:
    """Return the optax entry point of a weighting's factory: same name, arguments and documentation."""
    check_function("factory", factory)

    def make(*args: P.args, **kwargs: P.kwargs) -> TaskTransformation:
        return from_weighting(factory(*args, **kwargs))

    return renamed(make, factory, TaskTransformation)


def renamed(make: Callable[P, Any], model: Callable[P, Any], returns: Any) -> Callable[P, Any]:
    """Give a function the name, signature and documentation of a model, as a public function of mtlgrad_jax."""
    signature = inspect.signature(model)
    make.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
    make.__annotations__ = {**model.__annotations__, "return": returns}
    make.__module__, make.__name__, make.__qualname__ = "mtlgrad_jax", model.__name__, model.__qualname__
    make.__doc__ = model.__doc__
    return make


def on_weightings(wrapper: Callable[P, Weighting]) -> Callable[P, Any]:
    """Let a wrapper Weighting -> Weighting also take a TaskTransformation, and then return one."""
    signature = inspect.signature(wrapper)
    method = next(iter(signature.parameters))

    def make(*args: P.args, **kwargs: P.kwargs) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments[method]
        if isinstance(given, Weighting):
            return wrapper(*args, **kwargs)
        bound.arguments[method] = weighting_of(given, wrapper.__name__)
        return from_weighting(wrapper(*bound.args, **bound.kwargs))

    make = renamed(make, wrapper, Weighting | TaskTransformation)
    first, *others = signature.parameters.values()
    make.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[first.replace(annotation=Weighting | TaskTransformation), *others],
        return_annotation=Weighting | TaskTransformation,
    )
    return make


def update_without_task_axis(
    name: str,
    transform: optax.GradientTransformation,
    task_grads: PyTree,
    state: PyTree,
    params: PyTree | None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Update by what was given as the argument `name`, or raise where a leaf comes out with its task axis."""
    update, new_state = optax.with_extra_args_support(transform).update(task_grads, state, params, **extra)
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
    """Raise unless a wrapper that looks at trees is given a transformation."""
    if not isinstance(method, optax.GradientTransformation):
        raise ValueError(
            f"`method` must be a transformation such as mtlgrad_jax.cagrad(), got {type(method).__name__}. "
            "mtlgrad_jax.from_weighting makes one of a Weighting."
        )


def weighting_of(method: Any, wrapper: str) -> Weighting:
    """Return the weighting inside a transformation, or raise in the name of the wrapper that needs one."""
    weighting = getattr(method, "weighting", None)
    if weighting is None:
        raise ValueError(
            f"`method` must be made of a weighting, as mtlgrad_jax.cagrad() is: {wrapper} changes weights, got "
            f"{type(method).__name__} without any. Chain and wrap (inject_hyperparams, shared_private, ...) around it."
        )
    return weighting


def reject_masked(tree: PyTree) -> None:
    """Raise if leaves are hidden from a method: they would keep their task axis."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    for path, leaf in leaves:
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"`params` must be a whole tree, got a MaskedNode at {leaf_name(path)}. optax.masked, multi_transform "
                "and partition let leaves pass by that still have a task axis, and such a leaf changes its parameter's "
                "shape. Use mtlgrad_jax.partition(transforms, labels) for a method per group of leaves, "
                "mtlgrad_jax.shared_private(method, is_shared) for shared and task-specific leaves, "
                "mtlgrad_jax.grouped(method, labels) for a solve of one method per group."
            )
