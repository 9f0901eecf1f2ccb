"""What physics-informed networks use: traces of tangent kernels, and weights refreshed and averaged as in jaxpi."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import raises_naming

import mtlgrad_jax as mtl

WIDTH = 5
RNG = np.random.default_rng(0)
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(2, WIDTH)), jnp.float32),
    "out": jnp.asarray(RNG.normal(size=WIDTH), jnp.float32),
    "steps": jnp.asarray(3),
}
POINTS = {
    "boundary": jnp.asarray(RNG.normal(size=7), jnp.float32),
    "equation": {"t": jnp.asarray(RNG.normal(size=6)), "x": jnp.asarray(RNG.normal(size=6))},
}


def u(params, t, x):
    return params["out"] @ jnp.tanh(jnp.stack([t, x]) @ params["in"])


def boundary(params, x):
    return u(params, 0.0, x) - jnp.sin(x)


def equation(params, point):
    """Two equations at every point."""
    u_t, u_x = (jax.grad(u, i)(params, point["t"], point["x"]) for i in (1, 2))
    return jnp.stack([u_t + u_x, u_t * u(params, point["t"], point["x"])])


FNS = {"boundary": boundary, "equation": equation}


def dense(name):
    """The Jacobian (residuals, P)."""
    floating = {key: PARAMS[key] for key in ("in", "out")}
    rows = jax.jacrev(lambda p: jax.vmap(FNS[name], (None, 0))({**PARAMS, **p}, POINTS[name]).ravel())(floating)
    return np.concatenate([np.asarray(rows[key]).reshape(len(rows[key]), -1) for key in rows], axis=1).astype(float)


def kernel(name):
    return dense(name) @ dense(name).T


@pytest.mark.sample(1)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("at_once", [1, 4])
def test_exact_traces(at_once, jitted):
    """Leaves that are not floating do not count."""

    def traces(params, **kwargs):
        return mtl.ntk_traces(FNS, params, POINTS, at_once=at_once, **kwargs)

    found = (jax.jit(traces) if jitted else traces)(PARAMS)
    sums = traces(PARAMS, average=False)
    for name, count in (("boundary", 7), ("equation", 12)):
        assert found[name] == pytest.approx(np.trace(kernel(name)) / count, rel=1e-5)
        assert sums[name] == pytest.approx(np.trace(kernel(name)), rel=1e-5)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_law_of_estimated_traces(num_probes):
    """No bias, and the variance of Rademacher probes: 2/m times the sum of the squares off the diagonal."""
    draws = 4000
    estimate = jax.jit(jax.vmap(lambda key: mtl.ntk_traces(FNS, PARAMS, POINTS, num_probes, key, average=False)))
    found = estimate(jax.random.split(jax.random.key(0), draws))
    for name in FNS:
        K = kernel(name)
        variance = 2 / num_probes * ((K**2).sum() - (np.diag(K) ** 2).sum())
        assert found[name].mean() == pytest.approx(np.trace(K), abs=4 * np.sqrt(variance / draws))
        assert found[name].var() == pytest.approx(variance, rel=0.1)
    both = np.corrcoef(found["boundary"], found["equation"])
    assert abs(both[0, 1]) < 4 / np.sqrt(draws)


def test_all_signs_of_two_points():
    """One probe of two residuals gives one of two values, tr K +- 2 K_12."""
    points = {"boundary": POINTS["boundary"][:2]}
    one = jax.jit(lambda key: mtl.ntk_traces({"boundary": boundary}, PARAMS, points, 1, key, average=False)["boundary"])
    K = kernel("boundary")[:2, :2]
    for seed in range(10):
        found = one(jax.random.key(seed))
        assert min(abs(found - (np.trace(K) + sign * 2 * K[0, 1])) for sign in (-1, 1)) < 1e-5 * np.trace(K)


@pytest.mark.parametrize("num_probes", [None, 2])
def test_the_memory_of_traces_is_that_of_a_few_gradients(num_probes):
    count, size = 64, 1 << 16
    points = jnp.linspace(0, 1, count)

    def residual(w, x):
        return jnp.mean(jnp.sin(w * x))

    def trace(w, key):
        return mtl.ntk_traces(residual, w, points, num_probes, key, average=False)

    w, key = jnp.ones(size), jax.random.key(0)
    memory = jax.jit(trace).lower(w, key).compile().memory_analysis()
    limit = 8 if num_probes is None else 4 * count  # probes: the activations of one backward pass through all points
    assert memory.temp_size_in_bytes < limit * 4 * size


def test_what_ntk_traces_refuses():
    with pytest.raises(ValueError, match=raises_naming("residual_fns")):
        mtl.ntk_traces({"a": lambda params, x: x.astype(int)}, PARAMS, {"a": jnp.ones(2)})
    for wrong in ({"b": jnp.ones(2)}, {"a": jnp.ones(0)}, {"a": (jnp.ones(2), jnp.ones(3))}, {"a": 1.0}):
        with pytest.raises(ValueError, match=raises_naming("points")):
            mtl.ntk_traces({"a": lambda params, x: params["out"][0] * x}, PARAMS, wrong)
    with pytest.raises(ValueError, match=raises_naming("key")):
        mtl.ntk_traces(FNS, PARAMS, POINTS, num_probes=2)


def test_ntk_of_traces_far_apart():
    """Tasks without a trace have no weight; weights beyond the dtype are counted."""
    weigh = jax.jit(lambda traces: mtl.ntk(traces).weigh(None, mtl.ntk(traces).init(None), losses=jnp.ones(3)))
    for traces, wanted in (
        ([1e-18, 1e18, 1e18], [2e36, 2, 2]),
        ([1e38, 3e38, 3e38], [7, 7 / 3, 7 / 3]),
        ([0.0, 1.0, 3.0], [0, 4, 4 / 3]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ):
        weights, state = weigh(jnp.asarray(traces))
        np.testing.assert_allclose(weights, wanted, rtol=1e-6)
        assert int(state.info.fallbacks) == 0
    for traces in ([1e-30, 1e30, 1.0], [jnp.nan, 1.0, 1.0], [jnp.inf, 1.0, 1.0]):
        weights, state = weigh(jnp.asarray(traces))
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
        assert int(state.info.fallbacks) == 1


def test_ntk_computes_traces_only_where_it_needs_them():
    calls = []

    def traces():
        calls.append(1)
        return {"a": 1.0, "b": 3.0}

    tx = mtl.update_every(mtl.ntk(traces), num_tasks=2, k=3)
    state, seen = tx.init(jnp.zeros(2)), []
    for _ in range(6):
        before = len(calls)
        update, state = tx.update(jnp.eye(2), state, losses={"a": 1.0, "b": 1.0})
        np.testing.assert_allclose(update, [4, 4 / 3], rtol=1e-6)
        seen.append(len(calls) > before)
    assert seen == [True, False, False] * 2
    with pytest.raises(ValueError, match=raises_naming("traces")):
        mtl.ntk(traces).update(jnp.eye(2), mtl.ntk(traces).init(None), losses={"a": 1.0, "c": 1.0})


def losses_fn(params, points):
    return {name: jnp.mean(jax.vmap(FNS[name], (None, 0))(params, points[name]) ** 2) for name in FNS}


WEIGHTS = {"boundary": 2.0, "equation": 1.0}
RATE, EVERY, STEPS = 0.01, 4, 13


def jaxpi(params, inverse):
    """Its loop in numpy: a step, then every few steps w <- 0.9 w + 0.1 mean(t) / t with t at the new parameters."""
    gradient = jax.jit(jax.jacrev(losses_fn))
    names, weights, path = sorted(FNS), dict(WEIGHTS), []
    for step in range(STEPS + 1):
        rows = gradient(params, POINTS)
        params = {key: value - RATE * sum(weights[n] * rows[n][key] for n in names) for key, value in params.items()}
        path.append(params)
        if step % EVERY == 0:
            own = inverse(params)
            mean = np.mean([own[n] for n in names])
            weights = {n: 0.9 * weights[n] + 0.1 * mean / own[n] for n in names}
    return path


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["grad_norm", "ntk"])
def test_the_loops_of_jaxpi(scheme):
    """It refreshes its weights after a step, this library before it: the same after its first step."""
    floating = {key: PARAMS[key] for key in ("in", "out")}
    with jax.enable_x64(True):
        floating = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), floating)

        def norms(params):
            rows = jax.jacrev(losses_fn)(params, POINTS)
            return {n: np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in rows[n].values())) for n in rows}

        def traces(params):
            rows = jax.jacrev(lambda p: {n: jax.vmap(FNS[n], (None, 0))(p, POINTS[n]).ravel() for n in FNS})(params)
            return {
                n: np.mean(sum((np.asarray(leaf) ** 2).reshape(len(leaf), -1).sum(axis=1) for leaf in rows[n].values()))
                for n in rows
            }

        wanted = jaxpi(floating, norms if scheme == "grad_norm" else traces)

        def optimizer(params):
            base = mtl.avgnorm(scale="mean_norm")
            if scheme == "ntk":
                base = mtl.ntk(lambda: mtl.ntk_traces(FNS, params, POINTS), scale="mean")
            averaged = mtl.smoothed(base, num_tasks=2, decay=0.9, init=WEIGHTS)
            return mtl.chain(mtl.update_every(averaged, num_tasks=2, k=EVERY), optax.sgd(RATE))

        @jax.jit
        def step(params, state):
            losses, grads = mtl.task_value_and_grad(losses_fn)(params, POINTS)
            updates, state = optimizer(params).update(grads, state, params, losses=losses)
            return optax.apply_updates(params, updates), state

        params, state = wanted[0], optimizer(wanted[0]).init(wanted[0])
        for after in wanted[1:]:
            params, state = step(params, state)
            for key, value in after.items():
                np.testing.assert_allclose(params[key], value, rtol=1e-9, atol=1e-12)
