"""The K-sized cores: from the Gramian and the losses to weights, one method a file.

A weighting is a pair of pure functions, `init(num_tasks=None) -> state` and
`update(gramian, state, *, losses=None, task_mask=None) -> (weights, state)`, made by `from_kernel` of a method's
formula. `mtlgrad_jax.from_weighting` turns it into an optax transformation.
"""

from mtlgrad_jax.weighting._aligned_mtl import aligned_mtl as aligned_mtl
from mtlgrad_jax.weighting._avgnorm import avgnorm as avgnorm
from mtlgrad_jax.weighting._base import Weighting as Weighting
from mtlgrad_jax.weighting._base import from_kernel as from_kernel
from mtlgrad_jax.weighting._bmtl import bmtl as bmtl
from mtlgrad_jax.weighting._cagrad import cagrad as cagrad
from mtlgrad_jax.weighting._capped_mgda import capped_mgda as capped_mgda
from mtlgrad_jax.weighting._conflict_free import conflict_free as conflict_free
from mtlgrad_jax.weighting._conicgrad import conicgrad as conicgrad
from mtlgrad_jax.weighting._constant import constant as constant
from mtlgrad_jax.weighting._dibs import dibs as dibs
from mtlgrad_jax.weighting._dualproj import dualproj as dualproj
from mtlgrad_jax.weighting._emtl import emtl as emtl
from mtlgrad_jax.weighting._fairgrad import fairgrad as fairgrad
from mtlgrad_jax.weighting._geometric_median import geometric_median as geometric_median
from mtlgrad_jax.weighting._gradnorm import gradnorm as gradnorm
from mtlgrad_jax.weighting._gradvac import gradvac as gradvac
from mtlgrad_jax.weighting._imtl_g import imtl_g as imtl_g
from mtlgrad_jax.weighting._krum import krum as krum
from mtlgrad_jax.weighting._mean import mean as mean
from mtlgrad_jax.weighting._mgda import mgda as mgda
from mtlgrad_jax.weighting._modo import modo as modo
from mtlgrad_jax.weighting._nash_mtl import nash_mtl as nash_mtl
from mtlgrad_jax.weighting._ngdiff import ngdiff as ngdiff
from mtlgrad_jax.weighting._pcd import pcd as pcd
from mtlgrad_jax.weighting._pcgrad import pcgrad as pcgrad
from mtlgrad_jax.weighting._rotograd_scale import rotograd_scale as rotograd_scale
from mtlgrad_jax.weighting._sdmgrad import sdmgrad as sdmgrad
from mtlgrad_jax.weighting._slaw import slaw as slaw
from mtlgrad_jax.weighting._slw import slw as slw
from mtlgrad_jax.weighting._sum import sum as sum
from mtlgrad_jax.weighting._upgrad import upgrad as upgrad
from mtlgrad_jax.weighting._uw import uw as uw

__all__ = [
    "Weighting",
    "aligned_mtl",
    "avgnorm",
    "bmtl",
    "cagrad",
    "capped_mgda",
    "conflict_free",
    "conicgrad",
    "constant",
    "dibs",
    "dualproj",
    "emtl",
    "fairgrad",
    "from_kernel",
    "geometric_median",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "ngdiff",
    "pcd",
    "pcgrad",
    "rotograd_scale",
    "sdmgrad",
    "slaw",
    "slw",
    "sum",
    "upgrad",
    "uw",
]
