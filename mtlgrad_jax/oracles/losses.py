"""Calls the user's loss function, checks what it returns, and sets aside leaves that cannot be differentiated."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtlgrad_jax._core.checks import check_flag, check_function, leaf_name

Argnums = int | Sequence[int]


def check_oracle(losses_fn: Any, argnums: Any, has_aux: Any) -> None:
    """Raise a ValueError unless these are a function, positions of its arguments and a bool."""
    check_function("losses_fn", losses_fn)
    check_flag("has_aux", has_aux)
    positions = argnums if isinstance(argnums, (list, tuple)) else [argnums]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in positions):
        raise ValueError(f"`argnums` must be an int or a sequence of ints, got argnums={argnums!r}.")


class Rest(NamedTuple):
    """The differentiated arguments without their floating leaves; hashable."""

    treedef: Any
    fixed: tuple[tuple[tuple[int, ...], str] | None, ...]  # shape and dtype of a leaf that is not floating, else None

    def fill(self, gradients: list[Array], leading: tuple[int, ...] = ()) -> PyTree:
        """Return the user's tree with gradients as leaves, and zeros for leaves that are not floating."""
        remaining = iter(gradients)
        leaves = [next(remaining) if leaf is None else jnp.zeros((*leading, *leaf[0]), leaf[1]) for leaf in self.fixed]
        return self.treedef.unflatten(leaves)

    def part(self, flags: list[bool]) -> tuple["Rest", list[int]]:
        """Return the Rest of a tree with None in place of other leaves, and the indices of its floating leaves."""
        chosen = [i if flag else None for i, flag in enumerate(flags)]
        order, floating = [i for i in chosen if i is not None], [i for i, leaf in enumerate(self.fixed) if leaf is None]
        rest = Rest(jax.tree.structure(self.treedef.unflatten(chosen)), tuple(self.fixed[i] for i in order))
        return rest, [floating.index(i) for i in order if self.fixed[i] is None]

    def pick(self, tree: PyTree) -> list[Array]:
        """Return the floating leaves of a tree like the user's."""
        leaves = zip(self.treedef.flatten_up_to(tree), self.fixed, strict=True)
        return [jnp.asarray(leaf) for leaf, fixed in leaves if fixed is None]


def bind(
    losses_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Argnums, has_aux: bool
) -> tuple[Callable[[list[Array]], tuple[PyTree, Any]], list[Array], Rest]:
    """Return `losses_fn` as a function of the floating leaves, these leaves, and the rest."""
    single = isinstance(argnums, int)
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    if any(not -len(args) <= i < len(args) for i in positions):
        raise ValueError(f"`argnums` must name positional arguments, {len(args)} were given, got argnums={argnums}.")
    selected = args[positions[0]] if single else tuple(args[i] for i in positions)
    treedef: Any
    check_differentiable(selected)
    leaves, treedef = jax.tree.flatten(selected)
    fixed = tuple(
        None if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else (jnp.shape(leaf), jnp.result_type(leaf).name)
        for leaf in leaves
    )
    others = iter(leaf for leaf, own in zip(leaves, fixed, strict=True) if own is not None)
    constants = [None if own is None else next(others) for own in fixed]

    def function(floating: list[Array]) -> tuple[PyTree, Any]:
        values = iter(floating)
        whole = treedef.unflatten([next(values) if own is None else c for own, c in zip(fixed, constants, strict=True)])
        called = list(args)
        for i, value in zip(positions, [whole] if single else whole, strict=True):
            called[i] = value
        return read_losses(losses_fn(*called, **kwargs), has_aux)

    rest = Rest(treedef, fixed)
    return function, rest.pick(selected), rest


def _is_nnx(node: Any) -> bool:
    return any(cls.__module__.startswith("flax.nnx") and cls.__name__ == "Module" for cls in type(node).__mro__)


