"""Optax transformations from stacked per-task gradients to one gradient.

Weightings become transformations in one line each; methods that work on the stack itself, and wrappers, have a file
each.
"""

from mtlgrad_jax import weighting
from mtlgrad_jax.transforms._base import TaskTransformation as TaskTransformation
from mtlgrad_jax.transforms._base import from_rule as from_rule
from mtlgrad_jax.transforms._base import from_weighting as from_weighting
from mtlgrad_jax.transforms._base import lift as lift
from mtlgrad_jax.transforms._db_mtl import db_mtl as db_mtl
from mtlgrad_jax.transforms._dropgrad import dropgrad as dropgrad
from mtlgrad_jax.transforms._fs_mtl import fs_mtl as fs_mtl
from mtlgrad_jax.transforms._gen_learning_rate import gen_learning_rate as gen_learning_rate
from mtlgrad_jax.transforms._gram_over import gram_over as gram_over
from mtlgrad_jax.transforms._grouped import grouped as grouped
from mtlgrad_jax.transforms._non_conflicting import non_conflicting as non_conflicting
from mtlgrad_jax.transforms._partition import partition as partition
from mtlgrad_jax.transforms._per_task import per_task as per_task
from mtlgrad_jax.transforms._sam_gs import sam_gs as sam_gs
from mtlgrad_jax.transforms._samo import samo as samo
from mtlgrad_jax.transforms._shared_private import shared_private as shared_private
from mtlgrad_jax.transforms._skip_nonfinite_tasks import skip_nonfinite_tasks as skip_nonfinite_tasks
from mtlgrad_jax.transforms._smoothed import smoothed as smoothed
from mtlgrad_jax.transforms._trimmed_mean import trimmed_mean as trimmed_mean
from mtlgrad_jax.transforms._update_every import update_every as update_every
from mtlgrad_jax.transforms._with_metrics import with_metrics as with_metrics

mean = lift(weighting.mean)
sum = lift(weighting.sum)
constant = lift(weighting.constant)
mgda = lift(weighting.mgda)
capped_mgda = lift(weighting.capped_mgda)
pcgrad = lift(weighting.pcgrad)
gradvac = lift(weighting.gradvac)
cagrad = lift(weighting.cagrad)
conicgrad = lift(weighting.conicgrad)
nash_mtl = lift(weighting.nash_mtl)
fairgrad = lift(weighting.fairgrad)
imtl_g = lift(weighting.imtl_g)
aligned_mtl = lift(weighting.aligned_mtl)
upgrad = lift(weighting.upgrad)
dualproj = lift(weighting.dualproj)
conflict_free = lift(weighting.conflict_free)
krum = lift(weighting.krum)
geometric_median = lift(weighting.geometric_median)
dibs = lift(weighting.dibs)
rotograd_scale = lift(weighting.rotograd_scale)
pcd = lift(weighting.pcd)
ngdiff = lift(weighting.ngdiff)
avgnorm = lift(weighting.avgnorm)
slw = lift(weighting.slw)
modo = lift(weighting.modo)
sdmgrad = lift(weighting.sdmgrad)
uw = lift(weighting.uw)
slaw = lift(weighting.slaw)
bmtl = lift(weighting.bmtl)
gradnorm = lift(weighting.gradnorm)
emtl = lift(weighting.emtl)
