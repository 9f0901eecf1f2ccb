"""Weights from the shared parameters only."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness import P, raises_naming, zeros
from walks import MASKS, SHARED, G, K, walk, weights_of

import mtlgrad_jax as mtl


def test_shared_private_own():
    tx = mtl.shared_private(mtl.imtl_g(), SHARED)
    updates, _ = walk(tx, masks=MASKS)
    alone, _ = walk(mtl.imtl_g(), np.where(np.arange(P) == 0, 0, G).astype(np.float32), MASKS)
    np.testing.assert_allclose(updates[:, 1:], alone[:, 1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates[:, 0], (G[:, :, 0] * MASKS).sum(axis=1), rtol=1e-5, atol=1e-6)


def test_shared_private_weighted():
    updates, _ = walk(mtl.shared_private(mtl.imtl_g(), SHARED, private="weighted"))
    weights = weights_of(mtl.imtl_g(), grads=np.where(np.arange(P) == 0, 0, G).astype(np.float32))
    np.testing.assert_allclose(updates, np.einsum("tk,tkp->tp", weights, G), rtol=1e-4, atol=1e-5)


def test_shared_private_by_path_with_any_kind_of_weighting():
    def is_shared(path):
        return path[0].key == "w"

    for method in (mtl.trimmed_mean(), mtl.db_mtl(num_tasks=K), mtl.with_metrics(mtl.pcgrad(), K)):
        losses = jnp.ones((6, K))
        by_path, _ = walk(mtl.shared_private(method, is_shared), losses=losses)
        by_tree, _ = walk(mtl.shared_private(method, SHARED), losses=losses)
        np.testing.assert_array_equal(by_path, by_tree)


def test_a_broken_head_skips_the_step():
    broken = G.copy()
    broken[0, 1, 0] = np.nan
    updates, states = walk(mtl.shared_private(mtl.imtl_g(), SHARED), broken)
    assert not updates[0].any()
    assert np.isfinite(updates).all()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1


def test_a_step_that_the_method_skips_leaves_the_heads():
    broken = G.copy()
    broken[0, 1, 3] = np.nan
    updates, states = walk(mtl.shared_private(mtl.imtl_g(), SHARED), broken)
    assert not updates[0].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    tx = mtl.partition({"one": mtl.imtl_g(), "two": mtl.db_mtl(num_tasks=K)}, {"b": "one", "w": "two"})
    losses = jnp.ones((6, K))
    updates, states = walk(tx, broken, losses=losses)
    assert not updates[0].any()
    np.testing.assert_array_equal(updates[1:], walk(tx, G[1:], losses=losses)[0])


def test_shared_private_refuses():
    with pytest.raises(ValueError, match=r"`is_shared` must be true for some leaf"):
        mtl.shared_private(mtl.imtl_g(), {"b": False, "w": False}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("is_shared")):
        mtl.shared_private(mtl.imtl_g(), {"x": True}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.shared_private(mtl.trimmed_mean(), SHARED, private="weighted")
