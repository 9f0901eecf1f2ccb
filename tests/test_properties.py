"""The registry's promises for each method, tested on the pool of the property table and on random input."""

import functools

import jax
import numpy as np
import pytest
from families import FAMILIES, stack
from harness import EVERY, WEIGHED, P, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from property_table import FILE, PROPERTIES, STEEP, SUMS, outcomes, render

from mtlgrad_jax._core.row import CONTINUOUS, DESCENT, HOMOGENEOUS, LINEAR, NON_CONFLICTING, PERMUTATION, SCALE_FREE
from mtlgrad_jax.registry import ROWS
from mtlgrad_jax.registry import make as make_row

K = 3
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Small integers make float32 exact; the second factor spreads the rows' scales.
ROWS_OF_INTEGERS = st.tuples(
    arrays(np.float64, (K, P), elements=st.integers(-4, 4)), arrays(np.float64, (K,), elements=st.integers(-3, 3))
).map(lambda pair: pair[0] * 4.0 ** pair[1][:, None])
LOSSES = arrays(np.float64, (1, K), elements=st.integers(1, 16).map(lambda i: i / 4))


GENERIC = np.pad([[2.0, 1], [-1, 3], [1, -1]], ((0, 0), (0, P - 2)))


def promising(promise):
    return [name for name in EVERY if promise in ROWS[name].promises]


@pytest.mark.sample(3)
@pytest.mark.parametrize("prop", [prop.name for prop in PROPERTIES])
@pytest.mark.parametrize("name", EVERY)
def test_promised_is_what_holds_on_the_pool(name, prop):
    outcome = outcomes(name)[prop]
    assert outcome.holds == (prop in ROWS[name].promises), outcome.text


@pytest.mark.nightly
def test_the_table_is_what_a_run_renders():
    assert FILE.read_text() == render(), "python tests/property_table.py writes it"


@functools.cache
def weigher(name):
    method = make_row(ROWS[name], K)
    return jax.jit(lambda gramian: method.weigh(gramian, method.init(None), losses=np.ones(K))[0])


def worst_change(name, G, vectors=lambda G: G):
    """The most negative <v, d>, relative to the norm of v and to the length of d without cancellation."""
    G = G.astype(np.float32).astype(float)
    norms, vectors = np.linalg.norm(G, axis=1), vectors(G)
    if name in WEIGHED:
        weights = np.asarray(weigher(name)((G @ G.T).astype(np.float32)), float)
        update, length = weights @ G, norms @ np.abs(weights)
    else:
        (update,), _ = run(name, G[None])
        length = np.linalg.norm(update)
    assert np.isfinite(update).all()
    length = max(length, norms.max()) if HOMOGENEOUS in ROWS[name].promises else length
    sizes = np.linalg.norm(vectors, axis=1)
    return (vectors @ update / np.where(sizes > 0, sizes, 1)).min() / (length or 1)


def mean_gradient(G):
    # A mean smaller than the rows' rounding has no direction.
    mean = G.mean(axis=0, keepdims=True)
    return mean * (np.linalg.norm(mean) > 1e-3 * np.linalg.norm(G, axis=1).max())


@pytest.mark.parametrize("name", promising(NON_CONFLICTING))
@FEW
@given(G=ROWS_OF_INTEGERS)
def test_non_conflicting(name, G):
    assert worst_change(name, G) >= -1e-5


@pytest.mark.parametrize("name", promising(NON_CONFLICTING))
@pytest.mark.parametrize("family", FAMILIES)
def test_non_conflicting_on_families(name, family):
    assert worst_change(name, stack(family, K, P)) >= -2e-5


@pytest.mark.parametrize("name", promising(DESCENT))
@FEW
@given(G=ROWS_OF_INTEGERS)
def test_descent(name, G):
    assert worst_change(name, G, mean_gradient) >= -1e-5


def permuted(name, G, losses, order):
    straight, _ = run(name, G[None], losses)
    turned, _ = run(name, G[order][None], losses[:, order])
    return np.abs(straight - turned).max() / max(np.linalg.norm(straight), 1e-30)


