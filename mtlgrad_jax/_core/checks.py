"""Argument checks with one message shape: "`alpha` must be >= 0, got alpha=-1.0."."""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Number = float | Float[Array, ""]
"""A hyper-parameter that may be traced, as under optax.inject_hyperparams."""


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a ValueError unless `value` is one real number; if it is not traced, it must be finite and in range."""
    if getattr(value, "ndim", 0):
        raise ValueError(f"`{name}` must be a number, got an array of shape {value.shape}.")
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_real(value):
        raise ValueError(f"`{name}` must be a number, got {name}={value!r}.")
    dtype, number = jnp.result_type(float), value if isinstance(value, int) else float(value)
    if not abs(number) <= float(jnp.finfo(dtype).max):
        raise ValueError(f"`{name}` must be a finite {dtype}, got {name}={value}.")
    number = float(np.asarray(number, dtype))  # what the formula sees
    number = 0.0 if abs(number) < float(jnp.finfo(dtype).tiny) else number
    for bound, ok, sign in (
        (at_least, at_least is None or number >= at_least, ">="),
        (at_most, at_most is None or number <= at_most, "<="),
        (above, above is None or number > above, ">"),
        (below, below is None or number < below, "<"),
    ):
        if not ok:
            raise ValueError(f"`{name}` must be {sign} {bound:g}, got {name}={value}.")


def _is_real(value: Any) -> bool:
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_numbers(
    name: str, values: Any, *, optional: bool = False, nonzero: bool = False, **bounds: float | None
) -> None:
    """Raise a ValueError unless a per-task argument holds numbers in the given range.

    With `optional`, None is accepted too. With `nonzero`, not all numbers may be zero.
    """
    if optional and values is None:
        return
    leaves = jax.tree.leaves(values, is_leaf=lambda node: node is None)
    if not leaves:
        raise ValueError(f"`{name}` must hold a number for every task, got {name}={values!r}.")
    known = [leaf for leaf in leaves if not isinstance(leaf, jax.core.Tracer)]
    for leaf in known:
        for number in np.ravel(leaf):
            check_number(name, number, **bounds)
    if nonzero and len(known) == len(leaves) and not any(map(np.any, known)):
        raise ValueError(f"`{name}` must be nonzero for some task, got {name}={values!r}.")


def as_array(name: str, values: Any) -> Array:
    """Return values as an array, or raise a ValueError if they are complex or JAX has no array for them."""
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`{name}` must hold numbers or flags, got {values!r}.") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"`{name}` must be real, got dtype {array.dtype}.")
    return array


def as_floats(name: str, values: Any) -> np.ndarray:
    """Return real numbers as an array on the host, or raise a ValueError."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if not _is_real(array):
        raise ValueError(f"`{name}` must hold real numbers, got {name}={values!r}.")
    return array.astype(float)


def check_count(name: str, value: Any, *, at_least: int) -> None:
    """Raise a ValueError unless `value` is a static Python int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"`{name}` must be a static Python int, got {name}={value!r}. "
            f"Under optax.inject_hyperparams, list it: static_args=('{name}',)."
        )
    check_number(name, value, at_least=at_least)


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a static bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {name}={value!r}.")


def check_dtype(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is None or a floating dtype that JAX can hold."""
    if value is None:
        return
    try:
        dtype = jnp.dtype(value)
    except (TypeError, ValueError):
        dtype = np.dtype(object)
    if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`{name}` must be a floating dtype or None, got {name}={value!r}. float64 needs jax_enable_x64."
        )


def check_function(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is callable."""
    if not callable(value):
        raise ValueError(f"`{name}` must be a function, got {name}={value!r}.")


_NOT_AROUND = {
    ("optax.transforms._conditionality", None): (
        "optax.apply_if_finite and conditional transformations expect updates of the gradients' shape. Use "
        "mtlgrad_jax.chain(method, optimizer), which changes nothing in a step with a NaN or inf; "
        "mtlgrad_jax.skip_nonfinite_tasks(method) leaves out the tasks that have one"
    ),
    ("optax.contrib._sam", "transparent_update_fn"): (
        "optax.contrib.sam stores gradients of the parameters' shape. Use mtlgrad_jax.fs_mtl(method, ...), or "
        "opaque_mode=True with a grad_fn that returns a stack"
    ),
    ("optax.contrib._mechanic", None): (
        "optax.contrib.mechanize compares gradients with parameters. Put it after the method: "
        "mtlgrad_jax.chain(method, optax.contrib.mechanize(optimizer))"
    ),
    ("optax.contrib._galore", None): (
        "optax.contrib.galore projects gradients of the parameters' shape. Put it after the method: "
        "mtlgrad_jax.chain(method, optax.contrib.galore(...))"
    ),
    ("optax.transforms._layouts", None): (
        "optax.flatten makes one vector of all gradients. Put it after the method: "
        "mtlgrad_jax.chain(method, optax.flatten(optimizer))"
    ),
    ("optax.transforms._accumulation", None): (
        "optax.MultiSteps adds up gradients of the parameters' shape. Use mtlgrad_jax.accumulate(tx, num_tasks, steps)"
    ),
    ("optax.transforms._monitoring", None): (
        "optax.monitor passes on what it measures, here a stack. Put it after the method: "
        "optax.chain(mtlgrad_jax.chain(method, optimizer), optax.monitor(...))"
    ),
}


def check_surroundings() -> None:
    """Raise if called by init or update of an optax wrapper that cannot wrap a method, which removes the task axis.

    Without this check, JAX would raise an obscure error about lax.cond, or none at all.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("optax."):
            for function in (None, frame.f_code.co_name):
                if (module, function) in _NOT_AROUND:
                    raise ValueError(f"A method cannot be used there: {_NOT_AROUND[module, function]}.")
        frame = frame.f_back


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {listed}, got {name}={value!r}.")


def check_state(state: PyTree, init: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raise unless the leaves of a state have the shapes of those that `init` returns for such parameters."""
    like = jax.eval_shape(init, params)
    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(like):
        return
    paths = jax.tree_util.tree_leaves_with_path(like)
    for (path, wanted), leaf in zip(paths, jax.tree.leaves(state), strict=True):
        if jnp.shape(leaf) != wanted.shape:
            raise ValueError(
                f"`state` must be made by init, with the same num_tasks and parameters: {leaf_name(path)} has shape "
                f"{jnp.shape(leaf)}, expected {wanted.shape}. If num_tasks changed between two runs, make a new state "
                "of the method and keep that of the optimizer: see `Another number of tasks` in docs/scaling.md."
            )


def leaf_name(path: Sequence[Any]) -> str:
    """Return the name of the leaf at a tree path for error messages."""
    return f"leaf {jax.tree_util.keystr(tuple(path))}" if path else "the gradient"
