"""K×K numerics on the device, one module per problem; an iterative solver returns a `Solution`.

- `_interior_point`: quadratic programs with bounds; used by `_nonnegative_qp`, `_capped_min_norm`
- `_nonnegative_qp`: min x^T Q x / 2 - q^T x over x >= 0; used by most of the following
- `_min_norm`: the min-norm point of a convex hull; used by mgda, imgrad, pmtl
- `_capped_min_norm`: the same with bounded weights; used by capped_mgda
- `_dual_cone`: projection on the dual cone, of the rows or their sum; used by upgrad, dualproj, non_conflicting
- `_max_min`: the best worst-case direction in a ball; used by cagrad, imgrad
- `_conic`: the best worst-case direction in a cone; used by conicgrad
- `_progress`: the nearest direction with some progress for all; used by pcd
- `_alpha_fair`: M w = (q/w)^(1/alpha); used by nash_mtl, fairgrad, pivrg
- `_geometric_median`: the least sum of distances; used by geometric_median
- `_eigen`: eigen-decompositions with relative cut-offs; used by aligned_mtl, imtl_g, imtl, conflict_free, gcond
- `_linear_program`: linear programs over a simplex; used by epo
- `_simplex`: the Euclidean projection on the simplex; used by modo, sdmgrad, ferero, moco

All accept Gramians that are positive semidefinite up to rounding, of any rank and with rows of any scale.
"""

from mtlgrad_jax.solvers._alpha_fair import alpha_fair as alpha_fair
from mtlgrad_jax.solvers._capped_min_norm import capped_min_norm as capped_min_norm
from mtlgrad_jax.solvers._conic import conic_direction as conic_direction
from mtlgrad_jax.solvers._dual_cone import project_rows as project_rows
from mtlgrad_jax.solvers._dual_cone import project_weights as project_weights
from mtlgrad_jax.solvers._eigen import cosines as cosines
from mtlgrad_jax.solvers._eigen import direction_of_products as direction_of_products
from mtlgrad_jax.solvers._eigen import significant_eigh as significant_eigh
from mtlgrad_jax.solvers._geometric_median import geometric_median as geometric_median
from mtlgrad_jax.solvers._linear_program import linear_program as linear_program
from mtlgrad_jax.solvers._max_min import max_min_direction as max_min_direction
from mtlgrad_jax.solvers._min_norm import min_norm as min_norm
from mtlgrad_jax.solvers._progress import progress_direction as progress_direction
from mtlgrad_jax.solvers._simplex import project_simplex as project_simplex
from mtlgrad_jax.solvers._solution import RESULTS as RESULTS
from mtlgrad_jax.solvers._solution import Solution as Solution
from mtlgrad_jax.solvers._solution import inverse_sqrt as inverse_sqrt
from mtlgrad_jax.solvers._solution import normalized as normalized
from mtlgrad_jax.solvers._solution import shift as shift

__all__ = [
    "RESULTS",
    "Solution",
    "alpha_fair",
    "capped_min_norm",
    "conic_direction",
    "cosines",
    "direction_of_products",
    "geometric_median",
    "inverse_sqrt",
    "linear_program",
    "max_min_direction",
    "min_norm",
    "normalized",
    "progress_direction",
    "project_rows",
    "project_simplex",
    "project_weights",
    "shift",
    "significant_eigh",
]
