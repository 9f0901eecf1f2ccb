"""Weights from the Gramian of some leaves."""

import numpy as np
import pytest
from harness import P, raises_naming, zeros
from walks import MASKS, SHARED, G, K, walk, weights_of

import mtlgrad_jax as mtl


def test_gram_over_weighs_by_some_leaves_and_applies_to_all():
    only_w = np.where(np.arange(P) == 0, 0, G).astype(np.float32)
    updates, _ = walk(mtl.gram_over(mtl.imtl_g(), SHARED), masks=MASKS)
    weights = weights_of(mtl.imtl_g(), grads=only_w, masks=MASKS)
    np.testing.assert_allclose(updates, np.einsum("tk,tkp->tp", weights, G), rtol=1e-4, atol=1e-5)
    by_path, _ = walk(mtl.gram_over(mtl.imtl_g(), lambda path: path[0].key == "w"), masks=MASKS)
    np.testing.assert_array_equal(by_path, updates)
    with pytest.raises(ValueError, match=raises_naming("where")):
        mtl.gram_over(mtl.imtl_g(), {"b": False, "w": False}).init(zeros())
    with pytest.raises(ValueError, match=raises_naming("method")):
        mtl.gram_over(mtl.trimmed_mean(), SHARED)


@pytest.mark.parametrize("column", [0, 3])
def test_gram_over_skips_a_step_that_is_broken_anywhere(column):
    broken = G.copy()
    broken[1, 2, column] = np.nan
    updates, states = walk(mtl.gram_over(mtl.smoothed(mtl.imtl_g(), K), SHARED), broken)
    assert not updates[1].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    np.testing.assert_array_equal(
        np.delete(updates, 1, axis=0), walk(mtl.gram_over(mtl.smoothed(mtl.imtl_g(), K), SHARED), np.delete(G, 1, 0))[0]
    )
