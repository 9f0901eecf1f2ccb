"""The Euclidean projection onto the simplex."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def project_simplex(point: Float[Array, " K"], among: Bool[Array, " K"]) -> Float[Array, " K"]:
    """Return the nearest point with non-negative entries that sum to 1, and zeros where not `among`."""
    point = point - jnp.max(
        jnp.where(among, point, -jnp.inf), initial=jnp.finfo(point.dtype).min
    )  # otherwise the 1 is lost to rounding
    sorted_down = jnp.sort(jnp.where(among, point, -jnp.inf), descending=True)
    excess = jnp.cumsum(jnp.where(jnp.isfinite(sorted_down), sorted_down, 0)) - 1
    count = jnp.arange(1, len(point) + 1)
    last = jnp.maximum(jnp.sum(sorted_down * count > excess) - 1, 0)
    return jnp.where(among, jnp.maximum(point - excess[last] / count[last], 0), 0)
