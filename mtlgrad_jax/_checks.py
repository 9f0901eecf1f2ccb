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
    """Raise a ValueError unless `value` is one number, in the given range if it is not traced."""
    if getattr(value, "ndim", 0):
        raise ValueError(f"`{name}` must be a number, got an array of shape {value.shape}.")
    if isinstance(value, jax.core.Tracer):
        return
    if not isinstance(value, (int, float)) and not (
        hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.number)
    ):
        raise ValueError(f"`{name}` must be a number, got {name}={value!r}.")
    for bound, ok, sign in (
        (at_least, at_least is None or np.all(value >= at_least), ">="),
        (at_most, at_most is None or np.all(value <= at_most), "<="),
        (above, above is None or np.all(value > above), ">"),
        (below, below is None or np.all(value < below), "<"),
    ):
        if not ok:
            raise ValueError(f"`{name}` must be {sign} {bound:g}, got {name}={value}.")


def check_numbers(name: str, values: Any, *, optional: bool = False, at_least: float | None = None) -> None:
    """Raise a ValueError unless a per-task argument holds numbers in the given range, or may be None and is."""
    leaves = jax.tree.leaves(values)
    if not leaves and not (optional and values is None):
        raise ValueError(f"`{name}` must hold a number for every task, got {name}={values!r}.")
    for value in leaves:
        if not isinstance(value, jax.core.Tracer):
            for number in np.ravel(value):
                check_number(name, number, at_least=at_least)


def check_count(name: str, value: Any, *, at_least: int) -> None:
    """Raise a ValueError unless `value` is a static Python int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"`{name}` must be a static Python int, got {name}={value!r}. "
            f"Under optax.inject_hyperparams, list it: static_args=('{name}',)."
        )
    check_number(name, value, at_least=at_least)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {listed}, got {name}={value!r}.")


def leaf_name(path: Sequence[Any]) -> str:
    """Return how error messages call the leaf at a tree path."""
    return f"leaf {jax.tree_util.keystr(tuple(path))}" if path else "the gradient"
