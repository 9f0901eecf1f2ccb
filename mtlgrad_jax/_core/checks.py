"""Argument checks with one message shape: "`alpha` must be >= 0, got alpha=-1.0."."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    """Raise a ValueError unless `value` is one real number, finite and in the given range if it is not traced."""
    if getattr(value, "ndim", 0):
        raise ValueError(f"`{name}` must be a number, got an array of shape {value.shape}.")
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_real(value):
        raise ValueError(f"`{name}` must be a number, got {name}={value!r}.")
    dtype, number = jnp.result_type(float), value if isinstance(value, int) else float(value)
    if not abs(number) <= float(jnp.finfo(dtype).max):
        raise ValueError(f"`{name}` must be a finite {dtype}, got {name}={value}.")
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
    """Raise a ValueError unless a per-task argument holds numbers in the given range, or may be None and is.

    With `nonzero`, not all of them may be zero.
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


def check_function(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"`{name}` must be a function, got {name}={value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {listed}, got {name}={value!r}.")


def leaf_name(path: Sequence[Any]) -> str:
    """Return how error messages call the leaf at a tree path."""
    return f"leaf {jax.tree_util.keystr(tuple(path))}" if path else "the gradient"
