"""What the registry promises of each method, with a stored counterexample for each promise it does not make."""

import functools

import jax
import numpy as np
import pytest
from families import FAMILIES, stack
from harness import EVERY, P, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlgrad_jax._registry import HOMOGENEOUS, NON_CONFLICTING, PERMUTATION, ROWS, SCALE_FREE

K = 3
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Small integers keep float32 exact where the mathematics is; the second factor spreads the rows' scales.
ROWS_OF_INTEGERS = st.tuples(
    arrays(np.float64, (K, P), elements=st.integers(-4, 4)), arrays(np.float64, (K,), elements=st.integers(-3, 3))
).map(lambda pair: pair[0] * 4.0 ** pair[1][:, None])
LOSSES = arrays(np.float64, (1, K), elements=st.integers(1, 16).map(lambda i: i / 4))


def plane(rows):
    """Rows in the plane of the first two of P coordinates."""
    return np.pad(np.asarray(rows, float), ((0, 0), (0, P - 2)))


CONFLICT = dict.fromkeys(EVERY, plane([[3, 0], [-9, 0], [-12, 3]]))
CONFLICT |= {
    "pcgrad": plane([[4, 4], [-3, -12], [-12, 0]]),
    "cagrad": plane([[-3, 3], [9, -9], [12, -9]]),
    "db_mtl": plane([[-9, -12], [2, 3], [-3, -4]]),
}
GENERIC = plane([[2, 1], [-1, 3], [1, -1]])


def promising(promise):
    return [name for name in EVERY if promise in ROWS[name].promises]


def lacking(promise):
    return [name for name in EVERY if promise not in ROWS[name].promises]


@functools.cache
def weigher(name):
    weighting = ROWS[name].weighting(**ROWS[name].kwargs(K))
    return jax.jit(lambda gramian: weighting.update(gramian, weighting.init(K))[0])


def worst_change(name, G):
    """The most negative <g_i, d>, relative to the row's norm and to the length that d would have without cancelling."""
    G = G.astype(np.float32).astype(float)
    norms = np.linalg.norm(G, axis=1)
    updates, _ = run(name, G[None])
    if NON_CONFLICTING in ROWS[name].promises:
        weights = np.asarray(weigher(name)((G @ G.T).astype(np.float32)), float)
        updates, length = [weights @ G], norms @ np.abs(weights)
        length = max(length, norms.max()) if HOMOGENEOUS in ROWS[name].promises else length
    else:
        length = np.linalg.norm(updates[0])
    assert np.isfinite(updates).all()
    return (G @ updates[0] / np.where(norms > 0, norms, 1)).min() / (length or 1)


@pytest.mark.parametrize("name", promising(NON_CONFLICTING))
@FEW
@given(G=ROWS_OF_INTEGERS)
def test_non_conflicting(name, G):
    assert worst_change(name, G) >= -1e-5


@pytest.mark.parametrize("name", promising(NON_CONFLICTING))
@pytest.mark.parametrize("family", FAMILIES)
def test_non_conflicting_on_families(name, family):
    assert worst_change(name, stack(family, K, P)) >= -2e-5


@pytest.mark.parametrize("name", lacking(NON_CONFLICTING))
def test_counterexample_to_non_conflicting(name):
    assert worst_change(name, CONFLICT[name]) < -0.05


def permuted(name, G, losses, order):
    straight, _ = run(name, G[None], losses)
    turned, _ = run(name, G[order][None], losses[:, order])
    return np.abs(straight - turned).max() / max(np.linalg.norm(straight), 1e-30)


@pytest.mark.parametrize("name", [name for name in promising(PERMUTATION) if not ROWS[name].randomized])
@FEW
@given(
    G=arrays(np.float64, (K, P), elements=st.floats(-1, 1, width=32)), losses=LOSSES, order=st.permutations(range(K))
)
def test_permutation(name, G, losses, order):
    G = G + stack("normal", K, P)  # in general position, where weights are unique
    assert permuted(name, G, losses, order) < 1e-3


@pytest.mark.parametrize("name", lacking(PERMUTATION))
def test_counterexample_to_permutation(name):
    assert permuted(name, GENERIC, np.ones((1, K)), [2, 0, 1]) > 0.1


@pytest.mark.parametrize("name", promising(HOMOGENEOUS))
@pytest.mark.parametrize("family", ["normal", "correlated", "scales", "near_stationary"])
def test_scale_equivariance(name, family):
    """Powers of two change no digit, so the update must scale exactly, for row norms from 1e-18 to 1e18."""
    G = stack(family, K, P).astype(np.float32).astype(float)
    G /= 2.0 ** np.ceil(np.log2(np.linalg.norm(G, axis=1).max()))
    plain, _ = run(name, np.stack([G, G]))
    low = -60 + int(np.ceil(-np.log2(np.linalg.norm(G, axis=1).min())))
    for exponent in (low, -20, -1, 30, 59):
        scaled, state = run(name, np.stack([G, G]) * 2.0**exponent)
        np.testing.assert_allclose(scaled, plain * 2.0**exponent, rtol=1e-5, atol=1e-6 * 2.0**exponent)
        assert int(state.info.skipped) == 0


@pytest.mark.parametrize("name", lacking(HOMOGENEOUS))
def test_counterexample_to_scale_equivariance(name):
    losses = np.asarray([[1.0, 1.0, 1.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    G = np.stack([GENERIC] * 3)
    plain, _ = run(name, G, losses)
    scaled, _ = run(name, G * 1e-12, losses)
    assert np.abs(scaled / 1e-12 - plain).max() > 1e-2


@pytest.mark.parametrize("name", promising(SCALE_FREE))
@FEW
@given(exponents=arrays(np.int64, (K,), elements=st.integers(-20, 20)))
def test_task_scaling(name, exponents):
    G = GENERIC + 0.1 * stack("normal", K, P)
    plain, _ = run(name, G[None])
    scaled, _ = run(name, (G * 2.0 ** exponents[:, None])[None])
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", lacking(SCALE_FREE))
def test_counterexample_to_task_scaling(name):
    losses = np.asarray([[1.0, 2.0, 4.0]])
    G = np.stack([GENERIC * np.asarray([[1.0], [1.0], [2.0]])])
    plain, _ = run(name, G, losses)
    scaled, _ = run(name, G * np.asarray([64.0, 1.0, 1 / 64])[:, None], losses)
    assert np.abs(scaled - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("name", EVERY)
@FEW
@given(
    G=ROWS_OF_INTEGERS,
    losses=LOSSES,
    absent=st.integers(0, K - 1),
    junk=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30]),
)
def test_absent_tasks_may_hold_anything(name, G, losses, absent, junk):
    """The update is that of the tasks present, whatever stands in the absent row and loss."""
    present = np.ones((1, K), bool)
    present[0, absent] = False
    clean, _ = run(name, G[None], losses, present)
    spoiled, spoiled_losses = G.copy(), losses.copy()
    spoiled[absent], spoiled_losses[0, absent] = junk, junk
    dirty, state = run(name, spoiled[None], spoiled_losses, present)
    np.testing.assert_array_equal(clean, dirty)
    assert int(state.info.skipped) == 0
