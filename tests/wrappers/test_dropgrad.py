"""Noise in each task's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import P, flat, tree, zeros
from walks import G, K, walk

import mtlgrad_jax as mtl

NOISE = [(kind, rate) for kind in ("gaussian", "binary") for rate in (0.1, 0.5)]


@pytest.mark.parametrize(("kind", "rate"), NOISE)
def test_dropgrad_keeps_the_mean(kind, rate):
    """E[g'] = g, the variance is p/(1-p) g^2, and noise is independent across coordinates, tasks and steps."""
    tx = mtl.dropgrad(rate, kind, key=1)
    grads = tree(jnp.asarray(G[0]))
    _, drawn = jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], tx.init(zeros()), length=20_000)
    noise = np.asarray(flat(drawn), float) / G[0]
    variance, count = rate / (1 - rate), len(noise)
    np.testing.assert_allclose(noise.mean(axis=0), np.ones((K, P)), atol=5 * np.sqrt(variance / count))
    np.testing.assert_allclose(noise.var(axis=0), np.full((K, P), variance), rtol=0.1)
    if kind == "binary":
        np.testing.assert_allclose(np.unique(noise.round(4)), [0, round(1 / (1 - rate), 4)])
    columns = np.concatenate([noise[1:].reshape(count - 1, -1), noise[:-1].reshape(count - 1, -1)], axis=1)
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 6 / np.sqrt(count)


@pytest.mark.parametrize("kind", ["gaussian", "binary"])
def test_dropgrad_of_nothing_and_of_broken_and_absent_rows(kind):
    """A rate of zero changes nothing; absent or non-finite rows pass unchanged and do not affect the others' noise."""
    grads, start = tree(jnp.asarray(G[0])), mtl.dropgrad(key=2).init(zeros())
    same, _ = mtl.dropgrad(0.0, kind).update(grads, start)
    np.testing.assert_array_equal(flat(same), G[0])
    tx = mtl.dropgrad(0.5, kind)
    plain, _ = tx.update(grads, start)
    assert (np.asarray(flat(plain)) != G[0]).any(axis=1).all()
    absent, _ = tx.update(grads, start, task_mask=jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(flat(absent)[1], G[0, 1])
    np.testing.assert_array_equal(flat(absent)[::2], flat(plain)[::2])
    broken = {**grads, "w": grads["w"].at[1, 0, 0].set(jnp.inf)}
    passed, _ = tx.update(broken, start)
    np.testing.assert_array_equal(flat(passed)[1], flat(broken)[1])
    np.testing.assert_array_equal(flat(passed)[::2], flat(plain)[::2])


@pytest.mark.nightly
def test_dropgrad_in_a_chain_under_jit_vmap_donation_and_bfloat16():
    tx = optax.chain(mtl.dropgrad(key=jax.random.key(3)), mtl.sum())
    first, second = walk(tx)[0], walk(tx)[0]
    np.testing.assert_array_equal(first, second)
    assert (first != walk(mtl.sum())[0]).any(axis=1).all()
    grads = jnp.asarray(G)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), tx.init(zeros()))
    together, _ = jax.vmap(lambda g, s: tx.update(tree(g), s))(grads, states)
    np.testing.assert_allclose(flat(together)[0], first[0], rtol=1e-5)
    step = jax.jit(lambda g, s: tx.update(tree(g), s), donate_argnums=1)
    for _ in range(2):
        np.testing.assert_allclose(flat(step(grads[0], tx.init(zeros()))[0]), first[0], rtol=1e-5)
    half, _ = mtl.dropgrad().update(tree(grads[0].astype(jnp.bfloat16)), mtl.dropgrad().init(zeros()))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("unchecked")
def test_the_rate_of_dropgrad_may_be_a_schedule():
    """Rates 0, 0.5: the first step changes nothing, the second is that of a fixed rate."""
    tx = optax.inject_hyperparams(mtl.dropgrad)(rate=lambda step: 0.5 * step, kind="binary", key=4)
    grads = tree(jnp.asarray(G[0]))
    first, state = jax.jit(tx.update)(grads, tx.init(zeros()))
    np.testing.assert_array_equal(flat(first), G[0])
    second, _ = jax.jit(tx.update)(grads, state)
    assert set(np.unique(np.asarray(flat(second) / G[0]).round(5))) == {0, 2}