@pytest.mark.sample(3)
# In float32 a steep method amplifies rounding errors: the pool checks it where it does not.
@pytest.mark.parametrize("name", [n for n in promising(PERMUTATION) if not (ROWS[n].randomized or n in STEEP)])
@FEW
@given(
    G=arrays(np.float64, (K, P), elements=st.floats(-1, 1, width=32)), losses=LOSSES, order=st.permutations(range(K))
)
def test_permutation(name, G, losses, order):
    G = G + stack("normal", K, P)  # in general position, where weights are unique
    assert permuted(name, G, losses, order) < 1e-3


@pytest.mark.parametrize("name", promising(HOMOGENEOUS))
@pytest.mark.parametrize("family", ["normal", "correlated", "scales", "near_stationary"])
def test_scale_equivariance(name, family):
    """Powers of two do not change digits, so the update must scale exactly, for row norms from 1e-18 to 1e18."""
    G = stack(family, K, P).astype(np.float32).astype(float)
    G /= 2.0 ** np.ceil(np.log2(np.linalg.norm(G, axis=1).max()))
    plain, _ = run(name, np.stack([G, G]))
    low = -60 + int(np.ceil(-np.log2(np.linalg.norm(G, axis=1).min())))
    for exponent in (low, -20, -1, 30, 59):
        scaled, state = run(name, np.stack([G, G]) * 2.0**exponent)
        np.testing.assert_allclose(scaled, plain * 2.0**exponent, rtol=1e-5, atol=1e-6 * 2.0**exponent)
        assert int(state.info.skipped) == 0


@pytest.mark.parametrize("name", promising(SCALE_FREE))
@FEW
@given(exponents=arrays(np.int64, (K,), elements=st.integers(-20, 20)))
def test_task_scaling(name, exponents):
    G = GENERIC + 0.1 * stack("normal", K, P)
    plain, _ = run(name, G[None])
    scaled, _ = run(name, (G * 2.0 ** exponents[:, None])[None])
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", promising(CONTINUOUS))
@FEW
@given(G=ROWS_OF_INTEGERS, towards=arrays(np.float64, (K, P), elements=st.integers(-1, 1)))
def test_continuity(name, G, towards):
    largest = max(np.linalg.norm(G, axis=1).max(), 1)
    updates, _ = run(name, G[None], dtype=np.float64)
    moved, _ = run(name, (G + 1e-10 * largest * towards)[None], dtype=np.float64)
    assert np.abs(moved - updates).max() < 1e-4 * largest


@pytest.mark.parametrize("name", promising(LINEAR))
@FEW
@given(G=arrays(np.float64, (K, P), elements=st.floats(-1, 1, width=32)), pair=st.sampled_from(SUMS))
def test_linearity_under_scaling(name, G, pair):
    G = G + stack("normal", K, P)
    first, second, both = (run(name, (G * np.asarray(factors)[:, None])[None])[0] for factors in (*pair, np.add(*pair)))
    np.testing.assert_allclose(first + second, both, rtol=1e-3, atol=1e-3 * np.abs(both).max())


@pytest.mark.parametrize("name", EVERY)
@FEW
@given(
    G=ROWS_OF_INTEGERS,
    losses=LOSSES,
    absent=st.integers(0, K - 1),
    junk=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30]),
)
def test_absent_tasks_may_hold_anything(name, G, losses, absent, junk):
    """The update is that of the tasks present, whatever the absent row and loss hold."""
    present = np.ones((1, K), bool)
    present[0, absent] = False
    clean, _ = run(name, G[None], losses, present)
    spoiled, spoiled_losses = G.copy(), losses.copy()
    spoiled[absent], spoiled_losses[0, absent] = junk, junk
    dirty, state = run(name, spoiled[None], spoiled_losses, present)
    np.testing.assert_array_equal(clean, dirty)
    assert int(state.info.skipped) == 0
