"""Metrics kept in the state, and how they are read."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import stack
from harness import P, raises_naming, tree, zeros
from walks import LABELS, G, K, walk

import mtlgrad_jax as mtl


def test_scalars_are_named_by_task_and_place(unchecked):
    losses = {"seg": {"fine": 0.0, "coarse": 0.0}, "depth": 0.0}
    tx = mtl.partition(
        {"one": mtl.with_metrics(mtl.imtl_g(), K), "two": mtl.grouped(mtl.imtl_g(), lambda path: 0)}, LABELS
    )
    _, state = tx.update(tree(jnp.asarray(G[0], jnp.float32)), tx.init(zeros()))
    found, logged = mtl.metrics(state), mtl.scalars(mtl.metrics(state), like=losses)
    assert all(value.ndim == 0 for value in logged.values())
    assert {"one.norms/seg.fine", "one.inner.residual", "two.result/0"} <= logged.keys()
    names = ["depth", "seg.coarse", "seg.fine"]
    assert [logged[f"one.weights/{name}"] for name in names] == found["one.weights"].tolist()
    assert logged["one.cosines/depth/seg.fine"] == found["one.cosines"][0, 2]
    flat_names = mtl.scalars(found, like=jnp.zeros(3))
    assert flat_names["one.norms/2"] == logged["one.norms/seg.fine"]
    with pytest.raises(ValueError, match=r"`metrics` must have one\.weights of shape"):
        mtl.scalars(found, like=jnp.zeros(2))
    with pytest.raises(ValueError, match="`metrics` must be what"):
        mtl.scalars(jnp.zeros(3), like=losses)


def test_metrics_of_a_skipped_step_are_those_before():
    broken = G.copy()
    broken[2, 1] = np.nan
    for method in (mtl.imtl_g(), mtl.mean(), mtl.trimmed_mean()):
        _, states = walk(mtl.with_metrics(method, K), broken)
        for old, new in zip(states[1].metrics, states[2].metrics, strict=True):
            np.testing.assert_array_equal(old, new)


def test_metrics_around_a_wrapper_count_the_tasks_that_were_used():
    broken = G.copy()
    broken[0, 1] = np.nan
    tx = mtl.with_metrics(mtl.skip_nonfinite_tasks(mtl.imtl_g()), K)
    _, states = walk(tx, broken)
    n = np.linalg.norm(G[0, [0, 2]], axis=1)
    similarity = mtl.metrics(states[0])["magnitude_similarity"]
    assert float(similarity) == pytest.approx(2 * n.prod() / (n**2).sum(), rel=1e-5)


def test_metrics_are_facts_about_the_gradients():
    grads = np.stack([stack("opposite", K, P)]).astype(np.float32)
    _, states = walk(mtl.with_metrics(mtl.mean(), K), grads)
    found = mtl.metrics((optax.EmptyState(), states[0]))
    unit = grads[0] / np.linalg.norm(grads[0], axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.testing.assert_allclose(found["cosines"], cosines, rtol=1e-4, atol=1e-5)
    upper = np.triu_indices(K, 1)
    assert float(found["conflict_fraction"]) == pytest.approx((cosines[upper] < 0).mean())
    n = np.linalg.norm(grads[0], axis=1)
    similarity = np.mean([2 * n[i] * n[j] / (n[i] ** 2 + n[j] ** 2) for i, j in zip(*upper, strict=True)])
    assert float(found["magnitude_similarity"]) == pytest.approx(similarity, rel=1e-5)
    np.testing.assert_allclose(found["predicted_change"], -grads[0] @ grads[0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_metrics_of_a_method_without_weights():
    _, states = walk(mtl.with_metrics(mtl.trimmed_mean(), K))
    updates, _ = walk(mtl.trimmed_mean())
    for t, state in enumerate(states):
        found = mtl.metrics(state)
        assert "weights" not in found
        np.testing.assert_allclose(found["predicted_change"], -G[t] @ updates[t], rtol=1e-4, atol=1e-4)


def test_metrics_of_several_methods_say_where():
    tx = mtl.partition({"one": mtl.imtl_g(), "two": mtl.mean()}, {"b": "one", "w": "two"})
    _, states = walk(tx)
    assert {key.rsplit(".", 1)[0] for key in mtl.metrics(states[0])} == {"one", "two"}
    with pytest.raises(ValueError, match=raises_naming("opt_state")):
        mtl.metrics(optax.adam(1e-3).init(zeros()))
