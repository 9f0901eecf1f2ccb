r"""Small non-negative programs, solved by trying every set of positive variables at once.

    min_{x >= 0}  x^T C x / 2 - q^T x          C positive semidefinite with unit diagonal, K×K

Once it is known which variables are positive, only a linear system is left. For few tasks there are few such sets, 2^K,
and factorising all of them in one batch takes less time, to compile and to run, than a search; the solution is the best
of the points found. On a GPU this pays off for more tasks, since there the host reads a number before each iteration of
a loop, and a batch of factorisations takes about as long as one.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._solution import shift

_FEW = 4  # tasks
_FEW_ON_GPU = 8
REPEATS = 2  # repetitions of a solve, which remove the bias of the shift

Solve = Callable[[Float[Array, "#sets K R"]], list[Float[Array, "sets K R"]]]


def for_few(K: int, at_once: Callable[..., Any], search: Callable[..., Any], *args: Any) -> Any:
    """Return `at_once(*args)` for up to 4 tasks, and in programs for a GPU for up to 8; else `search(*args)`."""
    if K <= _FEW:
        return at_once(*args)
    if K > _FEW_ON_GPU:
        return search(*args)
    return lax.platform_dependent(*args, cuda=at_once, rocm=at_once, default=search)


def by_sets(C: Float[Array, "K K"], allowed: Bool[Array, " K"]) -> Solve:
    """Return a function that solves C x = r on every set of variables, with x zero elsewhere.

    It takes right-hand sides, with a leading axis of length 1 or one entry for each set, and returns a list: the first
    solution, biased by the shift, and the solution after each repetition. On singular sets a repetition may drift along
    the null space.

    Args:
      C: the matrix, zero outside the allowed variables.
      allowed: the other variables are in no set.
    """
    K = len(C)
    sets = jnp.asarray(np.array(list(itertools.product([False, True], repeat=K)))) & allowed[None]
    diagonal = jnp.where(sets, shift(C), 1)[:, :, None] * jnp.eye(K, dtype=C.dtype)[None]
    factor = jnp.linalg.cholesky(jnp.where(sets[:, :, None] & sets[:, None, :], C[None], 0) + diagonal)

    def solve_once(r: Array) -> Array:
        return jnp.where(sets[:, :, None], jsl.cho_solve((factor, True), jnp.where(sets[:, :, None], r, 0)), 0)

    def solve(r: Array) -> list[Array]:
        found = [solve_once(r)]
        for _ in range(REPEATS):
            found.append(found[-1] + solve_once(r - C @ found[-1]))
        return found

    return solve
