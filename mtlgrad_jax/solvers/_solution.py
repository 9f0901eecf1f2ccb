"""The result type of all solvers, and helpers that they share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SOLVED = 0
MAX_STEPS = 1
TOO_FEW_TASKS = 2
NO_TASKS = 3
NONFINITE = 4
FAILED = 5
BIASED = 6
INFEASIBLE = 7
LAGGED = 8

RESULTS = {
    SOLVED: "Solved.",
    MAX_STEPS: "The solver stopped at its maximum number of steps; `residual` tells how close it came. Likely causes: "
    "(a) gradients that are almost Pareto stationary, (b) row norms more than about 1e6 apart, (c) float32.",
    TOO_FEW_TASKS: "Fewer tasks were present than the method needs: the mean of those present was used.",
    NO_TASKS: "No task was present: the update is zero.",
    NONFINITE: "A present task had a loss or gradient with a NaN or inf, a gradient whose square overflows, or a loss "
    "outside the method's domain (<= 0 if it takes the logarithm or divides by it), or the update overflows: the "
    "update is zero and the state unchanged. Wrap the method in `skip_nonfinite_tasks` to drop only the tasks that "
    "cause this.",
    FAILED: "The method's weights, the weighted sum of the gradients or the next state would not be finite, or are not "
    "defined for these gradients: the mean of the tasks present is used and the state unchanged.",
    BIASED: "No `cross_gramian` was given: the Gramian of one batch was used instead, which biases the method.",
    INFEASIBLE: "No direction satisfies the method's constraints: the fallback gradient in its documentation was used.",
    LAGGED: "No `new_losses` were given: the losses of this step, on another batch, were used instead.",
}
"""The meaning of the result codes in `Info.result`."""

# A float32 Gramian is indefinite by up to about K eps of its diagonal. Every solver adds (K + SHIFT) eps to the
# diagonal of the Gramian scaled to unit diagonal, which also keeps the Cholesky factors of singular Gramians finite.
SHIFT = 16


class Solution(NamedTuple):
    """A solver's answer and its accuracy."""

    value: Float[Array, " K"]
    residual: Float[Array, ""]  #: scale-free residual of the optimality conditions
    steps: Int[Array, ""]  #: factorisations of a K×K matrix, or batches of them
    result: Int[Array, ""]  #: a key of RESULTS


def in_full_precision() -> Any:
    """Return a context, also a decorator, for precise products of matrices: TPUs use bfloat16 by default."""
    return jax.default_matmul_precision("highest")


def compiled(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles a solver for every value of its static arguments, in full precision."""
    return lambda function: jax.jit(in_full_precision()(function), static_argnames=static)


def solution(value: Array, residual: Array, steps: Array | int, stopped_short: Array | bool) -> Solution:
    """Return a Solution with the result code for `stopped_short`, which a NaN residual also implies."""
    residual = jnp.asarray(residual)
    short = jnp.asarray(stopped_short) | ~jnp.isfinite(residual)
    return Solution(value, residual, jnp.asarray(steps), jnp.where(short, MAX_STEPS, SOLVED))


def closed_form(value: Array, defined: Array | bool = True) -> Solution:
    """Return a Solution without steps, FAILED where the weights are not defined."""
    return Solution(value, jnp.zeros(()), jnp.zeros((), int), jnp.where(defined, SOLVED, FAILED))


def shift(matrix: Float[Array, "K K"]) -> float:
    """Return the shift of a unit diagonal: (K + SHIFT) eps."""
    return (matrix.shape[0] + SHIFT) * float(jnp.finfo(matrix.dtype).eps)


def inverse_sqrt(diagonal: Float[Array, " K"]) -> Float[Array, " K"]:
    """Return 1/sqrt, and 0 where the diagonal is not positive."""
    positive = diagonal > 0
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, diagonal, 1)), 0)


def normalized(gramian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return the Gramian divided by its largest diagonal entry, avoiding XLA's 1/x, which can underflow."""
    inverse = inverse_sqrt(jnp.max(jnp.diagonal(gramian), keepdims=True))[0]
    return gramian * inverse * inverse


def smallest_row(gramian: Float[Array, "K K"], among: Bool[Array, " K"]) -> Float[Array, ""]:
    """Return the smallest nonzero diagonal entry among some tasks, or 1 if there is none."""
    diagonal = jnp.diagonal(gramian)
    smallest = jnp.min(jnp.where(among & (diagonal > 0), diagonal, jnp.inf))
    return jnp.where(jnp.isfinite(smallest), smallest, 1)


def centred(gramian: Float[Array, "K K"], among: Bool[Array, " K"]) -> Float[Array, "K K"]:
    """Return the Gramian times a power of two that keeps rows too far apart in scale for `normalized`."""
    smallest, largest = smallest_row(gramian, among), jnp.max(jnp.diagonal(gramian))
    exponents = jnp.frexp(jnp.stack([smallest, jnp.where(largest > 0, largest, 1)]))[1]
    root = jnp.ldexp(jnp.ones((), gramian.dtype), (2 - jnp.sum(exponents)) // 4)
    return gramian * root * root  # the power itself may be a subnormal number, which flushes to zero
