"""Transformations of each task's gradient."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, raises_naming, tree, zeros
from walks import G, K, walk

import mtlgrad_jax as mtl


def test_per_task_is_the_transformation_on_every_row():
    updates, _ = walk(optax.chain(mtl.per_task(optax.adam(0.1), K), mtl.sum()))
    total = np.zeros((6, P))
    for i in range(K):
        adam = optax.adam(0.1)
        state = adam.init(jnp.zeros(P))
        for t in range(6):
            update, state = adam.update(jnp.asarray(G[t, i]), state)
            total[t] += np.asarray(update)
    np.testing.assert_allclose(updates, total, rtol=1e-4, atol=1e-6)


def test_per_task_clips_every_task():
    tx = mtl.per_task(optax.clip_by_global_norm(1.0), K)
    clipped, _ = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()))
    norms = np.linalg.norm(G[0], axis=1, keepdims=True)
    np.testing.assert_allclose(flat(clipped), G[0] / np.maximum(norms, 1), rtol=1e-5)


def test_per_task_keeps_what_is_absent_or_broken_out_of_the_states():
    broken = G.copy()
    broken[1, 2, 4] = np.nan
    masks = np.ones((6, K), bool)
    masks[1, 2] = False
    momentum = optax.chain(mtl.per_task(optax.trace(0.9), K), mtl.skip_nonfinite_tasks(mtl.imtl_g()))
    with_nan, _ = walk(momentum, broken)
    absent, _ = walk(momentum, G, masks)
    np.testing.assert_array_equal(with_nan, absent)
    assert np.isfinite(with_nan).all()


@pytest.mark.usefixtures("unchecked")
def test_per_task_refuses():
    with pytest.raises(ValueError, match=raises_naming("transform")):
        mtl.per_task("adam", K)
    tx = mtl.per_task(optax.identity(), K + 1)
    with pytest.raises(ValueError, match=raises_naming("num_tasks")):
        tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()))
