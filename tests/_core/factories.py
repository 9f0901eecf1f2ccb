"""Every method and some nestings of wrappers, and three steps to run them on."""

import jax
import jax.numpy as jnp
import numpy as np
from families import stack
from harness import EVERY, UNSTACKED, P, make, tree, zeros

import mtlgrad_jax as mtl
from mtlgrad_jax.methods.sharpness.fs_mtl import COPIES
from mtlgrad_jax.registry import WRAPPERS
from mtlgrad_jax.registry import make as make_row

K = 3
STEPS = 3
G = np.stack([stack("normal", K, P), stack("correlated", K, P), stack("opposite", K, P)])
LOSSES = np.asarray([[1.0, 2.0, 3.0], [0.5, 2.5, 2.0], [0.4, 2.6, 1.0]])
WRAPPED = {
    "update_every": lambda: mtl.update_every(mtl.imtl_g(), num_tasks=K, k=2),
    "smoothed": lambda: mtl.smoothed(mtl.conflict_free(), num_tasks=K),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(mtl.imtl_g()),
    "skip_nonfinite_tasks(db_mtl)": lambda: mtl.skip_nonfinite_tasks(mtl.db_mtl(num_tasks=K)),
    "with_metrics": lambda: mtl.with_metrics(mtl.pcgrad(), num_tasks=K),
    "with_metrics(trimmed_mean)": lambda: mtl.with_metrics(mtl.trimmed_mean(), num_tasks=K),
    "shared_private": lambda: mtl.shared_private(mtl.gradnorm(num_tasks=K), {"b": False, "w": True}),
    "shared_private(weighted)": lambda: mtl.shared_private(mtl.imtl_g(), {"b": False, "w": True}, private="weighted"),
    "partition": lambda: mtl.partition({"one": mtl.imtl_g(), "two": mtl.uw(num_tasks=K)}, {"b": "one", "w": "two"}),
    "shared_private(nested)": lambda: mtl.shared_private(
        mtl.with_metrics(mtl.smoothed(mtl.update_every(mtl.nash_mtl(), K, 2), K), K), {"b": False, "w": True}
    ),
}
FACTORIES = {name: (lambda name=name: make(name, K)) for name in EVERY} | WRAPPED
ALL = list(FACTORIES)
EAGER = FACTORIES | {row.name: (lambda row=row: make_row(row, K)) for row in WRAPPERS}
EAGER |= {f"fs_mtl({mode})": (lambda m=mode: mtl.fs_mtl(mtl.mgda(), mode=m, num_tasks=K)) for mode in COPIES}
EAGER |= {
    "gen_learning_rate(every=1)": lambda: mtl.gen_learning_rate(0.1, every=1),
    "grouped(update_every)": lambda: mtl.grouped(mtl.update_every(mtl.mgda(), K, 2), str),
}


UNSTORED = [*EVERY, *(row.name for row in WRAPPERS if row.wraps and row.name not in UNSTACKED)]
"""Those that take gradients which are not stored."""


def step_of(tx, **own):
    @jax.jit
    def step(grads, state, losses, mask):
        return tx.update(grads, state, zeros(), losses=losses, task_mask=mask, **own)

    return step


def arguments(t=0, mask=None):
    return tree(jnp.asarray(G[t], jnp.float32)), jnp.asarray(LOSSES[t], jnp.float32), mask
