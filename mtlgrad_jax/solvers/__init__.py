"""K×K numerics, on device, one module a problem; every solver returns a `Solution`.

| module | problem | used by |
|---|---|---|
| `_nonnegative_qp` | min x^T Q x / 2 - q^T x over x >= 0 | the next three |
| `_min_norm` | the min-norm point of a convex hull | mgda |
| `_dual_cone` | projection of every row on the dual cone | upgrad |
| `_max_min` | the best worst-case direction in a ball | cagrad |
| `_alpha_fair` | M w = w^(-1/alpha) | nash_mtl, fairgrad |

All take Gramians that are positive semidefinite up to rounding, of any rank, with rows of any scale.
"""

from mtlgrad_jax.solvers._alpha_fair import alpha_fair as alpha_fair
from mtlgrad_jax.solvers._dual_cone import project_rows as project_rows
from mtlgrad_jax.solvers._max_min import max_min_direction as max_min_direction
from mtlgrad_jax.solvers._min_norm import min_norm as min_norm
from mtlgrad_jax.solvers._solution import Solution as Solution

__all__ = ["Solution", "alpha_fair", "max_min_direction", "min_norm", "project_rows"]
