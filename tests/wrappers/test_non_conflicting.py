"""The dual-cone projection after any method."""

import certificates
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, stack
from harness import P
from walks import MASKS, G, K, walk, weights_of

import mtlgrad_jax as mtl

WEIGHTINGS = {
    "mean": lambda: mtl.mean(),
    "constant": lambda: mtl.constant([1.0, -2.0, 0.5]),
    "cagrad": lambda: mtl.cagrad(),
    "pcgrad": lambda: mtl.pcgrad(),
    "uw": lambda: mtl.uw(num_tasks=K),
    "smoothed": lambda: mtl.smoothed(mtl.mgda(), K),
    "update_every": lambda: mtl.update_every(mtl.pcgrad(), K, 2),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_non_conflicting(name):
    """No task ascends, whatever the method and the gradients; a direction without conflict is unchanged."""
    losses = jnp.ones((len(FAMILIES), K))
    grads = np.stack([stack(family, K, P) for family in FAMILIES if family not in ("tiny", "huge")]).astype(np.float32)
    weights = weights_of(mtl.non_conflicting(WEIGHTINGS[name]()), grads=grads, losses=losses)
    for M, w in zip(np.einsum("tkp,tlp->tkl", grads, grads), weights, strict=True):
        n = np.sqrt(np.diag(M).astype(float))
        assert certificates.conflict(M, w, max(n.max(), n @ abs(w)) or 1) <= 1e-5
    orthogonal = np.broadcast_to(np.eye(K, P, dtype=np.float32), (2, K, P))
    plain, projected = (
        weights_of(m, grads=orthogonal, losses=losses)
        for m in (WEIGHTINGS[name](), mtl.non_conflicting(WEIGHTINGS[name]()))
    )
    np.testing.assert_allclose(projected, np.maximum(plain, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_non_conflicting_mean_is_dualproj():
    updates, _ = walk(mtl.non_conflicting(mtl.mean()), masks=MASKS)
    np.testing.assert_allclose(updates, walk(mtl.dualproj(), masks=MASKS)[0], rtol=1e-5, atol=1e-6)


def test_non_conflicting_skips_a_broken_step_of_a_method_that_sees_no_gradients():
    broken = G.copy()
    broken[1, 2, 4] = np.nan
    tx, losses = mtl.non_conflicting(mtl.uw(num_tasks=K)), jnp.ones((6, K))
    updates, states = walk(tx, broken, losses=losses)
    assert not updates[1].any()
    assert int(mtl.metrics(states[-1])["skipped"]) == 1
    np.testing.assert_array_equal(np.delete(updates, 1, axis=0), walk(tx, np.delete(G, 1, axis=0), losses=losses)[0])


def test_non_conflicting_counts_its_solve():
    _, states = walk(mtl.non_conflicting(mtl.mean()))
    assert max(int(mtl.metrics(state)["steps"]) for state in states) > 0
