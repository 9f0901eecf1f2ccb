"""Weights averaged over time."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from harness import raises_naming, tree, zeros
from walks import MASKS, G, K, walk, weights_of

import mtlgrad_jax as mtl


@pytest.mark.sample(1)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_smoothed_averages_weights(decay):
    raw = weights_of(mtl.imtl_g(), masks=MASKS)
    wanted = reference.smoothed(raw, MASKS, decay)
    np.testing.assert_allclose(
        weights_of(mtl.smoothed(mtl.imtl_g(), K, decay), masks=MASKS), wanted, rtol=1e-5, atol=1e-6
    )


INIT = [0.3, 1.0, -2.0]


def test_smoothed_starts_at_given_weights():
    wanted = reference.smoothed(weights_of(mtl.imtl_g(), masks=MASKS), MASKS, 0.9, INIT)
    found = weights_of(mtl.smoothed(mtl.imtl_g(), K, 0.9, INIT), masks=MASKS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    tx = mtl.smoothed(mtl.mean(), K, 0.9, {"c": INIT[2], "a": INIT[0], "b": INIT[1]})
    _, state = tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), losses=dict.fromkeys("abc", 1.0))
    np.testing.assert_allclose(state.weights, 0.9 * np.asarray(INIT) + 0.1 / 3, rtol=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("init", [[1.0, 1.0], dict.fromkeys("abc", 1.0)], ids=["length", "names"])
def test_the_first_averages_belong_to_the_tasks(init):
    tx = mtl.smoothed(mtl.imtl_g(), K, init=init)
    with pytest.raises(ValueError, match=raises_naming("init")):
        tx.update(tree(jnp.asarray(G[0])), tx.init(zeros()), losses=jnp.ones(K))


@pytest.mark.nightly
def test_weights_averaged_when_they_are_computed_or_in_every_step():
    raw, first, wanted = weights_of(mtl.imtl_g()), np.asarray(INIT), []
    for t in range(6):
        first = 0.9 * first + 0.1 * raw[t] if t % 2 == 0 else first
        wanted.append(first)
    rare = mtl.update_every(mtl.smoothed(mtl.imtl_g(), K, 0.9, INIT), K, 2)
    np.testing.assert_allclose(weights_of(rare), wanted, rtol=1e-5, atol=1e-6)
    always = mtl.smoothed(mtl.update_every(mtl.imtl_g(), K, 2), K, 0.9, INIT)
    stale = reference.smoothed(raw[[0, 0, 2, 2, 4, 4]], np.ones_like(MASKS), 0.9, INIT)
    np.testing.assert_allclose(weights_of(always), stale, rtol=1e-5, atol=1e-6)


def test_smoothed_survives_a_broken_step():
    broken = G.copy()
    broken[2] = np.nan
    updates, states = walk(mtl.smoothed(mtl.imtl_g(), K, 0.9), broken)
    assert not updates[2].any()
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(states[1].weights, states[2].weights)
