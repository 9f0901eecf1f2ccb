r"""The geometric median min_x sum_i ||g_i - x|| of K gradients, as weights: x = sum_i w_i g_i on the simplex.

Outliers cost no accuracy: the origin is moved to the row with the least sum of distances, steps are judged by the
change of each distance, not of their sum, and rows 1/eps away are moved closer, which turns their pull on the median by
eps. A row is the median if the sum of the unit vectors to the other rows is no longer than its multiplicity. Otherwise
one step of Vardi & Zhang (2000) from the best row gets below the objective at all rows, where it is smooth. Each
further step is the better of Weiszfeld's, which always descends, and Newton's, in K dimensions by the Woodbury
identity. Newton's is shortened to a quarter whenever it was the worse one, and grows again when it was the better.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mtlgrad_jax.solvers._solution import Solution, compiled, inverse_sqrt, shift, solution

_MAX_STEPS = 200
_EQUAL = 4  # in eps: a squared distance of two rows below this is rounding


@compiled("max_steps")
def geometric_median(
    gramian: Float[Array, "K K"], present: Bool[Array, " K"], *, max_steps: int = _MAX_STEPS
) -> Solution:
    """Return the weights of the geometric median of the rows present.

    Args:
      gramian: inner products of the rows, zero for rows that are not present.
      present: rows that take part.
      max_steps: maximum number of steps.

    Returns:
      Weights on the simplex. If the median is not unique (rows on a line), those of any median.
    """
    dtype, count = gramian.dtype, jnp.maximum(jnp.sum(present), 1)
    eps = jnp.finfo(dtype).eps
    typical = inverse_sqrt(jnp.sort(jnp.where(present, jnp.diagonal(gramian), jnp.inf))[(count - 1) // 2][None])
    own = inverse_sqrt(jnp.diagonal(gramian))
    typical = jnp.where(typical > 0, typical, jnp.max(own))
    scale = jnp.where(own > 0, jnp.minimum(typical, own / eps), typical)
    M = gramian * scale[:, None] * scale[None, :]
    n, pairs = jnp.diagonal(M), present[:, None] & present[None, :]
    squares = n[:, None] + n[None, :] - 2 * M
    squares = jnp.where(pairs & (squares > _EQUAL * eps * (n[:, None] + n[None, :])), squares, 0)
    # Where half of the rows are that far away, sums are equal and any row will do, but only unmoved ones are in place.
    sums = jnp.sqrt(squares).sum(axis=0) * jnp.where(scale < typical, 1 + len(M) * _EQUAL * eps, 1)
    row = jnp.argmin(jnp.where(present, sums, jnp.inf))
    copies = jnp.sum(pairs[row] & (squares[row] == 0))
    N = jnp.where(pairs, M - M[row][:, None] - M[row][None, :] + M[row, row], 0)  # of the rows relative to the best one
    inverse = inverse_sqrt(squares[row])
    force = jnp.sqrt(jnp.maximum(inverse @ N @ inverse, 0))
    hidden = _EQUAL * eps * (inverse @ (jnp.sqrt(n) + jnp.sqrt(n[row]))) ** 2  # rounding error of force^2, due to M
    at_row = copies**2 >= force**2 - hidden
    kept = jnp.minimum(copies / jnp.where(force > 0, force, 1), 1)
    beyond = (1 - kept) * inverse / jnp.where(at_row, 1, inverse.sum())
    below = jnp.where(jnp.arange(len(M)) == row, kept, beyond)

    def distances(w: Array) -> Array:
        toward = N @ w
        return jnp.sqrt(jnp.where(present, jnp.maximum(jnp.diagonal(N) - 2 * toward + w @ toward, 0), 0))

    def weiszfeld(r: Array) -> Array:
        nearest = jnp.min(jnp.where(present & (r > 0), r, jnp.inf))
        nearest = jnp.where(jnp.isfinite(nearest), nearest, 1)
        inverse = jnp.where(present, nearest / jnp.maximum(r, eps * nearest), 0)
        return inverse / jnp.maximum(jnp.sum(inverse), 1)

    def newton(w: Array, r: Array) -> Array:
        safe = jnp.where(present & (r > 0), r, 1)
        inverse = jnp.where(present & (r > 0), 1 / safe, 0)
        toward = N @ w
        units = (N - toward[:, None] - toward[None, :] + w @ toward) * inverse[:, None] * inverse[None, :]
        weight = jnp.sum(inverse)
        system = jnp.diag(jnp.where(inverse > 0, weight * safe * (1 + shift(M)), 1)) - jnp.where(pairs, units, 0)
        y = jnp.linalg.solve(system, jnp.where(inverse > 0, -r, 0)) * inverse
        return w * (1 + jnp.sum(y)) - y

    def judge(w: Array) -> tuple[Array, Array, Array]:
        """Return a point, its distances, and the length of the gradient of their sum."""
        r = distances(w)
        inverse = jnp.where(present & (r > 0), 1 / jnp.where(r > 0, r, 1), 0)
        pull = inverse - w * jnp.sum(inverse)
        return w, r, jnp.sqrt(jnp.maximum(pull @ N @ pull, 0))

    def change(new: tuple, old: tuple) -> tuple[Array, Array]:
        """Return the change of the sum of distances between two points, and its rounding error."""
        dw, middle, total = new[0] - old[0], new[0] + old[0], new[1] + old[1]
        inverse = jnp.where(present & (total > 0), 1 / jnp.where(total > 0, total, 1), 0)
        products, sizes = N @ dw, jnp.abs(N) @ jnp.abs(dw)
        return inverse @ (middle @ products - 2 * products), eps * inverse @ (jnp.abs(middle) @ sizes + 2 * sizes)

    def body(carry: tuple) -> tuple:
        point, length, steps, _ = carry
        w, r, _ = point
        first, second = judge(weiszfeld(r)), judge(w + length * (newton(w, r) - w))
        gain, rounding = change(second, first)
        longer = gain < rounding
        new = jax.tree.map(lambda a, b: jnp.where(longer, b, a), first, second)
        gain, rounding = change(new, point)
        better = (gain < -rounding) | ((gain < rounding) & (new[2] < point[2] / 2))
        point = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, point)
        return point, jnp.where(longer, jnp.minimum(4 * length, 1), length / 4), steps + 1, ~better

    start = (judge(below), jnp.ones((), dtype), jnp.asarray(0), at_row)
    (w, r, _), _, steps, done = lax.while_loop(lambda carry: ~carry[-1] & (carry[-2] < max_steps), body, start)
    # At the median, the sum of the unit vectors to the other rows is no longer than the number of rows at the median.
    far = present & (r**2 > _EQUAL * eps * (n + n[row]))
    units = jnp.where(far, 1 / jnp.where(far, r, 1), 0)
    pull = units - w * jnp.sum(units)
    excess = jnp.sqrt(jnp.maximum(pull @ N @ pull, 0)) - jnp.sum(present & ~far)
    residual = jnp.where(at_row, 0, jnp.maximum(excess, 0)) / count
    median = jnp.where(at_row, jnp.where(jnp.arange(len(M)) == row, 1, 0) * present, weiszfeld(r))
    share = jnp.where(typical > 0, scale / jnp.where(typical > 0, typical, 1), 1)
    return solution(median * share, residual, steps, ~done & (residual > jnp.sqrt(eps)))
