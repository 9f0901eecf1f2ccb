"""The K-sized cores: from the Gramian and the losses to weights, one method a file.

A weighting is a pair of pure functions, `init(num_tasks=None) -> state` and
`update(gramian, state, *, losses=None, task_mask=None) -> (weights, state)`, made by `from_kernel` of a method's
formula. `mtlgrad_jax.from_weighting` turns it into an optax transformation.
"""

from mtlgrad_jax.weighting._base import Weighting as Weighting
from mtlgrad_jax.weighting._base import from_kernel as from_kernel
from mtlgrad_jax.weighting._cagrad import cagrad as cagrad
from mtlgrad_jax.weighting._constant import constant as constant
from mtlgrad_jax.weighting._fairgrad import fairgrad as fairgrad
from mtlgrad_jax.weighting._gradnorm import gradnorm as gradnorm
from mtlgrad_jax.weighting._mean import mean as mean
from mtlgrad_jax.weighting._mgda import mgda as mgda
from mtlgrad_jax.weighting._nash_mtl import nash_mtl as nash_mtl
from mtlgrad_jax.weighting._pcgrad import pcgrad as pcgrad
from mtlgrad_jax.weighting._sum import sum as sum
from mtlgrad_jax.weighting._upgrad import upgrad as upgrad
from mtlgrad_jax.weighting._uw import uw as uw

__all__ = [
    "Weighting",
    "cagrad",
    "constant",
    "fairgrad",
    "from_kernel",
    "gradnorm",
    "mean",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "sum",
    "upgrad",
    "uw",
]
