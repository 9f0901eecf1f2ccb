"""Gradient transformations for multi-task learning in JAX and Optax.

losses -> TaskJacobian -> Gramian -> weights -> one gradient -> any optax optimizer
"""

# ruff: noqa: I001  in the order in which data flows

from mtlgrad_jax import stacks as stacks
from mtlgrad_jax import solvers as solvers

from mtlgrad_jax.oracles import task_value_and_grad as task_value_and_grad
from mtlgrad_jax.oracles import linearize as linearize
from mtlgrad_jax.oracles import linearize_features as linearize_features
from mtlgrad_jax.oracles import TaskJacobian as TaskJacobian
from mtlgrad_jax.oracles import sam_value_and_grad as sam_value_and_grad
from mtlgrad_jax.oracles import sam_perturbation as sam_perturbation
from mtlgrad_jax.oracles import perturbed_task_grad as perturbed_task_grad
from mtlgrad_jax.oracles import ntk_traces as ntk_traces

from mtlgrad_jax.methods.losses.mean import mean as mean
from mtlgrad_jax.methods.losses.sum import sum as sum
from mtlgrad_jax.methods.losses.constant import constant as constant
from mtlgrad_jax.methods.gramian.mgda import mgda as mgda
from mtlgrad_jax.methods.gramian.capped_mgda import capped_mgda as capped_mgda
from mtlgrad_jax.methods.gramian.pcgrad import pcgrad as pcgrad
from mtlgrad_jax.methods.gramian.gradvac import gradvac as gradvac
from mtlgrad_jax.methods.gramian.cagrad import cagrad as cagrad
from mtlgrad_jax.methods.gramian.imgrad import imgrad as imgrad
from mtlgrad_jax.methods.gramian.conicgrad import conicgrad as conicgrad
from mtlgrad_jax.methods.gramian.nash_mtl import nash_mtl as nash_mtl
from mtlgrad_jax.methods.gramian.fairgrad import fairgrad as fairgrad
from mtlgrad_jax.methods.gramian.imtl_g import imtl_g as imtl_g
from mtlgrad_jax.methods.gramian.aligned_mtl import aligned_mtl as aligned_mtl
from mtlgrad_jax.methods.gramian.upgrad import upgrad as upgrad
from mtlgrad_jax.methods.gramian.dualproj import dualproj as dualproj
from mtlgrad_jax.methods.gramian.conflict_free import conflict_free as conflict_free
from mtlgrad_jax.methods.gramian.krum import krum as krum
from mtlgrad_jax.methods.gramian.geometric_median import geometric_median as geometric_median
from mtlgrad_jax.methods.gramian.dibs import dibs as dibs
from mtlgrad_jax.methods.gramian.rotograd_scale import rotograd_scale as rotograd_scale
from mtlgrad_jax.methods.gramian.pcd import pcd as pcd
from mtlgrad_jax.methods.gramian.ngdiff import ngdiff as ngdiff
from mtlgrad_jax.methods.gramian.avgnorm import avgnorm as avgnorm
from mtlgrad_jax.methods.gramian.slw import slw as slw
from mtlgrad_jax.methods.two_batches.modo import modo as modo
from mtlgrad_jax.methods.two_batches.sdmgrad import sdmgrad as sdmgrad
from mtlgrad_jax.methods.two_batches.ferero import ferero as ferero
from mtlgrad_jax.methods.losses.uw import uw as uw
from mtlgrad_jax.methods.losses.slaw import slaw as slaw
from mtlgrad_jax.methods.losses.bmtl import bmtl as bmtl
from mtlgrad_jax.methods.losses.imtl_l import imtl_l as imtl_l
from mtlgrad_jax.methods.losses.dwa import dwa as dwa
from mtlgrad_jax.methods.losses.rlw import rlw as rlw
from mtlgrad_jax.methods.losses.gls import gls as gls
from mtlgrad_jax.methods.losses.scale_invariant import scale_invariant as scale_invariant
from mtlgrad_jax.methods.losses.stch import stch as stch
from mtlgrad_jax.methods.losses.stch_mtl import stch_mtl as stch_mtl
from mtlgrad_jax.methods.losses.tchebycheff import tchebycheff as tchebycheff
from mtlgrad_jax.methods.losses.pbi import pbi as pbi
from mtlgrad_jax.methods.losses.cosmos import cosmos as cosmos
from mtlgrad_jax.methods.losses.famo import famo as famo
from mtlgrad_jax.methods.losses.go4align import go4align as go4align
from mtlgrad_jax.methods.losses.ldc_mtl import ldc_mtl as ldc_mtl
from mtlgrad_jax.methods.losses.softadapt import softadapt as softadapt
from mtlgrad_jax.methods.losses.relobralo import relobralo as relobralo
from mtlgrad_jax.methods.losses.ntk import ntk as ntk
from mtlgrad_jax.methods.mixed.gradnorm import gradnorm as gradnorm
from mtlgrad_jax.methods.mixed.imtl import imtl as imtl
from mtlgrad_jax.methods.mixed.emtl import emtl as emtl
from mtlgrad_jax.methods.mixed.epo import epo as epo
from mtlgrad_jax.methods.mixed.pmtl import pmtl as pmtl
from mtlgrad_jax.methods.mixed.pivrg import pivrg as pivrg
from mtlgrad_jax.methods.coordinates.trimmed_mean import trimmed_mean as trimmed_mean
from mtlgrad_jax.methods.coordinates.coordinate_median import coordinate_median as coordinate_median
from mtlgrad_jax.methods.coordinates.sign_agreement import sign_agreement as sign_agreement
from mtlgrad_jax.methods.coordinates.graddrop import graddrop as graddrop
from mtlgrad_jax.methods.buffers.db_mtl import db_mtl as db_mtl
from mtlgrad_jax.methods.buffers.sam_gs import sam_gs as sam_gs
from mtlgrad_jax.methods.buffers.moco import moco as moco
from mtlgrad_jax.methods.buffers.excess_mtl import excess_mtl as excess_mtl
from mtlgrad_jax.methods.buffers.gcond import gcond as gcond
from mtlgrad_jax.methods.buffers.conflict_free_momentum import conflict_free_momentum as conflict_free_momentum
from mtlgrad_jax.methods.sharpness.fs_mtl import fs_mtl as fs_mtl
from mtlgrad_jax.methods.sharpness.samo import samo as samo
from mtlgrad_jax.wrappers.shared_private import shared_private as shared_private
from mtlgrad_jax.wrappers.partition import partition as partition
from mtlgrad_jax.wrappers.grouped import grouped as grouped
from mtlgrad_jax.wrappers.gram_over import gram_over as gram_over
from mtlgrad_jax.wrappers.per_task import per_task as per_task
from mtlgrad_jax.wrappers.dropgrad import dropgrad as dropgrad
from mtlgrad_jax.wrappers.non_conflicting import non_conflicting as non_conflicting
from mtlgrad_jax.wrappers.update_every import update_every as update_every
from mtlgrad_jax.wrappers.smoothed import smoothed as smoothed
from mtlgrad_jax.wrappers.skip_nonfinite_tasks import skip_nonfinite_tasks as skip_nonfinite_tasks
from mtlgrad_jax.wrappers.with_metrics import with_metrics as with_metrics
from mtlgrad_jax.wrappers.gen_learning_rate import gen_learning_rate as gen_learning_rate

from mtlgrad_jax.training import chain as chain
from mtlgrad_jax.training import accumulate as accumulate
from mtlgrad_jax.training import has_updated as has_updated
from mtlgrad_jax.training import balanced_value_and_grad as balanced_value_and_grad
from mtlgrad_jax.training import pareto_front as pareto_front

from mtlgrad_jax._core.method import Method as Method
from mtlgrad_jax._core.method import from_kernel as from_kernel
from mtlgrad_jax._core.method import from_rule as from_rule
from mtlgrad_jax._core.step import Argument as Argument
from mtlgrad_jax._core.step import POSITIVE_LOSSES as POSITIVE_LOSSES
from mtlgrad_jax._core.step import Info as Info
from mtlgrad_jax._core.tasks import unstack as unstack
from mtlgrad_jax._core.trees import under as under
from mtlgrad_jax.solvers import RESULTS as RESULTS

from mtlgrad_jax import diagnostics as diagnostics
from mtlgrad_jax.diagnostics import metrics as metrics
from mtlgrad_jax.diagnostics import scalars as scalars

from mtlgrad_jax import registry as registry
from mtlgrad_jax.registry import cite as cite

__version__ = "0.1.0.dev0"
