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

from mtlgrad_jax.transforms import mean as mean
from mtlgrad_jax.transforms import sum as sum
from mtlgrad_jax.transforms import constant as constant
from mtlgrad_jax.transforms import mgda as mgda
from mtlgrad_jax.transforms import pcgrad as pcgrad
from mtlgrad_jax.transforms import cagrad as cagrad
from mtlgrad_jax.transforms import nash_mtl as nash_mtl
from mtlgrad_jax.transforms import fairgrad as fairgrad
from mtlgrad_jax.transforms import upgrad as upgrad
from mtlgrad_jax.transforms import uw as uw
from mtlgrad_jax.transforms import gradnorm as gradnorm
from mtlgrad_jax.transforms import trimmed_mean as trimmed_mean
from mtlgrad_jax.transforms import db_mtl as db_mtl
from mtlgrad_jax.transforms import shared_private as shared_private
from mtlgrad_jax.transforms import partition as partition
from mtlgrad_jax.transforms import update_every as update_every
from mtlgrad_jax.transforms import smoothed as smoothed
from mtlgrad_jax.transforms import skip_nonfinite_tasks as skip_nonfinite_tasks
from mtlgrad_jax.transforms import with_metrics as with_metrics
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
    "mean",
    "sum",
    "constant",
    "mgda",
    "pcgrad",
    "cagrad",
    "nash_mtl",
    "fairgrad",
    "upgrad",
    "uw",
    "gradnorm",
    "trimmed_mean",
    "db_mtl",
    "shared_private",
    "partition",
    "update_every",
    "smoothed",
    "skip_nonfinite_tasks",
    "with_metrics",
    "TaskTransformation",
    "from_weighting",
    "from_rule",
    "lift",
    "metrics",
    "unstack",
    "Info",
    "RESULTS",
]
