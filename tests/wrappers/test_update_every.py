"""Weights solved for in every k-th step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import tree, zeros
from walks import G, K, walk, weights_of

import mtlgrad_jax as mtl
from mtlgrad_jax.solvers._solution import NO_TASKS, NONFINITE, SOLVED


@pytest.mark.parametrize("k", [1, 3])
def test_update_every_reuses_weights(k):
    raw, stale = weights_of(mtl.imtl_g()), weights_of(mtl.update_every(mtl.imtl_g(), K, k))
    np.testing.assert_allclose(stale, raw[np.arange(len(G)) // k * k], rtol=1e-5, atol=1e-6)


def test_between_solves_the_state_says_that_nothing_had_to_be_solved():
    masks = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    _, states = walk(
        mtl.update_every(mtl.nash_mtl(), K, 9), np.concatenate([np.full_like(G[:1], np.nan), G[:5]]), [masks[0], *masks]
    )
    infos = [state.inner.info for state in states]
    assert [int(info.result) for info in infos] == [NONFINITE, SOLVED, SOLVED, NO_TASKS, SOLVED, SOLVED]
    assert [int(info.steps) > 0 for info in infos[1:]] == [True, False, False, False, True]
    assert [float(info.residual) for info in infos[2:5]] == [0, 0, 0]
    assert {int(info.skipped) for info in infos} == {1}


def test_update_every_solves_again_for_other_tasks():
    masks = np.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]], bool)
    raw = weights_of(mtl.imtl_g(), masks=masks)
    stale = weights_of(mtl.update_every(mtl.imtl_g(), K, 10), masks=masks)
    np.testing.assert_allclose(stale, raw[[0, 0, 2, 2, 4, 4]], atol=1e-6)


def test_update_every_between_solves_skips_a_broken_step_and_a_broken_solve_is_repeated():
    for broken_step in (0, 1):
        broken = G.copy()
        broken[broken_step] = np.nan
        updates, states = walk(mtl.update_every(mtl.imtl_g(), K, 3), broken)
        assert np.isfinite(updates).all()
        assert not updates[broken_step].any()
        assert int(mtl.metrics(states[-1])["skipped"]) == 1
    updates, _ = walk(mtl.update_every(mtl.imtl_g(), K, 3), np.concatenate([broken[1:2], G]))
    np.testing.assert_allclose(updates[1:], walk(mtl.update_every(mtl.imtl_g(), K, 3))[0], rtol=1e-5, atol=1e-6)


def test_the_gramian_is_only_formed_when_due():
    """Between solves no product of two stacks is computed: it is inside a branch."""
    tx = mtl.update_every(mtl.imtl_g(), K, 5)
    jaxpr = jax.make_jaxpr(lambda g, s: tx.update(tree(g), s))(jnp.asarray(G[0]), tx.init(zeros()))
    outside = [str(eqn.primitive) for eqn in jaxpr.eqns]
    assert "cond" in outside
    assert not {"dot_general", "while", "scan"} & set(outside)
    assert "dot_general" in str(jaxpr)