def check_differentiable(args: PyTree, must: str = "`argnums` must name") -> None:
    """Raise a ValueError unless these are trees of arrays of real numbers."""
    if any(_is_nnx(node) for node in jax.tree.leaves(args, is_leaf=_is_nnx)):
        raise ValueError(
            f"{must} trees of arrays, got an nnx.Module, whose BatchNorm statistics and dropout keys would "
            "not move. Use task_value_and_grad or balanced_value_and_grad of mtlgrad_jax.integrations.nnx; or write "
            "graphdef, params, rest = nnx.split(model, nnx.Param, ...), differentiate in params, and nnx.merge inside "
            "losses_fn."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise ValueError(
                f"{must} trees of arrays, got {type(leaf).__name__}{at_leaf(path)}. For an eqx.Module, "
                "write params, static = eqx.partition(model, eqx.is_inexact_array), differentiate in params, and "
                "eqx.combine inside losses_fn."
            ) from error
        if jnp.issubdtype(dtype, jnp.complexfloating) or jnp.issubdtype(dtype, jax.dtypes.extended):
            raise ValueError(
                f"{must} trees of real numbers, got dtype {dtype}{at_leaf(path)}. "
                "Split complex leaves into their parts; pass random keys as another argument."
            )
    if not any(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(args)):
        raise ValueError(f"{must} trees with a floating leaf, got none.")


def read_losses(out: Any, has_aux: bool) -> tuple[PyTree, Any]:
    """Return losses and aux from what `losses_fn` returned; raise a ValueError unless they are K losses."""
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"`losses_fn` must return (losses, aux) under has_aux=True, got {type(out).__name__}.")
    losses, aux = out if has_aux else (out, None)
    check_losses(losses, has_aux)
    return jax.tree.map(jnp.asarray, losses), aux


def check_losses(losses: PyTree, has_aux: bool) -> None:
    """Raise a ValueError unless `losses` holds K losses."""
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    hint = "" if has_aux else " If it returns (losses, aux), pass has_aux=True."
    wanted = "`losses_fn` must return a (K,) array or a pytree of K scalars"
    if not any(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError(f"{wanted}, got no loss at all.")
    if len(leaves) == 1 and not leaves[0][0] and jnp.ndim(leaves[0][1]) != 1:
        raise ValueError(
            f"{wanted}, got shape {jnp.shape(leaves[0][1])}. Stack the tasks' losses before they are summed: "
            "jnp.stack([loss_a, loss_b])."
        )
    for path, leaf in leaves:
        if path and jnp.ndim(leaf) != 0:
            raise ValueError(f"{wanted}, got shape {jnp.shape(leaf)}{at_leaf(path)}.{hint}")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{wanted} of floating dtype, got {jnp.result_type(leaf)}{at_leaf(path)}.{hint}")


def check_averaged(losses: PyTree, params: list[Array]) -> None:
    """Raise a ValueError inside shard_map if the losses differ between devices but the parameters do not."""
    axes = sorted(varying(losses) - varying(params))
    if axes:
        given = repr(axes[0]) if len(axes) == 1 else repr(tuple(axes))
        raise ValueError(
            f"`losses_fn` must return the same losses on all devices, got some that vary over the mesh axes {axes}. "
            f"Average them: jax.lax.pmean(losses, {given})."
        )


def check_tracked() -> None:
    """Raise a ValueError inside shard_map if JAX does not track what varies over the mesh."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes and not varying(jax.lax.axis_index(axes[0])):
        raise ValueError(
            "linearize inside jax.shard_map needs check_vma=True: otherwise JAX transposes averages over devices as if "
            "they were sums, and the Gramian would be wrong."
        )


def varying(tree: PyTree) -> frozenset[str]:
    """Return the mesh axes over which some leaf varies, as far as JAX tracks them inside shard_map."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def at_leaf(path: Sequence[Any]) -> str:
    """Return the location of a leaf for an error message; empty for a bare array."""
    return f" at {leaf_name(path)}" if path else ""


def count_losses(losses: PyTree) -> tuple[int, bool]:
    """Return K from losses or their shapes, and whether they are separate entries of a pytree rather than one array."""
    leaves = jax.tree.leaves(losses)
    separate = len(leaves) > 1 or leaves[0].ndim == 0
    return (len(leaves) if separate else leaves[0].shape[0]), separate


def flatten_losses(losses: PyTree) -> Array:
    """Return the K losses as (K,)."""
    leaves = jax.tree.leaves(losses)
    return leaves[0] if len(leaves) == 1 and jnp.ndim(leaves[0]) == 1 else jnp.stack(leaves)


def loss_of(losses: PyTree, task: Any) -> Array:
    """Return one task's loss; for a pytree and a task known at trace time, independent of the other losses."""
    leaves = jax.tree.leaves(losses)
    known = len(leaves) > 1 and not isinstance(task, jax.Array)
    return leaves[int(task)] if known else flatten_losses(losses)[task]
