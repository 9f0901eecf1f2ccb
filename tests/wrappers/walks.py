"""Six steps of three tasks with any transformation."""

import jax
import jax.numpy as jnp
import numpy as np
from harness import P, flat, tree, zeros

import mtlgrad_jax as mtl

K = 3
RNG = np.random.default_rng(0)
G = RNG.normal(size=(6, K, P)).astype(np.float32)
EVERYONE = np.ones(K, bool)
SHARED = {"b": False, "w": True}


def walk(tx, grads=G, masks=None, losses=None):
    """The updates and states of all steps."""
    step = jax.jit(lambda g, s, m, loss: tx.update(tree(g), s, zeros(), losses=loss, task_mask=m))
    state, updates, states = tx.init(zeros()), [], []
    for t in range(len(grads)):
        mask = EVERYONE if masks is None else masks[t]
        update, state = step(jnp.asarray(grads[t]), state, jnp.asarray(mask), None if losses is None else losses[t])
        updates.append(np.asarray(flat(update), float))
        states.append(state)
    return np.stack(updates), states


def weights_of(tx, **kwargs):
    _, states = walk(mtl.with_metrics(tx, num_tasks=K), **kwargs)
    return np.stack([mtl.metrics(state)["weights"] for state in states])


MASKS = np.asarray([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
LABELS = {"b": "two", "w": "one"}
