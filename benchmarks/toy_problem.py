"""The two-dimensional toy problems: losses, the papers' starts, Pareto front and optima."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import minimum_filter

SPACING = 0.02  # of the grid used to find front and optimum


def losses_fn(x: jax.Array, scale: jax.Array | float = 1.0, wells: jax.Array | bool = False) -> jax.Array:
    """Both losses at x = (a, b): curved valleys where b > 0; bowls, or in the second toy wells, where b < 0."""
    a, b = x
    side = jnp.array([1.0, -1.0])
    gap = jnp.stack([(-a - 7) / 2 + jnp.tanh(b), (-a + 3) / 2 - jnp.tanh(b) + 2])
    valley = jnp.log(_at_least(5e-6, jnp.abs(gap))) + 6
    bowl = ((a - 7 * side) ** 2 + 0.1 * (b + 8) ** 2) / 10 - 20
    u, v = (jnp.stack([a - shift * side, b + 0 * side]) / 4 for shift in (5.45, 5.5))
    well = jnp.sum(0.1 * u**6 - v**4 - 1.5 * v**2, axis=0) + 1.5
    losses = _at_least(0, jnp.tanh(b / 2)) * valley + _at_least(0, jnp.tanh(-b / 2)) * jnp.where(wells, well, bowl)
    return losses * jnp.stack([jnp.asarray(scale, losses.dtype), jnp.ones_like(a)])


def _at_least(low: float, x: jax.Array) -> jax.Array:
    """The maximum. On equality its gradient is 1, as for torch.clamp in official code, not 1/2 as for jnp.maximum."""
    return jnp.where(x >= low, x, low)


@dataclass(frozen=True)
class Setting:
    """The problem, starts and number of steps; `scale` multiplies the first loss."""

    title: str
    starts: tuple[tuple[float, float], ...]
    steps: int
    scale: float = 1.0
    wells: bool = False


CAGRAD = ((-8.5, 7.5), (-8.5, -5), (9, 9))
NASH = ((-8.5, 7.5), (0, 0), (9, 9), (-7.5, -0.5), (9, -1))
SAMGS = ((-8, 5), (-3, 7.5), (0, 10), (3, 7.5), (8, 5), (-10, -3), (10, -3))
PRINTED = ((-8.5, 5), (0, 0), (10, -8), (-10, -2.5), (10, -2.5))
WELLS = ((-3.5, 5.5), (3.5, 5.5), (-6.5, 2.5), (6.5, 2.5), (0, 10), (0, -8))
SETTINGS = {
    "cagrad": Setting("CAGrad's three starts", CAGRAD, 100_000),
    "nash": Setting("Nash-MTL's five starts, the first loss scaled by 0.1", NASH, 50_000, scale=0.1),
    "unscaled": Setting("Nash-MTL's five starts, both losses as they are", NASH, 50_000),
    "samgs": Setting("SAM-GS's seven starts", SAMGS, 20_000),
    "printed": Setting("Starts that CAGrad and SAM-GS print, beside those of their code", PRINTED, 100_000),
    "two_optima": Setting("SAM-GS's toy with two global optima", WELLS, 21_000, wells=True),
}


class Landscape(NamedTuple):
    a: np.ndarray  # (A,)
    b: np.ndarray  # (B,)
    mean: np.ndarray  # (A, B), the mean of the losses
    front: np.ndarray  # (F, 2), from left to right
    optima: np.ndarray  # (O, 2), where the mean is least


@functools.cache
def landscape(setting: Setting) -> Landscape:
    """The Pareto front and the optima of a setting, on a grid."""
    a, b = (np.linspace(low, high, round((high - low) / SPACING) + 1) for low, high in ((-12, 12), (-13, 12)))
    points = np.stack(np.meshgrid(a, b, indexing="ij"), axis=-1)
    at_each = jax.vmap(jax.vmap(functools.partial(losses_fn, scale=setting.scale, wells=setting.wells)))
    with jax.enable_x64(True):
        losses = np.asarray(jax.jit(at_each)(points))
    mean = losses.mean(axis=-1)

    # along the front one loss falls as the other rises: the weights have the inverse ratio of the slopes
    column = np.arange(len(a))
    slopes = np.gradient(losses[column, mean.argmin(axis=1)], axis=0)
    curve = column, (losses * np.abs(slopes[:, None, ::-1])).sum(axis=-1).argmin(axis=1)
    dominates = (losses[curve][:, None] < losses[curve]).all(axis=-1)
    front = points[curve][~dominates.any(axis=0)]

    optima = (minimum_filter(mean, 3) == mean) & (mean < mean.min() + 1e-9 * np.ptp(mean))
    return Landscape(a, b, mean, front, points[optima])
