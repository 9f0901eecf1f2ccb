"""Methods that take the cross-Gramian of two batches."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from harness import P, raises_naming, tree

import mtlgrad_jax as mtl
from mtlgrad_jax.solvers._solution import BIASED, SOLVED

K, RNG = 3, np.random.default_rng(0)
G = RNG.normal(size=(6, K, P)).astype(np.float32)


@pytest.mark.parametrize("make", [lambda: mtl.modo(num_tasks=K), lambda: mtl.sdmgrad(num_tasks=K)])
def test_a_cross_gramian_takes_the_place_of_the_gramian(make):
    """It need not be symmetric; the Gramian is then not computed; the result code says if it is missing."""
    method = make()
    cross = mtl.stacks.cross_gramian(tree(jnp.asarray(G[0])), tree(jnp.asarray(G[1])))
    np.testing.assert_allclose(cross, G[0] @ G[1].T, rtol=1e-4, atol=1e-5)

    def never():
        raise AssertionError

    weights, state = method.weigh(never, method.init(None), cross_gramian=cross)
    assert state.info.result == SOLVED
    assert float(jnp.sum(weights)) == pytest.approx(1, rel=1e-5)
    alone, state = method.weigh(cross @ cross.T, method.init(None))
    assert state.info.result == BIASED
    assert np.abs(weights - alone).max() > 1e-3
    present = jnp.asarray([True, False, True])
    spoiled = cross.at[1].set(jnp.nan).at[:, 1].set(jnp.inf)
    masked, state = method.weigh(None, method.init(None), cross_gramian=spoiled, task_mask=present)
    assert masked[1] == 0
    assert np.isfinite(masked).all()
    assert state.method.weights[1] == pytest.approx(1 / K)
    assert float(jnp.sum(state.method.weights)) == pytest.approx(1, rel=1e-5)
    skipped, state = method.weigh(None, method.init(None), cross_gramian=spoiled)
    assert not skipped.any()
    assert state.info.skipped == 1


@pytest.mark.parametrize("make", [lambda: mtl.modo(num_tasks=K), lambda: mtl.sdmgrad(num_tasks=K)])
def test_tasks_without_weight_learn_where_the_others_are_absent(make):
    """From a corner of the simplex, they learn as from equal weights of the present tasks alone."""
    method, alone = make(), make()
    M = jnp.asarray(G[0] @ G[0].T)
    state = method.init(None)
    state = state._replace(method=state.method._replace(weights=jnp.asarray([1.0, 0, 0])))
    absent = {"task_mask": jnp.asarray([False, True, True])}
    found, wanted, fresh = [], [], alone.init(None)
    for _ in range(3):
        weights, state = method.weigh(None, state, cross_gramian=M, **absent)
        others, fresh = alone.weigh(None, fresh, cross_gramian=M, **absent)
        found.append(weights)
        wanted.append(others)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert state.method.weights[0] == state.method.weights.sum() == 1


def test_a_cross_gramian_goes_the_matrix_free_way():
    step = mtl.balanced_value_and_grad(lambda w: jnp.asarray(G[0]) @ w, mtl.modo(num_tasks=K))
    cross = jnp.asarray(G[0] @ G[1].T)
    _, gradient, state = step(jnp.zeros(P), mtl.modo(num_tasks=K).init(None), extra_args={"cross_gramian": cross})
    assert state.info.result == SOLVED
    w = np.full(K, 1 / K)
    w = reference.simplex(w - 0.1 * (G[0] @ G[1].T @ w + 0.1 * w))
    np.testing.assert_allclose(gradient, w @ G[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_a_cross_gramian_of_another_size_is_refused():
    method = mtl.modo(num_tasks=K)
    with pytest.raises(ValueError, match=raises_naming("cross_gramian")):
        method.weigh(None, method.init(None), losses=jnp.ones(K), cross_gramian=jnp.eye(K + 1)[:K])
