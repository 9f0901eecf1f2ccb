"""Gradient transformations for multi-task learning in JAX and Optax.

losses -> TaskJacobian -> Gramian -> weights -> one gradient -> any optax optimizer
"""

# ruff: noqa: I001  in the order in which data flows

from mtlgrad_jax import oracles as oracles
from mtlgrad_jax import stacks as stacks
from mtlgrad_jax import solvers as solvers
from mtlgrad_jax import weighting as weighting
from mtlgrad_jax import transforms as transforms

from mtlgrad_jax.oracles import task_value_and_grad as task_value_and_grad
from mtlgrad_jax.oracles import linearize as linearize
from mtlgrad_jax.oracles import TaskJacobian as TaskJacobian
from mtlgrad_jax.oracles import balanced_value_and_grad as balanced_value_and_grad
from mtlgrad_jax.oracles import sam_value_and_grad as sam_value_and_grad
from mtlgrad_jax.oracles import sam_perturbation as sam_perturbation
from mtlgrad_jax.oracles import perturbed_task_grad as perturbed_task_grad

from mtlgrad_jax.transforms import mean as mean
from mtlgrad_jax.transforms import sum as sum
from mtlgrad_jax.transforms import constant as constant
from mtlgrad_jax.transforms import mgda as mgda
from mtlgrad_jax.transforms import capped_mgda as capped_mgda
from mtlgrad_jax.transforms import pcgrad as pcgrad
from mtlgrad_jax.transforms import gradvac as gradvac
from mtlgrad_jax.transforms import cagrad as cagrad
from mtlgrad_jax.transforms import conicgrad as conicgrad
from mtlgrad_jax.transforms import nash_mtl as nash_mtl
from mtlgrad_jax.transforms import fairgrad as fairgrad
from mtlgrad_jax.transforms import imtl_g as imtl_g
from mtlgrad_jax.transforms import aligned_mtl as aligned_mtl
from mtlgrad_jax.transforms import upgrad as upgrad
from mtlgrad_jax.transforms import dualproj as dualproj
from mtlgrad_jax.transforms import conflict_free as conflict_free
from mtlgrad_jax.transforms import krum as krum
from mtlgrad_jax.transforms import geometric_median as geometric_median
from mtlgrad_jax.transforms import dibs as dibs
from mtlgrad_jax.transforms import rotograd_scale as rotograd_scale
from mtlgrad_jax.transforms import pcd as pcd
from mtlgrad_jax.transforms import ngdiff as ngdiff
from mtlgrad_jax.transforms import avgnorm as avgnorm
from mtlgrad_jax.transforms import slw as slw
from mtlgrad_jax.transforms import modo as modo
from mtlgrad_jax.transforms import sdmgrad as sdmgrad
from mtlgrad_jax.transforms import uw as uw
from mtlgrad_jax.transforms import slaw as slaw
from mtlgrad_jax.transforms import bmtl as bmtl
from mtlgrad_jax.transforms import gradnorm as gradnorm
from mtlgrad_jax.transforms import emtl as emtl
from mtlgrad_jax.transforms import trimmed_mean as trimmed_mean
from mtlgrad_jax.transforms import db_mtl as db_mtl
from mtlgrad_jax.transforms import sam_gs as sam_gs
from mtlgrad_jax.transforms import fs_mtl as fs_mtl
from mtlgrad_jax.transforms import samo as samo
from mtlgrad_jax.transforms import shared_private as shared_private
from mtlgrad_jax.transforms import partition as partition
from mtlgrad_jax.transforms import grouped as grouped
from mtlgrad_jax.transforms import gram_over as gram_over
from mtlgrad_jax.transforms import per_task as per_task
from mtlgrad_jax.transforms import dropgrad as dropgrad
from mtlgrad_jax.transforms import non_conflicting as non_conflicting
from mtlgrad_jax.transforms import update_every as update_every
from mtlgrad_jax.transforms import smoothed as smoothed
from mtlgrad_jax.transforms import skip_nonfinite_tasks as skip_nonfinite_tasks
from mtlgrad_jax.transforms import with_metrics as with_metrics
from mtlgrad_jax.transforms import gen_learning_rate as gen_learning_rate
from mtlgrad_jax.transforms import TaskTransformation as TaskTransformation
from mtlgrad_jax.transforms import from_weighting as from_weighting
from mtlgrad_jax.transforms import from_rule as from_rule
from mtlgrad_jax.transforms import lift as lift

from mtlgrad_jax.diagnostics import metrics as metrics

from mtlgrad_jax._tasks import unstack as unstack
from mtlgrad_jax._step import Info as Info
from mtlgrad_jax._step import RESULTS as RESULTS

from mtlgrad_jax import _registry as _registry  # reads the names above, documents them

__version__ = "0.1.0.dev0"

__all__ = [  # noqa: RUF022
    "oracles",
    "stacks",
    "solvers",
    "weighting",
    "transforms",
    "task_value_and_grad",
    "linearize",
    "TaskJacobian",
    "balanced_value_and_grad",
    "sam_value_and_grad",
    "sam_perturbation",
    "perturbed_task_grad",
    "mean",
    "sum",
    "constant",
    "mgda",
    "capped_mgda",
    "pcgrad",
    "gradvac",
    "cagrad",
    "conicgrad",
    "nash_mtl",
    "fairgrad",
    "imtl_g",
    "aligned_mtl",
    "upgrad",
    "dualproj",
    "conflict_free",
    "krum",
    "geometric_median",
    "dibs",
    "rotograd_scale",
    "pcd",
    "ngdiff",
    "avgnorm",
    "slw",
    "modo",
    "sdmgrad",
    "uw",
    "slaw",
    "bmtl",
    "gradnorm",
    "emtl",
    "trimmed_mean",
    "db_mtl",
    "sam_gs",
    "fs_mtl",
    "samo",
    "shared_private",
    "partition",
    "grouped",
    "gram_over",
    "per_task",
    "dropgrad",
    "non_conflicting",
    "update_every",
    "smoothed",
    "skip_nonfinite_tasks",
    "with_metrics",
    "gen_learning_rate",
    "TaskTransformation",
    "from_weighting",
    "from_rule",
    "lift",
    "metrics",
    "unstack",
    "Info",
    "RESULTS",
]
